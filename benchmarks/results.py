"""What the benchmarks measure: as they report it, and as it is written to CSV files and read back."""

import re
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from dfs_engine.benchmarks.measure import CSV_COLUMNS, TOTAL, Stats, read_csv
from dfs_engine.benchmarks.train_config import PLAIN_ATTENTION, STOCK_VARIANTS

_BETA = re.compile(r"beta=([\d.]+)/")
_KEY = ("suite", "model", "op", "variant", "backend_used", "dtype", "shape", "mode")
# Of what is not in seconds, as metrics' names begin.
_UNITS = {
    "flops": "FLOP", "bytes": "B", "peak_memory": "B", "automatic": "bool", "speedup": "x", "speed_products": "FLOP/s",
    "speed_copy": "B/s", "throughput": "1/s", "operations": "op", "accuracy": "share", "share": "share",
}  # fmt: skip
# The metric of a step's limit (`attainable.py`), in seconds, which nobody timed.
LIMIT = "attainable"
_STAMP = ("timestamp_utc", "git_sha", "dirty", "device_name", "num_threads", "loadavg", "torch")


def _unit(metric: str) -> str:
    return next((unit for start, unit in _UNITS.items() if metric.startswith(start)), "s")


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """One case on one shape, and all that was measured of it.

    Attributes:
        beta: None where nothing is split.
        metrics: seconds of each phase, FLOPs, bytes, ...
        kernels: seconds by kind of kernel, where a step was profiled.
        num_live: input channels with gradient, of a single op.
        stamp: of what was read: the run's machine and versions, by the names of the columns.
    """

    suite: str
    model: str
    op: str = ""
    variant: str
    backend_used: str
    dtype: str
    shape: str
    mode: str
    layout: str
    beta: float | None
    metrics: dict[str, Stats] = field(default_factory=dict)
    kernels: dict[str, float] = field(default_factory=dict)
    num_live: int | None = None
    stamp: dict[str, str] = field(default_factory=dict)

    def __getitem__(self, metric: str) -> Stats:
        return self.metrics[metric]

    def __contains__(self, metric: str) -> bool:
        return metric in self.metrics

    @property
    def batch_size(self) -> int:
        return int(self.shape.split("x")[0])

    @property
    def allocator(self) -> str:
        return "caching" if self.mode.endswith(", caching") else "stock"

    @property
    def attention(self) -> str:
        """Of the stock forms of a transformer: "fused", their default, or "plain"."""
        return "plain" if PLAIN_ATTENTION in self.mode else "fused"

    @property
    def path(self) -> str:
        """What computed it: this engine's backend, or the name of the stock form."""
        return self.backend_used if self.variant == "dfs" else self.variant

    @property
    def is_automatic(self) -> bool:
        """Whether it is a backend that `auto` takes."""
        return "automatic" in self and self["automatic"].median == 1

    @property
    def timings(self) -> dict[str, Stats]:
        """The metrics that were timed."""
        return {metric: stats for metric, stats in self.metrics.items() if _unit(metric) == "s" and metric != LIMIT}

    def flops_of(self, phase: str) -> float:
        """0 where nothing counts as arithmetic."""
        return self[f"flops_{phase}"].median if f"flops_{phase}" in self else 0

    @property
    def flops(self) -> float:
        """Of a training step."""
        return self.flops_of("forward") + self.flops_of("backward")

    @property
    def limit(self) -> str:
        """The attainable limit in ms, and the share of it that the median step reaches; "-" where there is none."""
        if LIMIT not in self:
            return "-"
        seconds = self[LIMIT].median
        return f"{seconds * 1e3:.0f} ({seconds / self[TOTAL].median:.2f})"

    def csv_rows(self) -> Iterator[dict[str, Any]]:
        """One row per metric and kind of kernel, for `append_csv`."""
        case = self.layout if self.beta is None else f"beta={self.beta:g}/{self.layout}"
        key: dict[str, Any] = {name: getattr(self, name) for name in _KEY} | {"case": case}
        if self.num_live is not None:
            key |= {"start": 0, "stop": self.num_live}
        for metric, stats in self.metrics.items():
            yield key | {"metric": metric, "unit": _unit(metric)} | asdict(stats)
        for kind, seconds in self.kernels.items():
            yield key | {"op": kind, "metric": "breakdown", "unit": "s"} | asdict(Stats.of([seconds]))

    @property
    def conditions(self) -> str:
        """Machine, threads, version, load and revision, in words."""
        stamp = self.stamp
        return (
            f"{stamp['device_name']}, {stamp['num_threads']} threads, torch {stamp['torch']}, load average "
            f"{stamp['loadavg']} at the start, revision {stamp['git_sha'][:9]}"
            f"{' with changes' if stamp['dirty'] == 'True' else ''}; synthetic data"
        )


class Measurements(list[Measurement]):
    """Some of them, in order."""

    @classmethod
    def read(cls, path: Path) -> "Measurements":
        """Of each dtype and shape in a file the newest run, because only what was interleaved may be compared.

        Empty where there is no file.

        Raises:
            ValueError: it is no file of measurements.
        """
        rows = read_csv(path)
        try:
            newest: dict[tuple[str, str], str] = {}
            for row in rows:
                run = (row["dtype"], row["shape"])
                newest[run] = max(newest.get(run, ""), row["timestamp_utc"])
            found: dict[tuple[str, ...], Measurement] = {}
            for row in rows:
                if row["timestamp_utc"] == newest[row["dtype"], row["shape"]]:
                    _add(found, row)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"results: expected a CSV file of `dfs bench train` or `dfs bench ops`, got {path} ({error!r})."
            ) from None
        return cls(found.values())

    def of(self, **wanted: object) -> "Measurements":
        """Those whose attributes have these values; of a tuple, any of its values."""
        return Measurements(
            one
            for one in self
            if all(
                getattr(one, name) in value if isinstance(value, tuple) else getattr(one, name) == value
                for name, value in wanted.items()
            )
        )

    def ranked(self, metric: str = TOTAL) -> "Measurements":
        """Those that have the metric, the fastest first."""
        return Measurements(sorted((one for one in self if metric in one), key=lambda one: one[metric].median))

    def fastest(self, metric: str = TOTAL) -> Measurement | None:
        """The one with the smallest median of `metric`: each method in its best form."""
        return next(iter(self.ranked(metric)), None)

    def csv_rows(self) -> list[dict[str, Any]]:
        """For `append_csv`."""
        return [row for one in self for row in one.csv_rows()]

    def distinct(self, name: str) -> list:
        """Values of one attribute, sorted, None left out."""
        return sorted({getattr(one, name) for one in self} - {None, ""})


def _add(found: dict[tuple[str, ...], Measurement], row: dict[str, str]) -> None:
    profiled = row["metric"] == "breakdown"
    # The kinds of a breakdown belong to one step.
    values: dict[str, Any] = {name: "" if profiled and name == "op" else row[name] for name in _KEY}
    key = (*values.values(), row["case"])
    if key not in found:
        beta = _BETA.match(row["case"])
        found[key] = Measurement(
            **values,
            layout=row["case"].split("/")[-1],
            beta=float(beta[1]) if beta else None,
            stamp={name: row[name] for name in _STAMP},
            num_live=int(row["stop"]) if row["stop"] else None,
        )
    median = float(row["median"])
    if profiled:
        found[key].kernels[row["op"]] = median
    else:
        low, p20, p80 = (float(row[name] or median) for name in ("min", "p20", "p80"))
        found[key].metrics[row["metric"]] = Stats(median, low, p20, p80, n=int(row["n"] or 1))


def losses(
    found: Measurements, rivals: tuple[str, ...], phases: Iterable[str] = (TOTAL,)
) -> Iterator[tuple[Measurement, Measurement, str]]:
    """(automatic choice, what beat it, phase) where it is slower beyond noise (p20 above p80) in the same layout."""
    for own in found.of(is_automatic=True):
        same = found.of(dtype=own.dtype, op=own.op, model=own.model, shape=own.shape, layout=own.layout)
        for rival in same.of(path=rivals, beta=(None, own.beta)):
            for phase in phases:
                if rival.path != own.path and own[phase].p20 > rival[phase].p80:
                    yield own, rival, phase


class StepRatio(NamedTuple):
    """The fastest `dfs` step against the fastest of its rivals on PyTorch's own memory."""

    ours: Measurement
    best: Measurement
    median: float
    min: float
    flops: float
    """What FLOPs alone imply."""
    one_allocator: float
    """As `median`, with the rivals on the memory of `ours`."""


def compare_steps(found: Measurements, rivals: tuple[str, ...] = STOCK_VARIANTS) -> StepRatio | None:
    """None where one of the steps compared is missing."""
    ours = found.of(variant="dfs").fastest()
    rivals_on_stock = found.of(variant=rivals, allocator="stock").ranked()
    same = found.of(variant=rivals, allocator=ours.allocator).fastest() if ours else None
    if ours is None or not rivals_on_stock or same is None:
        return None
    best = rivals_on_stock[0]
    return StepRatio(
        ours,
        best,
        median=best[TOTAL].median / ours[TOTAL].median,
        min=min(one[TOTAL].min for one in rivals_on_stock) / ours[TOTAL].min,
        flops=best.flops / ours.flops,
        one_allocator=same[TOTAL].median / ours[TOTAL].median,
    )


def compare_file(path: Path) -> StepRatio:
    """Of a file of steps in one dtype.

    Raises:
        ValueError: one of the steps compared is missing.
    """
    ratio = compare_steps(Measurements.read(path))
    if ratio is None:
        raise ValueError(f"results: expected dfs, and stock forms on both allocators, in {path}.")
    return ratio


def csv_files(path: Path) -> list[Path]:
    """A file, or the files of measurements in a folder, which may hold the metrics of training runs too.

    Raises:
        FileNotFoundError: there is none.
    """
    files = sorted(path.glob("*.csv")) if path.is_dir() else [path] * path.is_file()
    files = [file for file in files if file == path or [*CSV_COLUMNS] in map(list, read_csv(file)[:1])]
    if not files:
        raise FileNotFoundError(
            f"results: expected CSV files, got none at {path}. "
            "Write one with `dfs bench train --output FILE` or `dfs bench ops --output FILE`."
        )
    return files
