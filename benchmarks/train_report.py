"""What `dfs bench train` found: as a table, as CSV rows, as JSON."""

import os
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from dfs_engine.evaluation.flops import FlopCount

from .measure import TOTAL, Environment, Stats

if TYPE_CHECKING:
    from .train import BenchTrainConfig

# What a ratio is against: the fastest case of these variants, whatever its layout and compile setting.
BASELINES = {"dense": ("dense",), "detach": ("detach",), "best stock": ("dense", "detach", "split")}
_PHASES = ("forward", "backward", "update", TOTAL)


class Case(NamedTuple):
    """One way to train the model."""

    variant: str
    layout: str
    compile: str

    @property
    def mode(self) -> str:
        return "compile" if self.compile == "on" else "eager"

    def __str__(self) -> str:
        return f"{self.variant}/{self.layout}/{self.mode}"


@dataclass(frozen=True, slots=True)
class TrainRow:
    """One case in one dtype. `peak_bytes` is beyond weights and optimizer state; FLOPs are of one step."""

    dtype: str
    case: Case
    backend_used: str
    timings: dict[str, Stats]
    peak_bytes: int
    flops: FlopCount


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
    shape: tuple[int, ...]
    rows: list[TrainRow] = field(default_factory=list)
    loadavg_end: float = 0.0

    def finish(self) -> None:
        """Records the load after the last measurement."""
        self.loadavg_end = round(os.getloadavg()[0], 2)

    def ratios(self, row: TrainRow) -> list[Ratio | None]:
        """Against each of `BASELINES`; None where this run has no case of it."""
        result: list[Ratio | None] = []
        for variants in BASELINES.values():
            rivals = [rival for rival in self.rows if rival.dtype == row.dtype and rival.case.variant in variants]
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
            f"Training step of {config.model}, batch {config.batch_size} x {'x'.join(map(str, self.shape))} synthetic "
            f"images, beta {config.beta}, SGD with momentum, cases interleaved.",
            *str(self.stamp).splitlines(),
            f"Load average at the end {self.loadavg_end:.2f}. Times in ms, median / minimum of n. Peak: MiB beyond "
            "weights and optimizer state. Ratios: the baseline's best step over this one, medians / minima (and what "
            "FLOPs alone imply).",
            "",
            "| dtype | variant | backend | layout | mode | n | " + " | ".join(_PHASES) + " | peak | GFLOP | "
            + " | ".join(f"vs {name}" for name in BASELINES) + " |",
        ]  # fmt: skip
        lines.append("|" + "---|" * (lines[-1].count("|") - 1))
        for row in self.rows:
            times = [f"{row.timings[phase].median * 1e3:.1f} / {row.timings[phase].min * 1e3:.1f}" for phase in _PHASES]
            ratios = ["-" if ratio is None else str(ratio) for ratio in self.ratios(row)]
            cells = [
                row.dtype, row.case.variant, row.backend_used, row.case.layout, row.case.mode,
                str(row.timings[TOTAL].n), *times, f"{row.peak_bytes / 2**20:.0f}", f"{row.flops.total / 1e9:.1f}",
                *ratios,
            ]  # fmt: skip
            lines.append("| " + " | ".join(cells) + " |")
        return "\n".join(lines)

    def csv_rows(self) -> list[dict[str, Any]]:
        """One row per measurement, for `append_csv`."""
        config, rows = self.config, []
        for row in self.rows:
            key = {
                "suite": "train", "case": f"beta={config.beta}/{row.case.layout}", "model": config.model,
                "mode": row.case.mode, "variant": row.case.variant, "backend_used": row.backend_used,
                "dtype": row.dtype, "shape": "x".join(map(str, (config.batch_size, *self.shape))),
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
        return rows

    def to_json(self) -> dict[str, Any]:
        """JSON-able values."""
        rows = [
            {
                "dtype": row.dtype,
                **row.case._asdict(),
                "backend_used": row.backend_used,
                "seconds": {phase: asdict(stats) for phase, stats in row.timings.items()},
                "peak_bytes": row.peak_bytes,
                "flops": asdict(row.flops),
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
