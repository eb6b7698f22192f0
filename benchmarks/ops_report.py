"""What `dfs bench ops` found: ratios against stock, where the automatic choice loses, CSV rows, JSON."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

from dfs_engine.benchmarks import markdown
from dfs_engine.benchmarks.measure import TOTAL, Environment, Stats, case_column, metric_rows
from dfs_engine.benchmarks.op_cases import STOCK_PATHS, OpCase
from dfs_engine.benchmarks.ops_config import BenchOpsConfig
from dfs_engine.benchmarks.shapes import Shape
from dfs_engine.validate.tolerances import DTYPES

_PHASES = ("forward", "backward", TOTAL)
_HEADER = ("op", "shape", "dtype", "path", "layout", "beta", "n", "forward", "backward", "both")
_SUMMARY_HEADER = (
    *("op", "shape", "dtype", "beta", "backend"),
    *("dense: forward", "backward", "both", "detach: backward", "both"),
)


@dataclass(frozen=True, slots=True)
class OpRow:
    """One case on one shape; `num_live` input channels have gradient; `automatic` is the backend that `auto` takes."""

    dtype: str
    shape: Shape
    case: OpCase
    num_live: int
    timings: dict[str, Stats]
    automatic: str

    @property
    def flops(self) -> dict[str, int]:
        """Of each phase: stock computes the gradient of all input channels, and drops what nobody asked for."""
        full = self.shape.flops
        grad_input = full if self.case.path in STOCK_PATHS else full * self.num_live // self.shape.channels
        backward = full + grad_input
        return {
            "forward": full,
            "backward": backward,
            TOTAL: full + backward,
            "grad_input": grad_input,
            "grad_weight": full,
        }


@dataclass(slots=True)
class OpsReport:
    """All rows of a run, slower ones included. Peaks in FLOP/s, bandwidth in B/s."""

    config: BenchOpsConfig
    stamp: Environment
    rows: list[OpRow] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    peaks: dict[str, float] = field(default_factory=dict)
    bandwidth: float = 0.0
    loadavg_end: float = 0.0

    def summary(self) -> Iterator[tuple[OpRow, OpRow, OpRow | None]]:
        """(fastest automatic case, fastest dense, fastest detach) of each shape, dtype and beta, in any layout."""
        for row in self._groups():
            rivals = self._rivals(row)
            own = self._fastest([rival for rival in rivals if rival.case.path == rival.automatic])
            dense, detach = (self._fastest([one for one in rivals if one.case.path == path]) for path in STOCK_PATHS)
            if own and dense:
                yield own, dense, detach

    def losses(self) -> Iterator[tuple[OpRow, OpRow, str]]:
        """(automatic case, what beat it, phase) where it loses beyond noise in a layout: p20 above p80."""
        for row in self.rows:
            if row.case.path != row.automatic:
                continue
            for rival in self._rivals(row):
                if rival.case.layout == row.case.layout and rival.case.path != row.case.path:
                    for phase in _PHASES:
                        if row.timings[phase].p20 > rival.timings[phase].p80:
                            yield row, rival, phase

    def _groups(self) -> list[OpRow]:
        """One split row for each shape, dtype and beta."""
        groups = {(row.dtype, row.shape, row.case.beta): row for row in self.rows if row.case.beta is not None}
        return list(groups.values())

    def _rivals(self, row: OpRow) -> list[OpRow]:
        """Everything on the same shape with the same beta or none, itself included."""
        return [
            rival
            for rival in self.rows
            if (rival.dtype, rival.shape) == (row.dtype, row.shape) and rival.case.beta in (None, row.case.beta)
        ]

    @staticmethod
    def _fastest(rows: list[OpRow]) -> OpRow | None:
        return min(rows, key=lambda row: row.timings[TOTAL].median, default=None)

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
            *markdown.table(_HEADER, map(self._cells, self.rows)),
            "",
            "Automatic backend against stock, each in its best layout: stock's time over ours, medians / minima "
            "(and what FLOPs alone imply).",
            "",
            *markdown.table(_SUMMARY_HEADER, self._summary_cells()),
        ]
        for heading, paths in (("aten", ("aten",)), ("stock", STOCK_PATHS)):
            lines += ["", f"The automatic backend loses to {heading} in one layout beyond noise (its p20 above p80):"]
            lines += self._loss_lines(paths) or ["- nowhere"]
        return "\n".join(lines)

    def _summary_cells(self) -> Iterator[list[str]]:
        for own, dense, detach in self.summary():
            ratios = [_ratio(dense, own, phase) for phase in _PHASES]
            ratios += [_ratio(detach, own, phase) if detach else "-" for phase in _PHASES[1:]]
            shape = f"{own.shape.family} {own.shape}"
            yield [own.shape.op, shape, own.dtype, f"{own.case.beta:g}", own.case.path, *ratios]

    def _loss_lines(self, paths: tuple[str, ...]) -> list[str]:
        phases: dict[str, list[str]] = {}
        for row, rival, phase in self.losses():
            if rival.case.path in paths:
                ours, theirs = (one.timings[phase].median * 1e3 for one in (row, rival))
                where = f"- {row.shape.op} {row.shape.family} {row.shape} {row.dtype} {row.case} to {rival.case.path}: "
                phases.setdefault(where, []).append(f"{phase} {ours:.3f} against {theirs:.3f} ms")
        return [where + ", ".join(texts) for where, texts in phases.items()]

    @staticmethod
    def _cells(row: OpRow) -> list[str]:
        times = []
        for phase in _PHASES:
            stats = row.timings[phase]
            rate = f" ({row.flops[phase] / stats.median / 1e9:.0f})" if row.shape.flops else ""
            times.append(f"{stats.median * 1e3:.3f} / {stats.min * 1e3:.3f}{rate}")
        beta = "-" if row.case.beta is None else f"{row.case.beta:g}"
        return [
            row.shape.op, f"{row.shape.family} {row.shape}", row.dtype, row.case.path, row.case.layout, beta,
            str(row.timings[TOTAL].n), *times,
        ]  # fmt: skip

    def machine_csv_rows(self) -> list[dict[str, Any]]:
        """The machine's peaks, for `append_csv`."""
        machine = {"suite": "ops", "op": "machine", "n": 1}
        rows: list[dict[str, Any]] = [
            machine | {"dtype": dtype, "metric": "peak", "unit": "FLOP/s", "median": peak}
            for dtype, peak in self.peaks.items()
        ]
        return [*rows, machine | {"metric": "bandwidth", "unit": "B/s", "median": self.bandwidth}]

    @staticmethod
    def csv_rows(timed: list[OpRow]) -> list[dict[str, Any]]:
        """One row per measurement, for `append_csv`; FLOPs, bytes and whether `auto` takes it as rows of their own."""
        rows: list[dict[str, Any]] = []
        for row in timed:
            path = row.case.path
            key = {
                "suite": "ops", "case": case_column(row.case.layout, row.case.beta), "model": row.shape.family,
                "op": row.shape.op, "mode": "eager", "variant": path if path in STOCK_PATHS else "dfs",
                "backend_used": "stock" if path in STOCK_PATHS else path, "dtype": row.dtype, "shape": str(row.shape),
                "start": 0, "stop": row.num_live,
            }  # fmt: skip
            counts = {f"flops_{phase}": (row.flops[phase], "FLOP") for phase in row.timings if row.shape.flops}
            counts["bytes"] = (row.shape.elements * DTYPES[row.dtype].itemsize, "B")
            counts["automatic"] = (int(path == row.automatic), "bool")
            rows += metric_rows(key, row.timings, counts)
        return rows

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
                    "op": row.shape.op,
                    "family": row.shape.family,
                    "shape": str(row.shape),
                    "dtype": row.dtype,
                    **row.case._asdict(),
                    "num_live": row.num_live,
                    "seconds": {phase: asdict(stats) for phase, stats in row.timings.items()},
                    "flops": row.flops,
                }
                for row in self.rows
            ],
            "losses": [
                {"shape": str(row.shape), "dtype": row.dtype, "case": str(row.case), "to": str(rival.case)}
                | {"phase": phase}
                for row, rival, phase in self.losses()
            ],
        }


def _ratio(rival: OpRow, own: OpRow, phase: str) -> str:
    theirs, ours = rival.timings[phase], own.timings[phase]
    ceiling = f" ({rival.flops[phase] / own.flops[phase]:.2f})" if own.shape.flops else ""
    return f"{theirs.median / ours.median:.2f} / {theirs.min / ours.min:.2f}{ceiling}"
