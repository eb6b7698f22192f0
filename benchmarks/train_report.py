"""What `dfs bench train` found: as a table, as CSV rows, as JSON."""

import os
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from dfs_engine.benchmarks.breakdown import KINDS
from dfs_engine.benchmarks.measure import TOTAL, Environment, Stats
from dfs_engine.evaluation.flops import FlopCount

if TYPE_CHECKING:
    from dfs_engine.benchmarks.train import BenchTrainConfig


class Baseline(NamedTuple):
    """What a ratio is against: the fastest case of these variants, whatever its layout and compile setting."""

    variants: tuple[str, ...]
    same_allocator: bool = False
    """False: on torch's own memory, as stock forms are run. True: the row's allocator serves them too."""


BASELINES = {
    "dense": Baseline(("dense",)),
    "detach, split": Baseline(("detach", "split")),
    "best stock": Baseline(("dense", "detach", "split")),
    "best stock, same allocator": Baseline(("dense", "detach", "split"), same_allocator=True),
    "byot": Baseline(("byot",)),
}
_PHASES = ("forward", "loss", "backward", "update", TOTAL)


# `Case.compile` -> the CSV's `mode`. With CUDA graphs: "reduce-overhead", torch.compile's; "captured", the step as one.
_MODES = {
    "off": "eager", "on": "compile", "reduce-overhead": "compile, reduce-overhead", "captured": "eager, captured",
}  # fmt: skip


class Case(NamedTuple):
    """One way to train the model. `beta` is None where nothing is split."""

    variant: str
    layout: str
    compile: str
    beta: float | None = None
    allocator: str = "stock"

    @property
    def mode(self) -> str:
        mode = _MODES[self.compile]
        return mode if self.allocator == "stock" else f"{mode}, {self.allocator}"

    def __str__(self) -> str:
        beta = "" if self.beta is None else f"/beta={self.beta:g}"
        return f"{self.variant}/{self.layout}/{self.mode}{beta}"


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainRow:
    """One case in one dtype on batches of one shape.

    `peak_bytes` is beyond weights and optimizer state; FLOPs are of one step; `kernels` are seconds by kind of kernel.
    """

    dtype: str
    case: Case
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

    config: "BenchTrainConfig"
    stamp: Environment
    rows: list[TrainRow] = field(default_factory=list)
    loadavg_end: float = 0.0

    def finish(self) -> None:
        """Records the load after the last measurement."""
        self.loadavg_end = round(os.getloadavg()[0], 2)

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
        config = self.config
        lines = [
            f"Training step of {config.model} on synthetic data, SGD with momentum, weight decay; cases interleaved.",
            *str(self.stamp).splitlines(),
            "Compared before: in float64 dfs by aten (no kernel computes in float64) with the plain formulation; every "
            "case, in its dtype, with float64.",
            f"Load average at the end {self.loadavg_end:.2f}. Times in ms, median / minimum of n. Peak: MiB beyond "
            "weights and optimizer state. Ratios: the baseline's best step over this one, medians / minima (and what "
            "FLOPs alone imply).",
            "",
            "| dtype | batch | variant | beta | backend | layout | mode | n | " + " | ".join(_PHASES)
            + " | peak | GFLOP | " + " | ".join(f"vs {name}" for name in BASELINES) + " |",
        ]  # fmt: skip
        lines.append("|" + "---|" * (lines[-1].count("|") - 1))
        for row in self.rows:
            beta = "-" if row.case.beta is None else f"{row.case.beta:g}"
            times = [f"{row.timings[phase].median * 1e3:.1f} / {row.timings[phase].min * 1e3:.1f}" for phase in _PHASES]
            ratios = ["-" if ratio is None else str(ratio) for ratio in self.ratios(row)]
            cells = [
                row.dtype, _by(row.shape), row.case.variant, beta, row.backend_used, row.case.layout, row.case.mode,
                str(row.timings[TOTAL].n), *times, f"{row.peak_bytes / 2**20:.0f}", f"{row.flops.total / 1e9:.1f}",
                *ratios,
            ]  # fmt: skip
            lines.append("| " + " | ".join(cells) + " |")
        return "\n".join(lines + self._breakdown())

    def _breakdown(self) -> list[str]:
        """Markdown: one column per profiled case."""
        rows = [row for row in self.rows if row.kernels]
        if not rows:
            return []
        names = [f"{row.case}, {row.dtype}, {_by(row.shape)}" for row in rows]
        lines = [
            "",
            "One step by kind of kernel, in ms and % of what the profiler saw (which slows a step a little).",
            "",
            "| kernels | " + " | ".join(names) + " |",
            "|---" + "|---" * len(names) + "|",
        ]
        totals = [sum(row.kernels.values()) for row in rows]
        for kind in KINDS:
            if any(kind in row.kernels for row in rows):
                seconds = [row.kernels.get(kind, 0.0) for row in rows]
                cells = [f"{part * 1e3:.2f} ({part / total:.0%})" for part, total in zip(seconds, totals, strict=True)]
                lines.append(f"| {kind} | " + " | ".join(cells) + " |")
        return [*lines, "| all | " + " | ".join(f"{total * 1e3:.2f}" for total in totals) + " |"]

    def csv_rows(self, timed: list[TrainRow]) -> list[dict[str, Any]]:
        """One row per measurement, for `append_csv`."""
        config, rows = self.config, []
        for row in timed:
            key = {
                "suite": "train", "case": case_column(row.case.layout, row.case.beta), "model": config.model,
                "mode": row.case.mode, "variant": row.case.variant, "backend_used": row.backend_used,
                "dtype": row.dtype, "shape": _by(row.shape),
            }  # fmt: skip
            rows += [key | {"metric": phase, "unit": "s"} | asdict(stats) for phase, stats in row.timings.items()]
            counts = {
                "peak_memory": (row.peak_bytes, "B"),
                "flops_forward": (row.flops.forward, "FLOP"),
                "flops_backward": (row.flops.backward, "FLOP"),
            }
            rows += [
                key | {"metric": name, "unit": unit} | asdict(Stats.of([value]))
                for name, (value, unit) in counts.items()
            ]
            rows += [
                key | {"op": kind, "metric": "breakdown", "unit": "s"} | asdict(Stats.of([seconds]))
                for kind, seconds in row.kernels.items()
            ]
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


def case_column(layout: str, beta: float | None) -> str:
    """The CSV's `case`: what distinguishes measurements of one variant; read back by `plot`."""
    return layout if beta is None else f"beta={beta:g}/{layout}"


def _by(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))
