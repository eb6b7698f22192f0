"""What `dfs bench ops` found: ratios against stock, where the automatic choice loses, JSON."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

from dfs_engine.benchmarks import markdown
from dfs_engine.benchmarks.measure import TOTAL, Environment
from dfs_engine.benchmarks.op_cases import STOCK_PATHS, OpCase
from dfs_engine.benchmarks.ops_config import BenchOpsConfig
from dfs_engine.benchmarks.results import Measurement, Measurements, losses

_PHASES = ("forward", "backward", TOTAL)
_HEADER = ("op", "shape", "dtype", "path", "layout", "beta", "n", "forward", "backward", "both")
_SUMMARY_HEADER = (
    *("op", "shape", "dtype", "beta", "backend"),
    *("dense: forward", "backward", "both", "detach: backward", "both"),
)


@dataclass(slots=True)
class OpsReport:
    """All rows of a run, slower ones included. Peaks in FLOP/s, bandwidth in B/s."""

    config: BenchOpsConfig
    stamp: Environment
    rows: Measurements = field(default_factory=Measurements)
    notes: list[str] = field(default_factory=list)
    peaks: dict[str, float] = field(default_factory=dict)
    bandwidth: float = 0.0
    loadavg_end: float = 0.0

    def table(self) -> str:
        """Markdown: conditions, every case, the summary, and where the automatic choice loses."""
        peaks = ", ".join(f"{peak / 1e9:.0f} GFLOP/s {dtype}" for dtype, peak in self.peaks.items())
        lines = [
            "Forward and backward (grad_input, grad_weight, grad_bias) of single ops, cases interleaved.",
            *str(self.stamp).splitlines(),
            *self.notes,
            f"Load average at the end {self.loadavg_end:.2f}. Best stock matrix product {peaks}; copy "
            f"{self.bandwidth / 1e9:.0f} GB/s. Times in ms, median / minimum of n; in brackets GFLOP/s of the median.",
            "",
            *markdown.table(_HEADER, map(_cells, self.rows)),
            "",
            "Automatic backend against stock, each in its best layout: stock's time over ours, medians / minima "
            "(and what FLOPs alone imply).",
            "",
            *markdown.table(_SUMMARY_HEADER, self._summary()),
        ]
        for heading, paths in (("aten", ("aten",)), ("stock", STOCK_PATHS)):
            lines += ["", f"The automatic backend loses to {heading} in one layout beyond noise (its p20 above p80):"]
            lines += self._loss_lines(paths) or ["- nowhere"]
        return "\n".join(lines)

    def _summary(self) -> Iterator[tuple[str, ...]]:
        """The fastest automatic case of each shape, dtype and beta beside stock's, in any layout."""
        split = (one for one in self.rows if one.beta is not None)
        for dtype, op, model, shape, beta in dict.fromkeys(
            (one.dtype, one.op, one.model, one.shape, one.beta) for one in split
        ):
            same = self.rows.of(dtype=dtype, op=op, model=model, shape=shape, beta=(None, beta))
            own = same.of(is_automatic=True).fastest()
            dense, detach = (same.of(path=path).fastest() for path in STOCK_PATHS)
            if own and dense:
                ratios = [_ratio(dense, own, phase) for phase in _PHASES]
                ratios += [_ratio(detach, own, phase) if detach else "-" for phase in _PHASES[1:]]
                yield op, f"{model} {shape}", dtype, f"{beta:g}", own.path, *ratios

    def _loss_lines(self, paths: tuple[str, ...]) -> list[str]:
        phases: dict[str, list[str]] = {}
        for row, rival, phase in losses(self.rows, paths, _PHASES):
            where = f"- {row.op} {row.model} {row.shape} {row.dtype} {_case(row)} to {rival.path}: "
            text = f"{phase} {row[phase].median * 1e3:.3f} against {rival[phase].median * 1e3:.3f} ms"
            phases.setdefault(where, []).append(text)
        return [where + ", ".join(texts) for where, texts in phases.items()]

    def machine_csv_rows(self) -> list[dict[str, Any]]:
        """The machine's peaks, for `append_csv`."""
        machine = {"suite": "ops", "op": "machine", "n": 1}
        rows: list[dict[str, Any]] = [
            machine | {"dtype": dtype, "metric": "peak", "unit": "FLOP/s", "median": peak}
            for dtype, peak in self.peaks.items()
        ]
        return [*rows, machine | {"metric": "bandwidth", "unit": "B/s", "median": self.bandwidth}]

    def to_json(self) -> dict[str, Any]:
        """JSON-able values."""
        return {
            "config": asdict(self.config),
            "environment": asdict(self.stamp),
            "loadavg_end": self.loadavg_end,
            "notes": self.notes,
            "peaks": self.peaks,
            "bandwidth": self.bandwidth,
            "rows": [
                {
                    "op": row.op,
                    "family": row.model,
                    "shape": row.shape,
                    "dtype": row.dtype,
                    **_case(row)._asdict(),
                    "num_live": row.num_live,
                    "seconds": {phase: asdict(stats) for phase, stats in row.timings.items()},
                    "flops": {phase: row.flops_of(phase) for phase in row.timings},
                }
                for row in self.rows
            ],
            "losses": [
                {"shape": row.shape, "dtype": row.dtype, "case": str(_case(row)), "to": str(_case(rival))}
                | {"phase": phase}
                for row, rival, phase in losses(self.rows, (*STOCK_PATHS, "aten", "cpp"), _PHASES)
            ],
        }


def _case(one: Measurement) -> OpCase:
    return OpCase(one.path, one.layout, one.beta)


def _cells(row: Measurement) -> list[object]:
    times = []
    for phase in _PHASES:
        rate = f" ({row.flops_of(phase) / row[phase].median / 1e9:.0f})" if row.flops_of(phase) else ""
        times.append(f"{row[phase].median * 1e3:.3f} / {row[phase].min * 1e3:.3f}{rate}")
    beta = "-" if row.beta is None else f"{row.beta:g}"
    return [row.op, f"{row.model} {row.shape}", row.dtype, row.path, row.layout, beta, row[TOTAL].n, *times]


def _ratio(rival: Measurement, own: Measurement, phase: str) -> str:
    theirs, ours = rival[phase], own[phase]
    ceiling = f" ({rival.flops_of(phase) / own.flops_of(phase):.2f})" if own.flops_of(phase) else ""
    return f"{theirs.median / ours.median:.2f} / {theirs.min / ours.min:.2f}{ceiling}"
