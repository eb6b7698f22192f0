"""Tables and generated blocks of Markdown documents."""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path


def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> Iterator[str]:
    """The lines of a table."""
    yield f"| {' | '.join(header)} |"
    yield "|---" * len(header) + "|"
    for row in rows:
        yield f"| {' | '.join(map(str, row))} |"


def link(path: Path, folder: Path) -> str:
    """To `path`, from a document in `folder`, which lies above it."""
    return f"[{path.name}]({path.relative_to(folder).as_posix()})"


def fill(text: str, name: str, lines: Iterable[str]) -> str:
    """`text` with what stands between the markers of the block `name` replaced.

    Raises:
        ValueError: a marker is missing.
    """
    start, end = f"<!-- bench:{name} -->", f"<!-- /bench:{name} -->"
    before, found, rest = text.partition(start)
    _, closed, after = rest.partition(end)
    if not found or not closed:
        raise ValueError(f"document: expected the markers {start} and {end}.")
    return f"{before}{start}\n{chr(10).join(lines).rstrip()}\n{end}{after}"
