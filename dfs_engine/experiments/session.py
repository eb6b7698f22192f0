"""A comparison at work: which runs are to be trained, one after the other, and how long the rest will take."""

import contextlib
import logging
import signal
import statistics
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dfs_engine.data import load_data
from dfs_engine.experiments.collect import STEP_TIME_FILE, Plan, check_one_recipe, check_unchanged, chosen_factor
from dfs_engine.experiments.process import LOG_FILE, RunProcess
from dfs_engine.experiments.record import METRICS_FILE, Outcome, Record, read_csv, read_record, read_run, read_runs
from dfs_engine.experiments.rows import Row, values_of
from dfs_engine.training.build import build_method, build_model, input_shape
from dfs_engine.training.config import TrainConfig
from dfs_engine.training.signals import Interrupted

logger = logging.getLogger(__name__)

LR_FACTORS = (0.3, 1.0, 3.0)
_POLL_SECONDS = 0.5


@dataclass(frozen=True)
class _Planned:
    """A run that is to be there in the end."""

    record: Record
    config: TrainConfig
    key: str
    """What it is called while its learning rate may not be known yet."""

    @property
    def folder(self) -> Path:
        assert self.config.run_dir is not None
        return self.config.run_dir


class Session:
    """Trains the runs of a comparison that have not ended yet.

    Args:
        rows, recipe: see `Row.config`.
        output: folder of the runs' folders.
        seeds: runs of each row that does not say otherwise.
        lr_factors: of the learning rate, between which each row's is chosen; none: it is the row's own.
        share: (which, of how many) of the runs are this call's; where a learning rate is chosen, of the rows.
    """

    def __init__(
        self,
        rows: Sequence[Row],
        recipe: TrainConfig,
        output: Path,
        *,
        seeds: int = 1,
        lr_factors: Sequence[float] = (),
        share: tuple[int, int] = (1, 1),
    ) -> None:
        self.recipe, self.output, self.share = recipe, output, share
        self.rows = {row.name: row for row in rows}
        if len(self.rows) < len(rows):
            raise ValueError(f"rows: expected each name once, got {', '.join(row.name for row in rows)}.")
        first = recipe.seed
        names = {row.name: list(range(first, first + (row.num_seeds or seeds))) for row in rows}
        self.plan = Plan(names, list(lr_factors))
        self._configs = {name: row.config(recipe) for name, row in self.rows.items()}
        self._work = _Work()

    def check(self) -> None:
        """Raises ValueError or FileNotFoundError for whatever would make a run fail at its start, before any does."""
        for name, config in self._configs.items():
            try:
                build_method(config, build_model(config.model, 10, device="meta"))
            except (ValueError, TypeError) as error:
                raise ValueError(f"rows: {name}: {error} Or leave this row out.") from None
            if self.plan.lr_factors and config.data.val_fraction == 0:
                raise ValueError(
                    f"lr_search: expected data.val_fraction > 0, got 0 in {name}: a learning rate must not be chosen "
                    "on the test samples. Add --data.val_fraction 0.1."
                )
        planned = [run for name in self.rows for run in [*self._first_runs(name), *self._other_runs(name)]]
        for run in planned:
            found = read_run(run.folder)
            if found is not None:
                check_unchanged(found, run.config)
        if self.output.is_dir():
            check_one_recipe(read_runs(self.output))
        if any(not self._has_ended(run) for run in planned):
            config = next(iter(self._configs.values()))
            load_data(config.data, input_shape=input_shape(config.model))  # raises for what every run would

    def run(self) -> None:
        """Trains what is this call's share; a run that fails is named, and the others go on.

        Raises:
            Interrupted: Ctrl-C or SIGTERM.
        """
        self._kept_plan().write(self.output)
        mine = self._share_of(list(self.rows)) if self.plan.lr_factors else list(self.rows)
        first = [run for name in mine for run in self._first_runs(name)]
        # Seed by seed, so that there is a whole table early.
        others = sorted((run for name in mine for run in self._other_runs(name)), key=lambda run: run.record.seed)
        if not self.plan.lr_factors:
            first, others = self._share_of([*first, *others]), []
        with self._work.shown([*first, *others], self._configs), self._work.signals():
            for run in first:
                self._train(run)
            for run in others:
                chosen = self._with_chosen_lr(run)
                if chosen is not None:
                    self._train(chosen)

    def _kept_plan(self) -> Plan:
        """With rows of earlier calls that have runs in the folder."""
        before = Plan.read(self.output)
        there = {run.record.row for run in read_runs(self.output)} if self.output.is_dir() else set()
        kept = {name: seeds for name, seeds in before.rows.items() if name in there}
        return Plan(kept, []).with_more(self.plan)

    def _share_of(self, items: list[Any]) -> list[Any]:
        which, number = self.share
        return items[which - 1 :: number]

    def _first_runs(self, row: str) -> list[_Planned]:
        """With the first seed: one, or one for each learning rate."""
        seed = self.plan.rows[row][0]
        factors: list[float | None] = [*self.plan.lr_factors] or [None]
        return [self._planned(row, seed, factor, is_first=True) for factor in factors]

    def _other_runs(self, row: str) -> list[_Planned]:
        """With the other seeds; the learning rate is that of the chosen factor, once it is known."""
        factor = None
        if self.plan.lr_factors:
            factor = self._chosen_factor(row) or self.plan.lr_factors[0]
        return [self._planned(row, seed, factor) for seed in self.plan.rows[row][1:]]

    def _chosen_factor(self, row: str) -> float | None:
        found = (read_run(run.folder) for run in self._first_runs(row))
        return chosen_factor([run for run in found if run is not None], self.plan)

    def _planned(self, row: str, seed: int, factor: float | None, is_first: bool = False) -> _Planned:
        config = self._configs[row]
        record = Record(row=row, seed=seed, flags=values_of(config, self.rows[row].flags), lr_factor=factor)
        optim = config.optim if factor is None else replace(config.optim, lr=float(f"{config.optim.lr * factor:.6g}"))
        run_dir = self.output / record.name
        key = record.name if is_first else f"{row}-seed{seed}"
        return _Planned(record, replace(config, optim=optim, seed=seed, run_dir=run_dir, resume=False), key)

    def _with_chosen_lr(self, run: _Planned) -> _Planned | None:
        row = run.record.row
        if not self.plan.lr_factors:
            return run
        factor = self._chosen_factor(row)
        if factor is None:
            logger.warning("%s: seed %d is not run: no learning rate could be chosen", row, run.record.seed)
            self._work.drop(run)
            return None
        return self._planned(row, run.record.seed, factor)

    def _has_ended(self, run: _Planned) -> bool:
        record = read_record(run.folder)
        return record is not None and record.has_ended

    def _train(self, run: _Planned) -> None:
        record = read_record(run.folder) or run.record
        if record.has_ended:
            self._work.skip(run)
            return
        record = replace(record, status="running", error="")
        record.write(run.folder)
        outcome = self._work.do(run)
        record.ended(outcome).write(run.folder)
        self._work.told(run, outcome)

    def time_steps(self, rounds: int) -> None:
        """Times a training step of every row, in turns, and writes step_time.csv."""
        from dfs_engine.experiments.step_time import time_steps
        from dfs_engine.training.report import write_csv

        config = next(iter(self._configs.values()))
        data = load_data(config.data, input_shape=input_shape(config.model))
        write_csv(self.output / STEP_TIME_FILE, time_steps(self._configs, data, rounds))


class _Work:
    """The run of the moment: its process, the signals that end it, the progress bar and the time that is left."""

    def __init__(self) -> None:
        self._process: RunProcess | None = None
        self._signum: int | None = None
        self._left: dict[str, tuple[str, int]] = {}  # key of a run -> row, epochs
        self._seconds: dict[str, float] = {}  # row -> of an epoch, with its evaluation, in its last run
        self._bar: Any = None

    @contextlib.contextmanager
    def shown(self, runs: Sequence[_Planned], configs: dict[str, TrainConfig]) -> Iterator[None]:
        """A progress bar over all epochs of `runs`, in a terminal."""
        from tqdm import tqdm

        self._left = {run.key: (run.record.row, run.config.epochs) for run in runs}
        self._total = len(self._left)
        enabled = any(config.progress for config in configs.values())
        total = sum(epochs for _, epochs in self._left.values())
        form = "{desc} {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} epochs{postfix}"
        with tqdm(total=total, bar_format=form, disable=None if enabled else True) as self._bar:
            yield

    @contextlib.contextmanager
    def signals(self) -> Iterator[None]:
        """Hands Ctrl-C and SIGTERM on to the run, which saves and ends."""
        before = {}
        if threading.current_thread() is threading.main_thread():
            for signum in (signal.SIGINT, signal.SIGTERM):
                if signal.getsignal(signum) is not signal.SIG_IGN:
                    before[signum] = signal.signal(signum, self._receive)
        try:
            yield
        finally:
            for signum, handler in before.items():
                signal.signal(signum, handler)

    def _receive(self, signum: int, _frame: Any) -> None:
        if self._signum is None:
            logger.warning("%s: the run saves, then all stops. Once more: at once.", signal.Signals(signum).name)
        self._signum = signum
        if self._process is not None:
            self._process.stop()

    def skip(self, run: _Planned) -> None:
        """It had ended before this call."""
        rows = read_csv(run.folder / METRICS_FILE)
        if rows:
            self._seconds[run.record.row] = statistics.median(row["seconds"] for row in rows)
        self.drop(run)

    def drop(self, run: _Planned) -> None:
        """It is not to be run any more."""
        self._advance(run.key, 0)
        self._left.pop(run.key, None)

    def do(self, run: _Planned) -> Outcome:
        """Trains it in a process of its own.

        Raises:
            Interrupted: a signal came before it could begin.
        """
        self._raise_if_asked()
        begun, began = _num_epochs(run.folder), time.perf_counter()
        self._process = RunProcess(run.config)
        if self._signum is not None:  # it came while the process started
            self._process.stop()
        try:
            while (outcome := self._process.wait(_POLL_SECONDS)) is None:
                done = _num_epochs(run.folder)
                if done > begun:
                    self._seconds[run.record.row] = (time.perf_counter() - began) / (done - begun)
                self._advance(run.key, run.config.epochs - done)
        finally:
            self._process = None
        if self._signum is not None and outcome.status == "failed":  # a signal before it could catch one
            return Outcome(status="stopped")
        return outcome

    def told(self, run: _Planned, outcome: Outcome) -> None:
        """Says how it ended, and how much is left. Raises Interrupted after a signal."""
        if outcome.status != "stopped":
            self.drop(run)
            where = "" if outcome.status in ("finished", "busy") else f"; see {run.folder / LOG_FILE}"
            level = logging.INFO if outcome.status == "finished" else logging.WARNING
            said = f": {outcome.error}" if outcome.error else ""
            logger.log(level, "%s: %s%s%s", run.record.name, outcome.status, said, where)
            logger.info("%d of %d runs done%s", self._total - len(self._left), self._total, self._estimate())
        self._raise_if_asked()

    def _raise_if_asked(self) -> None:
        if self._signum is not None:
            raise Interrupted(
                self._signum,
                f"stopped by {signal.Signals(self._signum).name} with {len(self._left)} of {self._total} runs to do. "
                "The same command goes on.",
            )

    def _advance(self, key: str, epochs_left: int) -> None:
        row, before = self._left.get(key, ("", epochs_left))
        if key in self._left:
            self._left[key] = row, epochs_left
        if self._bar is not None:
            self._bar.update(before - epochs_left)
            self._bar.set_description_str(f"{self._total - len(self._left) + 1}/{self._total} {key}", refresh=False)
            self._bar.set_postfix_str(self._estimate().lstrip(", "))

    def _estimate(self) -> str:
        """From the seconds of an epoch: of the same row's last run, or the mean of all rows' that have run."""
        if not self._seconds or not self._left:
            return ""
        mean = statistics.mean(self._seconds.values())
        seconds = sum(self._seconds.get(row, mean) * epochs for row, epochs in self._left.values())
        return f", about {duration(seconds)} left"


def _num_epochs(folder: Path) -> int:
    with contextlib.suppress(ValueError):
        return len(read_csv(folder / METRICS_FILE))
    return 0


def duration(seconds: float) -> str:
    """In words: 40 s, 12 min, 3 h 20 min."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02d} min"
