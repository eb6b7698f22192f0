"""Measurements of `dfs bench train` and `dfs bench ops`, read back from their CSV files."""

import csv
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from .measure import CSV_COLUMNS

_BETA = re.compile(r"beta=([\d.]+)/")


@dataclass(frozen=True, slots=True)
class Subject:
    """What was measured: everything that two measurements must share to be the same one, but the metric."""

    suite: str
    model: str
    op: str
    variant: str
    backend_used: str
    dtype: str
    shape: str
    layout: str
    beta: float | None
    mode: str

    @property
    def batch_size(self) -> int:
        return int(self.shape.split("x")[0])


@dataclass(frozen=True, slots=True)
class Value:
    """A measurement: median, and the range that most rounds were in."""

    median: float
    p20: float
    p80: float


class Measurements(dict[Subject, dict[str, Value]]):
    """subject -> metric -> value. Of several runs in a file the last one counts."""

    device_name: str = ""
    num_threads: str = ""

    @classmethod
    def read(cls, path: Path) -> "Measurements":
        """Raises ValueError where `path` is no file of measurements."""
        found = cls()
        with path.open(newline="") as file:
            for row in csv.DictReader(file):
                try:
                    beta = _BETA.match(row["case"])
                    subject = Subject(
                        layout=row["case"].split("/")[-1],
                        beta=float(beta[1]) if beta else None,
                        # The kinds of a breakdown are metrics of one step.
                        op="" if row["metric"] == "breakdown" else row["op"],
                        **{name: row[name] for name in ("suite", "model", "variant", "backend_used", "dtype")},
                        **{name: row[name] for name in ("shape", "mode")},
                    )
                    median = float(row["median"])
                    value = Value(median, float(row["p20"] or median), float(row["p80"] or median))
                    metric = row["op"] if row["metric"] == "breakdown" else row["metric"]
                    found.device_name, found.num_threads = row["device_name"], row["num_threads"]
                except (KeyError, TypeError, ValueError) as error:
                    raise ValueError(
                        f"results: expected a CSV file of `dfs bench train` or `dfs bench ops`, got {path} ({error!r})."
                    ) from None
                found.setdefault(subject, {})[metric] = value
        return found

    def of(self, **wanted: object) -> "Measurements":
        """Those whose subject has these values."""
        kept = Measurements(
            (subject, values)
            for subject, values in self.items()
            if all(getattr(subject, name) == value for name, value in wanted.items())
        )
        kept.device_name, kept.num_threads = self.device_name, self.num_threads
        return kept

    def fastest(self, metric: str = "step") -> dict[str, Value] | None:
        """The metrics of the subject with the smallest median of `metric`: each method in its best form."""
        timed = [values for values in self.values() if metric in values]
        return min(timed, key=lambda values: values[metric].median) if timed else None

    def distinct(self, name: str) -> list:
        """Values of one field of the subjects, sorted, None left out."""
        return sorted({getattr(subject, name) for subject in self} - {None, ""})


def csv_files(paths: Iterable[Path]) -> list[Path]:
    """The files among `paths`, and the files of measurements in the folders among them.

    Raises:
        FileNotFoundError: there is none.
    """
    paths = list(paths)
    files = [file for path in paths for file in (_measurements_in(path) if path.is_dir() else [path])]
    missing = [str(path) for path in files if not path.is_file()]
    if missing or not files:
        places = ", ".join(missing or map(str, paths))
        raise FileNotFoundError(
            f"results: expected CSV files, got none at {places}. "
            "Write one with `dfs bench train --output FILE` or `dfs bench ops --output FILE`."
        )
    return files


def _measurements_in(folder: Path) -> list[Path]:
    """A folder of results may hold the metrics of training runs too."""

    def header(file: Path) -> list[str]:
        with file.open(newline="") as lines:
            return next(csv.reader(lines), [])

    return [file for file in sorted(folder.glob("*.csv")) if header(file) == list(CSV_COLUMNS)]
