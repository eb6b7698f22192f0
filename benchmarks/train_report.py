"""What `dfs bench train` found: as a table, as JSON."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

from dfs_engine.benchmarks import markdown
from dfs_engine.benchmarks.breakdown import KINDS
from dfs_engine.benchmarks.measure import TOTAL, Environment
from dfs_engine.benchmarks.results import LIMIT, Measurement, Measurements
from dfs_engine.benchmarks.train_config import (
    COMPILE_OF_MODE,
    PLAIN_ATTENTION,
    STOCK_VARIANTS,
    BenchTrainConfig,
    StepCase,
)


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
    *("dtype", "batch", "variant", "beta", "backend", "layout", "mode", "n", *_PHASES, "peak", "GFLOP", "limit"),
    *(f"vs {name}" for name in BASELINES),
)


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
    rows: Measurements = field(default_factory=Measurements)
    loadavg_end: float = 0.0

    def ratios(self, row: Measurement) -> list[Ratio | None]:
        """Against each of `BASELINES`; None where this run has no case of it."""
        same = self.rows.of(dtype=row.dtype, shape=row.shape)
        if row.beta is not None:
            same = same.of(beta=(None, row.beta))
        result: list[Ratio | None] = []
        for variants, same_allocator in BASELINES.values():
            rivals = same.of(variant=variants, allocator=row.allocator if same_allocator else "stock").ranked()
            if not rivals:
                result.append(None)
                continue
            best, step = rivals[0], row[TOTAL]
            median, least = best[TOTAL].median / step.median, min(one[TOTAL].min for one in rivals) / step.min
            result.append(Ratio(str(case_of(best)), median, least, best.flops / row.flops))
        return result

    def table(self) -> str:
        """Markdown: conditions, then one row per case."""
        dropout = "at the model's own rates, compared without" if self.config.dropout else "off"
        lines = [
            f"Training step of {self.config.model} on synthetic data, SGD with momentum, weight decay; cases "
            "interleaved.",
            *str(self.stamp).splitlines(),
            f"Dropout {dropout}.",
            "Compared before: in float64 dfs by aten (no kernel computes in float64) with the plain formulation; every "
            "case, in its dtype, with float64.",
            f"Load average at the end {self.loadavg_end:.2f}. Times in ms, median / minimum of n. Peak: MiB beyond "
            "weights and optimizer state. Ratios: the baseline's best step over this one, medians / minima (and what "
            "FLOPs alone imply). Limit: ms that the step's arithmetic and data would take at the machine's own best "
            "speed, and the share of it that the median reaches.",
            *self._speeds(),
            "",
            *markdown.table(_HEADER, map(self._cells, self.rows)),
            *self._breakdown(),
        ]
        return "\n".join(lines)

    def _speeds(self) -> Iterator[str]:
        """What limits rest on: one line for each interleaving."""
        lines = (
            f"Best speeds in turns with the steps, {row.dtype}, batch {row.batch_size}: products "
            f"{row['speed_products'].median / 1e9:.0f} GFLOP/s, copy {row['speed_copy'].median / 1e9:.1f} GB/s."
            for row in self.rows
            if LIMIT in row
        )
        return iter(dict.fromkeys(lines))

    def _cells(self, row: Measurement) -> list[object]:
        beta = "-" if row.beta is None else f"{row.beta:g}"
        times = [f"{row[phase].median * 1e3:.1f} / {row[phase].min * 1e3:.1f}" for phase in _PHASES]
        ratios = ["-" if ratio is None else ratio for ratio in self.ratios(row)]
        return [
            row.dtype, row.shape, row.variant, beta, row.backend_used, row.layout, row.mode, row[TOTAL].n, *times,
            f"{row['peak_memory'].median / 2**20:.0f}", f"{row.flops / 1e9:.1f}", row.limit, *ratios,
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
        cells: list[list[str]] = []
        for kind in KINDS:
            if any(kind in row.kernels for row in rows):
                seconds = [row.kernels.get(kind, 0.0) for row in rows]
                parts = (f"{part * 1e3:.2f} ({part / total:.0%})" for part, total in zip(seconds, totals, strict=True))
                cells.append([kind, *parts])
        cells.append(["all", *(f"{total * 1e3:.2f}" for total in totals)])
        names = (f"{case_of(row)}, {row.dtype}, {row.shape}" for row in rows)
        yield from markdown.table(("kernels", *names), cells)

    def to_json(self) -> dict[str, Any]:
        """JSON-able values."""
        rows = [
            {
                "dtype": row.dtype,
                **case_of(row)._asdict(),
                "shape": [int(size) for size in row.shape.split("x")],
                "backend_used": row.backend_used,
                "seconds": {phase: asdict(stats) for phase, stats in row.timings.items()},
                "peak_bytes": row["peak_memory"].median,
                "flops": {phase: row.flops_of(phase) for phase in ("forward", "backward")},
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


def case_of(row: Measurement) -> StepCase:
    """What was measured there."""
    compile = COMPILE_OF_MODE[row.mode.removesuffix(", caching").removesuffix(PLAIN_ATTENTION)]
    return StepCase(row.variant, row.layout, compile, row.beta, row.allocator, row.attention)
