"""What `dfs validate` found: the largest errors of every op, backend, dtype and tensor, as a table and as JSON."""

from dataclasses import asdict, dataclass, field
from math import isfinite
from typing import Any, NamedTuple

from dfs_engine.runtime import backend as backends
from dfs_engine.validate.config import ValidateConfig
from dfs_engine.validate.problems import PROBLEMS
from dfs_engine.validate.tolerances import DTYPES, Comparison, Tolerance

_HEAD = (
    "op",
    "backend",
    "dtype",
    "tensor",
    "cases",
    "max abs",
    "max ratio",
    "rms ratio",
    "tolerance",
    "",
    "worst case",
)


@dataclass(slots=True)
class Row:
    """All cases of one op, backend, dtype and tensor: the largest errors, and the case nearest to the tolerance."""

    op: str
    backend: str
    dtype: str
    tensor: str
    tolerance: Tolerance
    num_cases: int = 0
    num_breaches: int = 0
    max_abs: float = 0.0
    max_ratio: float = 0.0
    rms_ratio: float = 0.0
    excess: float = -1.0
    worst_case: str = ""
    note: str = ""

    @property
    def ok(self) -> bool:
        return self.num_breaches == 0

    def add(self, case: str, comparison: Comparison) -> None:
        """Counts one case in."""
        self.num_cases += 1
        self.num_breaches += not comparison.ok
        self.max_abs = max(self.max_abs, comparison.max_abs)
        self.max_ratio = max(self.max_ratio, comparison.max_ratio)
        self.rms_ratio = max(self.rms_ratio, comparison.rms_ratio)
        if comparison.excess > self.excess:
            self.excess, self.worst_case, self.note = comparison.excess, case, comparison.note

    def cells(self) -> tuple[str, ...]:
        """The row as text, in the order of `_HEAD`."""
        errors = (f"{error:.1e}" for error in (self.max_abs, self.max_ratio, self.rms_ratio))
        verdict = "ok" if self.ok else "BREACH"
        worst_case = self.worst_case if self.excess else ""
        names = (self.op, self.backend, self.dtype, self.tensor, str(self.num_cases))
        return (*names, *errors, str(self.tolerance), verdict, worst_case)


class WinogradError(NamedTuple):
    """Errors of one tensor of a float32 convolution against float64, by Winograd's algorithm and directly."""

    tensor: str
    winograd: Comparison
    direct: Comparison

    def __str__(self) -> str:
        return (
            f"winograd {self.tensor}: rms ratio {self.winograd.rms_ratio:.1e} (direct {self.direct.rms_ratio:.1e}), "
            f"max ratio {self.winograd.max_ratio:.1e} (direct {self.direct.max_ratio:.1e})"
        )


@dataclass(slots=True)
class ValidateReport:
    """What `run` found. `skipped` says which combinations cannot be computed or compared here, and why."""

    config: ValidateConfig
    skipped: list[str] = field(default_factory=list)
    winograd: list[WinogradError] = field(default_factory=list)
    _rows: dict[tuple[str, str, str, str], Row] = field(default_factory=dict)

    @property
    def rows(self) -> list[Row]:
        """In reading order: by op, backend, dtype, tensor."""
        orders = (list(PROBLEMS), (*backends.BACKENDS, backends.SPLIT), list(DTYPES))

        def position(row: Row) -> tuple:
            names = (row.op, row.backend, row.dtype)
            return (*(order.index(name) for order, name in zip(orders, names, strict=True)), row.tensor)

        return sorted(self._rows.values(), key=position)

    @property
    def ok(self) -> bool:
        """Nothing was beyond its tolerance, and something was compared."""
        return bool(self._rows) and all(row.ok for row in self._rows.values())

    def add(self, op: str, backend: str, dtype: str, case: str, comparison: Comparison) -> None:
        """Counts one comparison into its row."""
        key = (op, backend, dtype, comparison.name)
        self._rows.setdefault(key, Row(*key, tolerance=comparison.tolerance)).add(case, comparison)

    def table(self) -> str:
        """The rows as aligned text, then what was skipped, every breach, and the verdict.

        A row that tells nothing, because the requested backend ran each time, is left out.
        """
        body = [row.cells() for row in self.rows if row.tensor != "backend" or not row.ok]
        widths = [max(len(line[column]) for line in [_HEAD, *body]) for column in range(len(_HEAD))]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
            for line in [_HEAD, *body]
        ]
        lines += [str(error) for error in self.winograd]
        lines += [f"skipped: {reason}" for reason in self.skipped]
        lines += [
            f"BREACH: {row.op} {row.backend} {row.dtype} {row.tensor}: {row.num_breaches} of {row.num_cases} cases, "
            f"worst {row.worst_case}{': ' + row.note if row.note else ''}"
            for row in self.rows
            if not row.ok
        ]
        num_compared = sum(row.num_cases for row in self.rows)
        verdict = "all within tolerance" if self.ok else "FAILED"
        return "\n".join([*lines, f"{num_compared} comparisons, reference PyTorch in float64: {verdict}"])

    def to_json(self) -> dict[str, Any]:
        """JSON-able values; infinite errors as text, because JSON has no infinity."""

        def plain(value: Any) -> Any:
            return str(value) if isinstance(value, float) and not isfinite(value) else value

        rows = [{**{name: plain(value) for name, value in asdict(row).items()}, "ok": row.ok} for row in self.rows]
        winograd = [
            {"tensor": error.tensor}
            | {
                f"{name}_{measure}": plain(getattr(getattr(error, name), measure))
                for name in ("winograd", "direct")
                for measure in ("max_ratio", "rms_ratio")
            }
            for error in self.winograd
        ]
        return {
            "ok": self.ok,
            "config": asdict(self.config),
            "rows": rows,
            "winograd": winograd,
            "skipped": self.skipped,
        }
