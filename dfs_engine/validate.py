"""Every op x backend x dtype x layout x slice against float64 reference PyTorch, on this machine: `dfs validate`.

A later op joins by one function in `dfs_engine.validate_problems`.
"""

import contextlib
import itertools
import random
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from math import isfinite
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from dfs_engine import backend as backends
from dfs_engine import ops, reference
from dfs_engine.compare import DTYPES, EXACT, TOLERANCES, Comparison, Tolerance, compare
from dfs_engine.names import check_choice, split_choices
from dfs_engine.partition import ChannelSlice, Partition
from dfs_engine.validate_problems import PROBLEMS, Problem

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
BETAS = (0, 0.1, 0.3, 0.5, 0.7, 0.9, 1)
_QUICK_COMBINATIONS = 6  # per shape and dtype, drawn at random


@dataclass(frozen=True, kw_only=True, slots=True)
class ValidateConfig:
    """What `dfs validate` compares. Lists are comma-separated.

    Attributes:
        ops: "all", or names of ops.
        backends: "all" (every usable one), or names of backends; an unusable one is then an error.
        dtypes: of fp64, fp32, bf16, fp16.
        device: "cpu" or "cuda".
        quick: a random sample of the combinations, under 40 s on 2 slow cores, instead of all of them.
        seed: of the inputs and of the sample.
        progress: show a progress bar.
    """

    ops: str = "all"
    backends: str = "all"
    dtypes: str = "fp64,fp32,bf16,fp16"
    device: str = "cpu"
    quick: bool = False
    seed: int = 0
    progress: bool = True

    def __post_init__(self) -> None:
        split_choices("ops", self.ops, ["all", *PROBLEMS])
        split_choices("backends", self.backends, ["all", *backends.BACKENDS])
        split_choices("dtypes", self.dtypes, DTYPES)
        check_choice("device", self.device, ("cpu", "cuda"))


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


@dataclass(slots=True)
class ValidateReport:
    """What `run` found. `skipped` says which combinations this machine cannot compute, and why."""

    config: ValidateConfig
    skipped: list[str] = field(default_factory=list)
    _rows: dict[tuple[str, str, str, str], Row] = field(default_factory=dict)

    @property
    def rows(self) -> list[Row]:
        """In reading order: by op, backend, dtype, tensor."""
        orders = (list(PROBLEMS), backends.BACKENDS, list(DTYPES))

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
        return {"ok": self.ok, "config": asdict(self.config), "rows": rows, "skipped": self.skipped}


class _Combination(NamedTuple):
    """One way to ask for a problem."""

    part_name: str
    part: ChannelSlice
    reference: bool
    form: str
    layout: str

    def __str__(self) -> str:
        referencing = "referencing" if self.reference else "no referencing"
        return f"{self.part_name} [{self.part.start}, {self.part.stop}), {referencing}, {self.form}, {self.layout}"


def run(config: ValidateConfig) -> ValidateReport:
    """Compares everything that `config` asks for; never raises because of a wrong or a crashing kernel.

    Raises:
        RuntimeError: a backend named in `config.backends` is not usable here.
    """
    report = ValidateReport(config)
    names = _usable_backends(config, report)
    op_names = list(PROBLEMS) if config.ops == "all" else split_choices("ops", config.ops, PROBLEMS)
    chooser = random.Random(config.seed)
    with _strict_numerics():
        plan = []
        for op, dtype in itertools.product(op_names, split_choices("dtypes", config.dtypes, DTYPES)):
            reason = _unsupported(op, dtype, config)
            if reason is not None:
                report.skipped.append(f"{op} {dtype}: stock PyTorch cannot compute it on {config.device} ({reason})")
                continue
            for problem in PROBLEMS[op]():
                combinations = _combinations(problem)
                if config.quick:
                    combinations = chooser.sample(combinations, min(_QUICK_COMBINATIONS, len(combinations)))
                plan.append((op, dtype, problem, combinations))
        total = sum(len(combinations) for *_, combinations in plan)
        with tqdm(total=total, desc="validate", unit="case", disable=not config.progress) as bar:
            for op, dtype, problem, combinations in plan:
                bar.set_postfix_str(f"{op} {dtype} {problem.label}")
                _validate_problem(op, dtype, problem, combinations, names, report, bar)
    return report


def _usable_backends(config: ValidateConfig, report: ValidateReport) -> list[str]:
    reasons = {name: backends.unavailable_reason(name, config.device) for name in backends.BACKENDS}
    if config.backends == "all":
        report.skipped += [f"backend {name}: {reason}" for name, reason in reasons.items() if reason is not None]
        return [name for name, reason in reasons.items() if reason is None]
    names = split_choices("backends", config.backends, backends.BACKENDS)
    for name in names:
        if reasons[name] is not None:
            raise RuntimeError(f"backends: expected usable backends, got {name!r}, but {reasons[name]}.")
    return names


def _unsupported(op: str, dtype: str, config: ValidateConfig) -> str | None:
    """Why stock PyTorch itself cannot compute the op in this dtype on this device, or None."""
    problem = PROBLEMS[op]()[0]
    whole = _Combination("", ChannelSlice(0, problem.num_channels), True, "plain", problem.layouts[0])
    tensors = _make_tensors(problem, dtype, config.device, config.seed)
    try:
        _evaluate(getattr(reference, op), problem, whole, tensors, None)
    except RuntimeError as error:
        return str(error).splitlines()[0]
    return None


def _combinations(problem: Problem) -> list[_Combination]:
    parts: dict[ChannelSlice, str] = {}
    for beta in BETAS:
        partition = Partition(problem.num_channels, beta)
        # Few channels give the same slice for many betas: once is enough.
        parts.setdefault(partition.shared, f"beta={beta} shared")
        parts.setdefault(partition.exit, f"beta={beta} exit")
    choices = itertools.product(parts, (True, False), ("plain", "internal"), problem.layouts)
    return [_Combination(parts[part], part, *rest) for part, *rest in choices]  # type: ignore[arg-type]


def _make_tensors(problem: Problem, dtype: str, device: str, seed: int) -> dict[str, Tensor | None]:
    """Random magnitudes, rounded to `dtype`: the float64 reference starts from the same numbers.

    Of one sign, because a gradient of one element whose terms happen to cancel has no relative accuracy in any kernel.
    """
    generator = torch.Generator().manual_seed(seed)
    return {
        name: None if shape is None else torch.randn(shape, generator=generator).abs().to(device, DTYPES[dtype])
        for name, shape in problem.tensors.items()
    }


def _validate_problem(
    op: str,
    dtype: str,
    problem: Problem,
    combinations: list[_Combination],
    names: list[str],
    report: ValidateReport,
    bar: tqdm,
) -> None:
    config = report.config
    tensors = _make_tensors(problem, dtype, config.device, config.seed)
    exact = {name: None if tensor is None else tensor.double() for name, tensor in tensors.items()}
    oracle: dict[Any, dict[str, Tensor]] = {}
    output_shape = getattr(reference, op)(*exact.values(), **problem.options, start=0, stop=0).shape
    generator = torch.Generator().manual_seed(config.seed + 1)
    grad_output = torch.randn(output_shape, generator=generator).abs().to(config.device, DTYPES[dtype])
    for combination in combinations:
        key = (combination.part, combination.reference, combination.layout == "expanded")
        if key not in oracle:
            plain = combination._replace(form="plain")
            oracle[key] = _evaluate(getattr(reference, op), problem, plain, exact, grad_output.double())
        for name in names:
            case = f"{problem.label}: {combination}"
            try:
                results = _evaluate(getattr(ops, op), problem, combination, tensors, grad_output, backend=name)
            # A kernel that crashes is a finding like one that is wrong.
            except Exception as error:
                report.add(op, name, dtype, case, _failure("error", f"{type(error).__name__}: {error}"))
                continue
            used = backends.last_used(op)
            report.add(
                op, name, dtype, case, _failure("backend", f"{used} ran") if used != name else _success("backend")
            )
            for comparison in _compare_results(problem, combination, results, oracle[key], TOLERANCES[DTYPES[dtype]]):
                report.add(op, name, dtype, case, comparison)
        bar.update()


def _evaluate(
    function: Callable[..., Tensor],
    problem: Problem,
    combination: _Combination,
    tensors: dict[str, Tensor | None],
    grad_output: Tensor | None,
    **options: Any,
) -> dict[str, Tensor]:
    """The output, and the gradient of every tensor, as `output` and `grad_<name>`."""
    leaves = {name: _lay_out(tensor, combination.layout) for name, tensor in tensors.items() if tensor is not None}
    start, stop = combination.part
    if combination.form == "internal":
        options["full"] = leaves["input"]
        leaves["input"] = combination.part.of(leaves["input"], problem.channel_axis)
    leaves = {name: leaf.detach().requires_grad_() for name, leaf in leaves.items()}
    arguments = [leaves.get(name) for name in tensors]
    output = function(*arguments, **problem.options, start=start, stop=stop, reference=combination.reference, **options)
    grad_output = torch.ones_like(output) if grad_output is None else _lay_out_grad(grad_output, combination.layout)
    grads = torch.autograd.grad(output, list(leaves.values()), grad_output, materialize_grads=True)
    return {"output": output.detach()} | {f"grad_{name}": grad for name, grad in zip(leaves, grads, strict=True)}


def _lay_out(tensor: Tensor, layout: str) -> Tensor:
    """The same values in other strides."""
    if layout == "channels_last" and tensor.dim() == 4:
        return tensor.contiguous(memory_format=torch.channels_last)
    if layout == "transposed" and tensor.dim() >= 2:
        return tensor.transpose(-1, -2).contiguous().transpose(-1, -2)
    if layout == "strided":
        # Surrounded by NaN, so that reading beside the view shows.
        base = tensor.new_full([*(size + 2 for size in tensor.shape[:-1]), 2 * tensor.size(-1) + 1], float("nan"))
        inside = [slice(1, -1)] * (tensor.dim() - 1) + [slice(1, None, 2)]
        view = base[tuple(inside)]
        return view.copy_(tensor)
    return tensor


def _lay_out_grad(grad_output: Tensor, layout: str) -> Tensor:
    """As `_lay_out`; "expanded" has stride 0 in the last axis, as the gradient of a sum has, and so other values."""
    if layout == "expanded":
        return grad_output.narrow(-1, 0, 1).expand_as(grad_output)
    return _lay_out(grad_output, layout)


def _compare_results(
    problem: Problem,
    combination: _Combination,
    results: dict[str, Tensor],
    oracle: dict[str, Tensor],
    tolerance: Tolerance,
) -> Iterator[Comparison]:
    axis, part = problem.channel_axis, combination.part
    for name, expected in oracle.items():
        if name == "grad_input" and combination.form == "internal":
            expected = part.of(expected, axis)
        yield compare(name, results[name], expected, tolerance)
    if combination.form == "plain":
        outside = torch.ones_like(results["grad_input"], dtype=torch.bool)
        part.of(outside, axis).fill_(False)
        yield _compare_zeros("grad_input outside", results["grad_input"], outside)
    if not combination.reference:
        # Weight columns that read zeros have an exactly zero gradient in the oracle, and only they have.
        yield _compare_zeros("grad_weight outside", results["grad_weight"], oracle["grad_weight"] == 0)


def _compare_zeros(name: str, tensor: Tensor, mask: Tensor) -> Comparison:
    if tensor.shape != mask.shape:
        return _failure(name, f"shape {tuple(tensor.shape)}, expected {tuple(mask.shape)}")
    outside = tensor[mask]
    return compare(name, outside, torch.zeros_like(outside), EXACT)


def _failure(name: str, note: str) -> Comparison:
    infinity = float("inf")
    return Comparison(name, infinity, infinity, infinity, EXACT, note)


def _success(name: str) -> Comparison:
    return Comparison(name, 0.0, 0.0, 0.0, EXACT)


@contextlib.contextmanager
def _strict_numerics() -> Iterator[None]:
    """Full float32 precision, and uninitialised memory full of NaN, so that an element nobody wrote shows."""
    # Both are objects in a module's place, whose attributes the type checker cannot see.
    filler: Any = torch.utils.deterministic
    precision: Any = torch.backends
    before = filler.fill_uninitialized_memory, precision.fp32_precision
    was_deterministic = torch.are_deterministic_algorithms_enabled()
    was_warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    try:
        torch.use_deterministic_algorithms(True, warn_only=True)
        filler.fill_uninitialized_memory, precision.fp32_precision = True, "ieee"
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*deterministic")
            yield
    finally:
        torch.use_deterministic_algorithms(was_deterministic, warn_only=was_warn_only)
        filler.fill_uninitialized_memory, precision.fp32_precision = before
