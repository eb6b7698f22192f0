"""Columns of parquet, CSV and JSON-lines files, and the splits that such files, or folders, make."""

import bisect
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

if TYPE_CHECKING:
    import pyarrow

FORMATS = (".parquet", ".csv", ".tsv", ".jsonl", ".json")
TRAIN_SPLIT = "train"
# In this order: the test split of a published dataset often has no labels.
TEST_SPLITS = ("val", "dev", "test")
# JSON rows longer than pyarrow's block would be an error.
_JSON_BLOCK = 1 << 27


class Table(NamedTuple):
    """The wanted columns of several files, one after the other."""

    columns: "pyarrow.Table"
    files: list[tuple[Path, int]]
    """Each file with the number of its first row."""

    def where(self, row: int) -> str:
        """In which file that is; rows count from 0 in each."""
        path, first = self.files[bisect.bisect_right([first for _, first in self.files], row) - 1]
        return f"row {row - first} of {path}"

    def class_names(self, column: str) -> list[str]:
        """Of the classes 0, 1, ..., where Hugging Face's metadata names them; else none."""
        metadata = json.loads((self.columns.schema.metadata or {}).get(b"huggingface", b"{}"))
        return metadata.get("info", {}).get("features", {}).get(column, {}).get("names") or []


def split_files(root: Path, expected: str, formats: Sequence[str]) -> dict[str, list[Path]]:
    """The files of "train" and "test" below `root`, or all of them as "all" where no name begins with a split's.

    Args:
        root: a folder, or one file, which is then "all".
        expected: what belongs into it, for the error.
        formats: endings of the files to take.
    """
    if root.is_file():
        return {"all": [root]}
    files = sorted(path for path in root.iterdir() if path.suffix in formats and not path.name.startswith("."))
    if not files:
        raise FileNotFoundError(f"data.root: expected {expected}, got {root} without any {', '.join(formats)}.")
    parts = {name: [path for path in files if path.name.startswith(name)] for name in (TRAIN_SPLIT, *TEST_SPLITS)}
    if not any(parts.values()):
        return {"all": files}
    test = next((parts[name] for name in TEST_SPLITS if parts[name]), [])
    if not parts[TRAIN_SPLIT] or not test:
        raise FileNotFoundError(
            f"data.root: expected {expected}, got {root} with {', '.join(path.name for path in files)}, and no file of "
            f"the {'test' if parts[TRAIN_SPLIT] else 'train'} split. Name one so, or give a single file as data.root: "
            "then data.test_fraction of its rows are for testing."
        )
    return {"train": parts[TRAIN_SPLIT], "test": test}


def read_table(
    paths: Iterable[Path],
    names: Sequence[str],
    expected: str,
    *,
    text: Sequence[str] = (),
    argument: str = "data.root",
) -> Table:
    """The columns `names` of all files together.

    Args:
        expected: what the files are to be, and argument: which one gave them, for the error.
        text: of `names`, those that are text whatever their values look like.
    """
    import pyarrow

    parts: list[Any] = []
    files = []
    for path in paths:
        files.append((path, sum(part.num_rows for part in parts)))
        try:
            table = _READERS[path.suffix](path, text)
        except (pyarrow.ArrowException, OSError) as error:
            raise ValueError(f"{argument}: expected {expected}, got {path} that cannot be read: {error}.") from error
        missing = [name for name in names if name not in table.column_names]
        if missing:
            raise ValueError(
                f"{argument}: expected {expected}, got {path} with columns {', '.join(table.column_names)}. Say which "
                "of them it is with --data.label_column, --data.text_column or --data.image_column."
            )
        parts.append(table.select(list(names)))
    try:
        columns = pyarrow.concat_tables(parts, promote_options="permissive")
    except pyarrow.ArrowException as error:
        listed = ", ".join(str(path) for path, _ in files)
        raise ValueError(f"{argument}: expected the same columns in {listed}, got {error}.") from error
    return Table(columns, files)


def _read_parquet(path: Path, _text: Sequence[str]) -> Any:
    from pyarrow import parquet

    return parquet.read_table(path)


def _read_csv(path: Path, text: Sequence[str]) -> Any:
    import pyarrow
    from pyarrow import csv

    return csv.read_csv(
        path,
        parse_options=csv.ParseOptions(delimiter="\t" if path.suffix == ".tsv" else ",", newlines_in_values=True),
        convert_options=csv.ConvertOptions(column_types=dict.fromkeys(text, pyarrow.string())),
    )


def _read_json(path: Path, text: Sequence[str]) -> Any:
    import pyarrow
    from pyarrow import json as arrow_json

    schema = pyarrow.schema([(name, pyarrow.string()) for name in text])
    return arrow_json.read_json(
        path,
        read_options=arrow_json.ReadOptions(block_size=_JSON_BLOCK),
        parse_options=arrow_json.ParseOptions(explicit_schema=schema, newlines_in_values=True),
    )


_READERS = {
    ".parquet": _read_parquet,
    ".csv": _read_csv,
    ".tsv": _read_csv,
    ".jsonl": _read_json,
    ".json": _read_json,
}


class Classes:
    """What labels stand for: their classes are those of the training samples, in order.

    Args:
        labels: of the training samples: whole numbers, truth values or strings, all of one kind.
        names: of the classes 0, 1, ..., if they are known.
    """

    def __init__(self, table: Table, column: str) -> None:
        self.column = column
        self.names = table.class_names(column)
        if self.names:
            self._index: dict[Any, int] = {number: number for number in range(len(self.names))}
            return
        labels = table.columns[column].to_pylist()
        for row, label in enumerate(labels):
            if not isinstance(label, (str, int)) or label == "":
                raise ValueError(
                    f"data.label_column: expected whole numbers or words in {column}, got {label!r} in "
                    f"{table.where(row)}."
                )
        found = sorted(set(labels))
        if len(found) < 2:
            raise ValueError(f"data.label_column: expected two classes or more in {column}, got {found!r} alone.")
        self.names = [str(label) for label in found]
        self._index = {label: index for index, label in enumerate(found)}

    def of(self, table: Table) -> list[int]:
        """The classes of a table's samples."""
        labels = table.columns[self.column].to_pylist()
        for row, label in enumerate(labels):
            if label not in self._index:
                known = ", ".join(map(str, list(self._index)[:10])) + (", ..." if len(self._index) > 10 else "")
                raise ValueError(
                    f"data.label_column: expected a label of the training samples ({known}), got {label!r} in "
                    f"{table.where(row)}."
                )
        return [self._index[label] for label in labels]


def take(values: Sequence[Any], rows: Sequence[int]) -> list[Any]:
    """`values` of some rows."""
    return [values[row] for row in np.asarray(rows)]
