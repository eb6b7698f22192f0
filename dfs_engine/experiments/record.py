"""What the folder of a comparison's run keeps of it: run.yaml, beside what `dfs train` writes there."""

import csv
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from dfs_engine.runtime.files import write_text
from dfs_engine.training.run_folder import ENVIRONMENT_FILE

RECORD_FILE = "run.yaml"
CONFIG_FILE = "config.yaml"
METRICS_FILE = "metrics.csv"
BUDGET_FILE = "budget.csv"
STATUSES = ("running", "finished", "diverged", "failed")
"""Of which `running` is also what was stopped, and goes on with the next call."""


@dataclass(frozen=True, kw_only=True)
class Record:
    """One run of a comparison."""

    row: str
    seed: int
    flags: dict[str, Any] = field(default_factory=dict)
    """By which the row parts from the recipe."""
    lr_factor: float | None = None
    """By which the learning rate was multiplied, where it is searched for."""
    status: str = "running"
    """One of `STATUSES`."""
    error: str = ""
    """Why it failed or diverged."""
    operations: list[int] = field(default_factory=list)
    """Of each exit, for one sample, with all that has run by then."""
    parameters: list[int] = field(default_factory=list)
    """The same of the weights."""
    peak_memory_mib: float | None = None
    """Of the process on a CPU; of torch's allocator on a GPU."""

    @property
    def name(self) -> str:
        """Of its folder."""
        factor = "" if self.lr_factor is None else f"-lrx{self.lr_factor:g}"
        return f"{self.row}{factor}-seed{self.seed}"

    @property
    def has_ended(self) -> bool:
        """A run that diverged would do so again."""
        return self.status in ("finished", "diverged")

    def ended(self, outcome: "Outcome") -> "Record":
        """With what its process told; one that another process writes is left as it is."""
        if outcome.status == "busy":
            return self
        status = "running" if outcome.status == "stopped" else outcome.status
        peaks = [peak for peak in (self.peak_memory_mib, outcome.peak_memory_mib) if peak is not None]
        told: dict[str, Any] = {"operations": outcome.operations, "parameters": outcome.parameters}
        return replace(
            self,
            status=status,
            error=outcome.error,
            peak_memory_mib=max(peaks, default=None),
            **{name: value for name, value in told.items() if value},
        )

    def write(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / RECORD_FILE, yaml.safe_dump(asdict(self), sort_keys=False))


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a run's process ended."""

    status: str
    """finished, diverged, failed; stopped: it goes on with the next call; busy: another process writes there."""
    error: str = ""
    operations: list[int] = field(default_factory=list)
    parameters: list[int] = field(default_factory=list)
    peak_memory_mib: float | None = None


class Run(NamedTuple):
    """A run's folder, read."""

    folder: Path
    record: Record
    config: dict[str, Any]
    """As `TrainConfig.to_dict`; empty where the run did not get so far."""
    environment: dict[str, Any]
    epochs: list[dict[str, float]]
    """The lines of metrics.csv."""
    budget: list[dict[str, float]]
    """The lines of budget.csv."""


def read_record(folder: Path) -> Record | None:
    """None where no comparison wrote to the folder.

    Raises:
        ValueError: its run.yaml is damaged.
    """
    path = folder / RECORD_FILE
    if not path.is_file():
        return None
    saved = read_yaml(path)
    known = {item.name for item in fields(Record)}
    if not {"row", "seed"} <= saved.keys() or saved.get("status") not in STATUSES:
        raise ValueError(f"run: expected {path} as a comparison writes it, got another. Remove {folder} to run anew.")
    return Record(**{name: value for name, value in saved.items() if name in known})


def read_run(folder: Path) -> Run | None:
    """None where no comparison wrote to the folder. Raises ValueError for a damaged file."""
    record = read_record(folder)
    if record is None:
        return None
    config, environment = read_yaml(folder / CONFIG_FILE), read_yaml(folder / ENVIRONMENT_FILE)
    return Run(folder, record, config, environment, read_csv(folder / METRICS_FILE), read_csv(folder / BUDGET_FILE))


def read_runs(folder: Path) -> list[Run]:
    """All runs in the folder of a comparison."""
    found = (read_run(path) for path in sorted(folder.iterdir()) if path.is_dir())
    return [run for run in found if run is not None]


def read_yaml(path: Path) -> dict[str, Any]:
    """Empty where there is no file. Raises ValueError for one that is damaged."""
    if not path.is_file():
        return {}
    try:
        values = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"run: expected YAML in {path}, got: {' '.join(str(error).split())}") from None
    return values if isinstance(values, dict) else {}


def read_csv(path: Path, text: tuple[str, ...] = ()) -> list[dict[str, Any]]:
    """Lines of numbers, by column, but for columns of `text`; none where there is no file.

    Raises:
        ValueError: something else than numbers.
    """
    if not path.is_file():
        return []
    with path.open(newline="") as file:
        try:
            return [
                {name: value if name in text else float(value) for name, value in line.items()}
                for line in csv.DictReader(file)
            ]
        except (TypeError, ValueError):
            raise ValueError(f"run: expected lines of numbers in {path}. Restore it, or run anew.") from None
