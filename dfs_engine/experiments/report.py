"""What a comparison leaves behind: results.md, results.csv and pictures."""

import csv
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dfs_engine.experiments.collect import Collected
from dfs_engine.experiments.pictures import draw_all
from dfs_engine.experiments.summary import Missing, Summary, summarise
from dfs_engine.experiments.table import cells, csv_rows, headings, markdown
from dfs_engine.runtime.files import atomic_file, write_text


@dataclass(frozen=True)
class Report:
    """The results that there are."""

    folder: Path
    summaries: list[Summary]
    missing: list[Missing]
    files: list[Path]

    @property
    def ok(self) -> bool:
        """Whether no run failed."""
        return not any(run.failed for run in self.missing)

    def tables(self) -> list[tuple[str, list[str], list[list[str]]]]:
        """(title, headings, rows) for each model; the accuracies and times of results.md, for a terminal."""
        models = dict.fromkeys(summary.model for summary in self.summaries)
        found = []
        for model in models:
            rows = [summary for summary in self.summaries if summary.model == model]
            num_exits = max(row.num_exits for row in rows)
            lines = [headings(rows), *(cells(row, num_exits) for row in rows)]
            narrow = [[cell.replace(" ± ", "\n± ") for cell in [*line[: num_exits + 3], line[-3]]] for line in lines]
            found.append((model, narrow[0], narrow[1:]))
        return found

    def to_json(self) -> dict[str, Any]:
        """JSON-able: the lines of results.csv, and what is not among them."""
        rows = csv_rows(self.summaries) if self.summaries else []
        return {"rows": rows, "missing": [run._asdict() for run in self.missing], "folder": str(self.folder)}


def write_report(collected: Collected, folder: Path) -> Report:
    """Writes the table and the pictures of all finished runs into `folder`."""
    summaries, missing = summarise(collected)
    files = [folder / "results.md"]
    if summaries:
        files += [folder / "results.csv", *draw_all(summaries, folder)]
        _write_csv(folder / "results.csv", csv_rows(summaries))
    pictures = [file.name for file in files if file.suffix == ".png"]
    write_text(files[0], "\n".join(markdown(summaries, missing, pictures)))
    return Report(folder, summaries, missing, files)


def _write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    columns = list(dict.fromkeys(name for row in rows for name in row))  # of every metric
    with atomic_file(path) as partial, partial.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)
