"""A line of the table for each row: its runs' results as means and deviations."""

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, cast

from dfs_engine.experiments.collect import Collected, chosen_factor, exits_of, metric_of
from dfs_engine.experiments.record import Run


class Score(NamedTuple):
    """Mean and standard deviation over the seeds (of the sample, n - 1); of one seed no deviation."""

    mean: float
    deviation: float | None

    @classmethod
    def of(cls, values: Sequence[float]) -> "Score":
        return cls(statistics.mean(values), statistics.stdev(values) if len(values) > 1 else None)

    def __str__(self) -> str:
        return f"{self.mean:.2f}" if self.deviation is None else f"{self.mean:.2f} ± {self.deviation:.2f}"


@dataclass(frozen=True, kw_only=True)
class Summary:
    """Of the finished runs of one row, with the chosen learning rate."""

    row: str
    model: str
    """Its name, with what options it has."""
    metric: str
    runs: list[Run]
    tried_lrs: list[float]
    """Where one was chosen: all of them."""
    step_seconds: float | None
    """Of the interleaved timing."""
    step_memory_mib: float | None
    relative_time: float | None = None
    """To the row of the same model that has neither surgery nor a method."""

    @property
    def config(self) -> dict[str, Any]:
        return self.runs[0].config

    @property
    def num_exits(self) -> int:
        return exits_of(self.runs[0].epochs[-1])

    @property
    def lr(self) -> float:
        return self.config["optim"]["lr"]

    @property
    def operations(self) -> list[int]:
        """Of each exit; empty where they cannot be counted."""
        return self.runs[0].record.operations

    @property
    def outputs(self) -> list[str]:
        """exit1, ..., ensemble."""
        return [*(f"exit{index}" for index in range(1, self.num_exits + 1)), "ensemble"]

    @property
    def is_baseline(self) -> bool:
        return self.config["method"] == "joint" and self.config["model"]["variant"] == "dense"

    @property
    def epoch_seconds(self) -> float:
        """Of the training of an epoch: the median over epochs and runs."""
        return statistics.median(epoch["seconds"] for run in self.runs for epoch in run.epochs)

    @property
    def peak_memory_mib(self) -> float | None:
        peaks = [run.record.peak_memory_mib for run in self.runs if run.record.peak_memory_mib is not None]
        return max(peaks, default=None)

    def score(self, output: str, epoch: int = -1) -> Score:
        """On the test samples after an epoch, by its position.

        Args:
            output: one of `outputs`.
        """
        return Score.of([run.epochs[epoch][f"test_{self.metric}_{output}"] for run in self.runs])


class Missing(NamedTuple):
    """A run that the table does not show."""

    name: str
    why: str
    failed: bool = False


def summarise(collected: Collected) -> tuple[list[Summary], list[Missing]]:
    """The rows of the table, and the runs that are not in it."""
    summaries: list[Summary] = []
    missing: list[Missing] = []
    for row, seeds in collected.plan.rows.items():
        runs = collected.of_row(row)
        factors = [run for run in runs if run.record.lr_factor is not None]
        if factors:
            factor = chosen_factor(factors, collected.plan)
            if factor is None:
                missing.append(Missing(row, "its learning rate is not chosen yet, or nothing could be chosen from"))
                missing += _not_finished([run for run in factors if run.record.status != "diverged"])
                continue
            runs = [run for run in factors if run.record.lr_factor == factor]
        missing += _not_finished(runs)
        missing += _not_begun(row, seeds, runs)
        finished = [run for run in runs if run.record.status == "finished" and run.epochs]
        if finished:
            tried = sorted({run.config["optim"]["lr"] for run in factors if run.config})
            summaries.append(_summary(row, finished, tried, collected.step_times.get(row, {})))
    return [replace(summary, relative_time=_relative_time(summary, summaries)) for summary in summaries], missing


def _summary(row: str, finished: list[Run], tried: list[float], step_time: dict[str, float]) -> Summary:
    model = finished[0].config["model"]
    options = ", ".join(f"{name}={value}" for name, value in (model["options"] or {}).items())
    return Summary(
        row=row,
        model=f"{model['name']} ({options})" if options else model["name"],
        metric=metric_of(finished[0].epochs[-1]),
        runs=finished,
        tried_lrs=tried,
        step_seconds=step_time.get("median_seconds"),
        step_memory_mib=step_time.get("peak_memory_mib"),
    )


def steps_are_timed(summaries: Sequence[Summary]) -> bool:
    """Whether relative times are those of the interleaved timing: where all rows were in it."""
    return all(summary.step_seconds is not None for summary in summaries)


def _relative_time(summary: Summary, summaries: list[Summary]) -> float | None:
    baseline = next((other for other in summaries if other.is_baseline and other.model == summary.model), None)
    if baseline is None:
        return None
    if steps_are_timed(summaries):
        return cast(float, summary.step_seconds) / cast(float, baseline.step_seconds)
    return summary.epoch_seconds / baseline.epoch_seconds


def _not_finished(runs: list[Run]) -> Iterator[Missing]:
    for run in runs:
        if run.record.status in ("failed", "diverged"):
            yield Missing(run.record.name, f"{run.record.status}: {run.record.error}", failed=True)
        elif run.record.status == "running":
            total = run.config.get("epochs", "?")
            yield Missing(run.record.name, f"not finished: {len(run.epochs)} of {total} epochs are done")


def _not_begun(row: str, seeds: list[int], runs: list[Run]) -> Iterator[Missing]:
    there = {run.record.seed for run in runs}
    for seed in seeds:
        if seed not in there:
            yield Missing(f"{row}-seed{seed}", "not begun")
