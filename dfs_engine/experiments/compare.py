"""`dfs compare`: rows under one recipe, run by run, each in a folder of its own; what has ended is not run again."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dfs_engine.checks import check_numbers, split_betas, split_choices
from dfs_engine.experiments.collect import collect, copy_records
from dfs_engine.experiments.report import Report, write_report
from dfs_engine.experiments.rows import Row, grid, read_rows
from dfs_engine.experiments.session import LR_FACTORS, Session
from dfs_engine.methods import list_methods
from dfs_engine.models import VARIANTS, list_models
from dfs_engine.training.config import TrainConfig


@dataclass(frozen=True, kw_only=True)
class ComparisonConfig:
    """How a list of rows is run."""

    output: Path | None = None
    """Folder of the runs (one each), the table and the pictures. The same command goes on with what is there."""
    seeds: int = 1
    """Runs of each row, with seeds from the recipe's on. A list of rows may say otherwise of one."""
    part: str = "1/1"
    """Which share of the runs this call trains: 1/3, 2/3, 3/3 on three machines, whose folders `--collect` merges."""
    lr_search: bool = False
    """Choose each row's learning rate from 0.3, 1 and 3 times its own: by the mean over the exits on the samples of
    data.val_fraction, with the first seed, whose run of the chosen one counts. Parts are then shares of the rows."""
    time_steps: int = 0
    """When all has run, time this many training steps of each row, in turns in one process, on synthetic batches.
    0: the table's times are those of the runs themselves, which other work on the machine disturbs."""

    def __post_init__(self) -> None:
        check_numbers(self, "", {">= 1": ("seeds",), ">= 0": ("time_steps",)})
        self.share()

    def share(self) -> tuple[int, int]:
        """(which, of how many), from 1."""
        which, slash, number = self.part.partition("/")
        if slash and which.isdecimal() and number.isdecimal() and 1 <= int(which) <= int(number):
            return int(which), int(number)
        raise ValueError(f"part: expected N/M with 1 <= N <= M, got {self.part!r}. The whole is 1/1.")


@dataclass(frozen=True, kw_only=True)
class CompareConfig(ComparisonConfig):
    """Which rows are compared: those of a list, or all combinations of what is given here."""

    rows: dict[str, Any] | str | None = None
    """YAML file of rows, or the name of one that comes with the package: NAME: {FLAG: VALUE, ...} with flags of
    `dfs train`, and `seeds: N`."""
    only: str = ""
    """Names of the rows to take of that list, comma-separated. Default: all."""
    methods: str = ""
    """Without rows: training methods, comma-separated. Default: joint."""
    variants: str = ""
    """Without rows: dense, dfs, detach, split, comma-separated. Default: dense,dfs."""
    models: str = ""
    """Without rows: models, comma-separated. Default: the recipe's."""
    betas: str = ""
    """Without rows: beta of the variants that split, comma-separated. Default: the recipe's."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("methods", "variants", "models", "betas"):
            if self.rows and getattr(self, name):
                raise ValueError(
                    f"{name}: expected none beside rows, got {getattr(self, name)}. Write such rows into that list, or "
                    "leave --rows out."
                )
        if self.only and not self.rows:
            raise ValueError(f"only: expected rows to choose from, got {self.only!r} alone. Give --rows too.")

    def chosen_rows(self) -> list[Row]:
        """Raises ValueError for a list that cannot be read, or names that are not known."""
        if not self.rows:
            return grid(
                split_choices("methods", self.methods or "joint", list_methods()),
                split_choices("variants", self.variants or "dense,dfs", VARIANTS),
                split_choices("models", self.models, list_models("*")) if self.models else (),
                split_betas("betas", self.betas) if self.betas else (),
            )
        rows = {row.name: row for row in read_rows(self.rows)}
        if not self.only:
            return list(rows.values())
        return [rows[name] for name in split_choices("only", self.only, rows)]


def run(config: CompareConfig, recipe: TrainConfig) -> Report:
    """Trains what is missing of the comparison, and writes its table and pictures.

    Raises:
        ValueError, FileNotFoundError: before anything is trained. training.signals.Interrupted: Ctrl-C or SIGTERM;
            the run of that moment saved first.
    """
    return compare(config.chosen_rows(), recipe, config)


def compare(rows: Sequence[Row], recipe: TrainConfig, config: ComparisonConfig) -> Report:
    """The same for rows that are given."""
    if config.output is None:
        raise ValueError("output: expected a folder, got none. Give --output FOLDER; the same command then goes on.")
    factors = LR_FACTORS if config.lr_search else ()
    session = Session(rows, recipe, config.output, seeds=config.seeds, lr_factors=factors, share=config.share())
    session.check()
    session.run()
    if config.time_steps:
        session.time_steps(config.time_steps)
    return write_report(collect([config.output]), config.output)


def merge(folders: Sequence[Path], output: Path | None) -> Report:
    """The table and pictures of what is in the folders of comparisons, and of their parts.

    Args:
        output: gets also a copy of each run's small files. Default: the folder, if it is one.

    Raises:
        ValueError, FileNotFoundError: see `collect`.
    """
    if output is None and len(folders) > 1:
        raise ValueError(f"output: expected a folder to merge {len(folders)} folders into, got none. Give --output.")
    collected = collect(folders)
    target = folders[0] if output is None else output
    copy_records(collected, target)
    return write_report(collected, target)
