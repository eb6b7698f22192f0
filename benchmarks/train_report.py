"""What `dfs bench train` found: as a table, as CSV rows, as JSON."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

from dfs_engine.benchmarks import markdown
from dfs_engine.benchmarks.breakdown import KINDS
from dfs_engine.benchmarks.measure import TOTAL, Environment, Stats, case_column, metric_rows
from dfs_engine.benchmarks.train_config import STOCK_VARIANTS, BenchTrainConfig, StepCase
from dfs_engine.evaluation.flops import FlopCount


class Baseline(NamedTuple):
    """What a ratio is against: the fastest case of these variants, whatever its layout and compile setting."""

    variants: tuple[str, ...]
    same_allocator: bool = False
    """False: on torch's own memory, as stock forms are run. True: the row's allocator serves them too."""


BASELINES = {
    "dense": Baseline(("dense",)),
    "detach, split": Baseline(("detach", "split")),
    "best stock": Baseline(STOCK_VARIANTS),
    "best stock, same allocator": Baseline(STOCK_VARIANTS, same_allocator=True),
    "byot": Baseline(("byot",)),
}
_PHASES = ("forward", "loss", "backward", "update", TOTAL)
_HEADER = (
    *("dtype", "batch", "variant", "beta", "backend", "layout", "mode", "n", *_PHASES, "peak", "GFLOP"),
    *(f"vs {name}" for name in BASELINES),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainRow:
    """One case in one dtype on batches of one shape.

    `peak_bytes` is beyond weights and optimizer state; FLOPs are of one step; `kernels` are seconds by kind of kernel.
    """

    dtype: str
    case: StepCase
    shape: tuple[int, ...]
    backend_used: str
    timings: dict[str, Stats]
    peak_bytes: int
    flops: FlopCount
    kernels: dict[str, float] = field(default_factory=dict)

    def is_comparable(self, other: "TrainRow") -> bool:
        """Timed in the same interleaving, and neither of them with another beta."""
        betas = {self.case.beta, other.case.beta} - {None}
        return (self.dtype, self.shape) == (other.dtype, other.shape) and len(betas) <= 1


class Ratio(NamedTuple):
    """How much faster a row's step is than a baseline's, and how much its FLOPs alone would make it."""

    baseline: str
    median: float
    min: float
    ceiling: float

    def __str__(self) -> str:
        return f"{self.median:.2f} / {self.min:.2f} ({self.ceiling:.2f})"


@dataclass(slots=True)
class TrainReport:
    """All rows of a run, slower ones included."""

    config: BenchTrainConfig
    stamp: Environment
    rows: list[TrainRow] = field(default_factory=list)
    loadavg_end: float = 0.0

    def ratios(self, row: TrainRow) -> list[Ratio | None]:
        """Against each of `BASELINES`; None where this run has no case of it."""
        result: list[Ratio | None] = []
        for variants, same_allocator in BASELINES.values():
            allocator = row.case.allocator if same_allocator else "stock"
            rivals = [
                rival
                for rival in self.rows
                if row.is_comparable(rival) and rival.case.variant in variants and rival.case.allocator == allocator
            ]
            if not rivals:
                result.append(None)
                continue
            best = min(rivals, key=lambda rival: rival.timings[TOTAL].median)
            step, fastest = row.timings[TOTAL], min(rival.timings[TOTAL].min for rival in rivals)
            ceiling = best.flops.total / row.flops.total
            result.append(Ratio(str(best.case), best.timings[TOTAL].median / step.median, fastest / step.min, ceiling))
        return result

    def table(self) -> str:
        """Markdown: conditions, then one row per case."""
        lines = [
            f"Training step of {self.config.model} on synthetic data, SGD with momentum, weight decay; cases "
            "interleaved.",
            *str(self.stamp).splitlines(),
            "Compared before: in float64 dfs by aten (no kernel computes in float64) with the plain formulation; every "
            "case, in its dtype, with float64.",
            f"Load average at the end {self.loadavg_end:.2f}. Times in ms, median / minimum of n. Peak: MiB beyond "
            "weights and optimizer state. Ratios: the baseline's best step over this one, medians / minima (and what "
            "FLOPs alone imply).",
            "",
            *markdown.table(_HEADER, map(self._cells, self.rows)),
            *self._breakdown(),
        ]
        return "\n".join(lines)

    def _cells(self, row: TrainRow) -> list[object]:
        beta = "-" if row.case.beta is None else f"{row.case.beta:g}"
        times = [f"{row.timings[phase].median * 1e3:.1f} / {row.timings[phase].min * 1e3:.1f}" for phase in _PHASES]
        ratios = ["-" if ratio is None else ratio for ratio in self.ratios(row)]
        return [
            row.dtype, _by(row.shape), row.case.variant, beta, row.backend_used, row.case.layout, row.case.mode,
            row.timings[TOTAL].n, *times, f"{row.peak_bytes / 2**20:.0f}", f"{row.flops.total / 1e9:.1f}", *ratios,
        ]  # fmt: skip

    def _breakdown(self) -> Iterator[str]:
        """Markdown: one column per profiled case."""
        rows = [row for row in self.rows if row.kernels]
        if not rows:
            return
        yield ""
        yield "One step by kind of kernel, in ms and % of what the profiler saw (which slows a step a little)."
        yield ""
        totals = [sum(row.kernels.values()) for row in rows]
        parts = {
            kind: [row.kernels.get(kind, 0.0) for row in rows]
            for kind in KINDS
            if any(kind in row.kernels for row in rows)
        }
        cells = [
            (kind, *(f"{part * 1e3:.2f} ({part / total:.0%})" for part, total in zip(seconds, totals, strict=True)))
            for kind, seconds in parts.items()
        ]
        names = (f"{row.case}, {row.dtype}, {_by(row.shape)}" for row in rows)
        yield from markdown.table(("kernels", *names), [*cells, ("all", *(f"{total * 1e3:.2f}" for total in totals))])

    def csv_rows(self, timed: list[TrainRow]) -> list[dict[str, Any]]:
        """One row per measurement, for `append_csv`."""
        rows = []
        for row in timed:
            key = {
                "suite": "train", "case": case_column(row.case.layout, row.case.beta), "model": self.config.model,
                "mode": row.case.mode, "variant": row.case.variant, "backend_used": row.backend_used,
                "dtype": row.dtype, "shape": _by(row.shape),
            }  # fmt: skip
            counts = {
                "peak_memory": (row.peak_bytes, "B"),
                "flops_forward": (row.flops.forward, "FLOP"),
                "flops_backward": (row.flops.backward, "FLOP"),
            }
            rows += metric_rows(key, row.timings, counts)
            for kind, seconds in row.kernels.items():
                rows += metric_rows(key | {"op": kind}, {"breakdown": Stats.of([seconds])})
        return rows

    def to_json(self) -> dict[str, Any]:
        """JSON-able values."""
        rows = [
            {
                "dtype": row.dtype,
                **row.case._asdict(),
                "shape": row.shape,
                "backend_used": row.backend_used,
                "seconds": {phase: asdict(stats) for phase, stats in row.timings.items()},
                "peak_bytes": row.peak_bytes,
                "flops": asdict(row.flops),
                "kernels": row.kernels,
                "ratios": {
                    name: None if ratio is None else ratio._asdict()
                    for name, ratio in zip(BASELINES, self.ratios(row), strict=True)
                },
            }
            for row in self.rows
        ]
        return {
            "config": asdict(self.config),
            "data": "synthetic",
            "environment": asdict(self.stamp),
            "loadavg_end": self.loadavg_end,
            "rows": rows,
        }


def _by(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))
