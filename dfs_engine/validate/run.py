"""Every op x backend x dtype x layout x slice against float64 reference PyTorch, on this machine: `dfs validate`.

An op joins by one function in `dfs_engine.validate.problems`.
"""

import contextlib
import functools
import itertools
import random
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from dfs_engine import ops, reference
from dfs_engine.checks import split_choices
from dfs_engine.partition import partition
from dfs_engine.runtime import backend as backends
from dfs_engine.runtime import choice
from dfs_engine.runtime.machine import check_device
from dfs_engine.runtime.precision import fp32_precision
from dfs_engine.runtime.progress_bar import progress_bar
from dfs_engine.validate.cases import Case, Problem, covering_sample
from dfs_engine.validate.config import ValidateConfig
from dfs_engine.validate.gradients import MakeGrad
from dfs_engine.validate.problems import PROBLEMS, winograd_problem
from dfs_engine.validate.report import ValidateReport, WinogradError
from dfs_engine.validate.tolerances import DTYPES, EXACT, TOLERANCES, Comparison, compare, failure

# Which ops `variant="split"` computes as two stock calls.
_TWO_CALL_OPS = ("partitioned_conv2d", "partitioned_linear")


def run(config: ValidateConfig) -> ValidateReport:
    """Compares everything that `config` asks for; never raises because of a wrong or a crashing kernel.

    Raises:
        RuntimeError: a backend named in `config.backends` is not usable here, or there is no CUDA device.
    """
    check_device("validate", config.device)
    begin, report = time.monotonic(), ValidateReport(config)
    names = _usable_backends(config, report)
    op_names = list(PROBLEMS) if config.ops == "all" else split_choices("ops", config.ops, PROBLEMS)
    dtypes = split_choices("dtypes", config.dtypes, DTYPES)
    chooser = random.Random(config.seed)
    if config.quick and backends.SPLIT in names and len(dtypes) > 1:
        report.skipped.append(f"backend {backends.SPLIT}: quick compares it in {dtypes[0]} alone")
    with _strict_numerics():
        plan = []
        for op, dtype in itertools.product(op_names, dtypes):
            reason = _unsupported(op, dtype, config)
            if reason is not None:
                report.skipped.append(f"{op} {dtype}: stock PyTorch cannot compute it on {config.device} ({reason})")
                continue
            if not _backends_of(op, names):
                report.skipped.append(f"{op}: it has no backends, and its stock operators come under aten")
                continue
            for problem in PROBLEMS[op]():
                cases = problem.cases(problem)
                if config.quick:
                    cases = covering_sample(problem, cases, chooser)
                plan.append((op, dtype, problem, cases))
        with progress_bar(sum(len(cases) for *_, cases in plan), "case", config.progress) as bar:
            for index, (op, dtype, problem, cases) in enumerate(plan):
                if config.max_seconds is not None and time.monotonic() - begin >= config.max_seconds:
                    report.skipped.append(f"{len(plan) - index} of {len(plan)} problems: no time was left for them")
                    break
                bar.set_description(f"validate {op} {dtype} {problem.label}")
                # Its calls are PyTorch's in every dtype: what can be wrong is which columns they take.
                leaves_split_out = config.quick and dtype != dtypes[0]
                served = [name for name in names if name != backends.SPLIT or not leaves_split_out]
                _validate_problem(op, dtype, problem, cases, served, report, bar)
        if "cpp" in names and "fp32" in dtypes and "partitioned_conv2d" in op_names:
            report.winograd = _winograd_errors(config.seed)
    return report


def _usable_backends(config: ValidateConfig, report: ValidateReport) -> list[str]:
    reasons = {name: backends.unavailable_reason(name, config.device) for name in backends.BACKENDS}
    if config.backends == "all":
        report.skipped += [f"backend {name}: {reason}" for name, reason in reasons.items() if reason is not None]
        return [*(name for name, reason in reasons.items() if reason is None), backends.SPLIT]
    names = split_choices("backends", config.backends, backends.BACKENDS)
    for name in names:
        if reasons[name] is not None:
            on_gpu = config.device == "cpu" and backends.unavailable_reason(name, "cuda") is None
            hint = " Add --device cuda." if on_gpu else ""
            raise RuntimeError(f"backends: expected usable backends, got {name!r}, but {reasons[name]}.{hint}")
    return names


def _backends_of(op: str, names: list[str]) -> list[str]:
    """Those of `names` that the op can run on. `partition` has no backends: its stock operators count as aten's."""
    if op not in backends.OPS:
        return [name for name in names if name == "aten"]
    return [name for name in names if name != backends.SPLIT or op in _TWO_CALL_OPS]


def _function(op: str, backend: str) -> Callable:
    return functools.partial(getattr(ops, op), backend=backend) if op in backends.OPS else partition


def _unsupported(op: str, dtype: str, config: ValidateConfig) -> str | None:
    """Why stock PyTorch itself cannot compute the op in this dtype on this device, or None."""
    problem = PROBLEMS[op]()[0]
    tensors = _make_tensors(problem, dtype, config.device, config.seed)
    try:
        problem.cases(problem)[0].canonical().run(getattr(reference, op), problem, tensors, torch.ones)
    except RuntimeError as error:
        return str(error).splitlines()[0]
    return None


def _make_tensors(problem: Problem, dtype: str, device: str, seed: int) -> dict[str, Tensor | None]:
    """Random tensors, rounded to `dtype`: the float64 reference starts from the same numbers."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: None if shape is None else _random(problem, shape, generator, name).to(device, DTYPES[dtype])
        for name, shape in problem.tensors.items()
    }


def _random(problem: Problem, shape: tuple[int, ...], generator: torch.Generator, name: str = "") -> Tensor:
    values = torch.randn(shape, generator=generator)
    values = values if problem.signed else values.abs()
    return values.mul(2).round().div(2) if problem.has_ties and name == "input" else values


def _grad_maker(problem: Problem, dtype: str, device: str, seed: int) -> MakeGrad:
    """Random gradients, rounded to `dtype`; the same for the same shape."""

    def make_grad(shape: torch.Size) -> Tensor:
        generator = torch.Generator().manual_seed(seed + 1)
        return _random(problem, shape, generator).to(device, DTYPES[dtype])

    return make_grad


def _double(tensors: dict[str, Tensor | None]) -> dict[str, Tensor | None]:
    return {name: None if tensor is None else tensor.double() for name, tensor in tensors.items()}


def _validate_problem(
    op: str, dtype: str, problem: Problem, cases: list[Case], names: list[str], report: ValidateReport, bar: Any
) -> None:
    config = report.config
    tensors = _make_tensors(problem, dtype, config.device, config.seed)
    make_grad = _grad_maker(problem, dtype, config.device, config.seed)
    exact = _double(tensors)
    oracle: dict[Case, dict[str, Tensor]] = {}
    for case in cases:
        canonical = case.canonical()
        if canonical not in oracle:
            oracle[canonical] = canonical.run(getattr(reference, op), problem, exact, make_grad)
        for name in _backends_of(op, names):
            label = f"{problem.label}: {case}"
            refused = backends.unsupported_dtype(op, name, DTYPES[dtype])
            reason = refused or case.unsupported(problem, name, DTYPES[dtype])
            if reason is not None:
                skipped = f"{op} {name} {dtype}: {reason}"
                report.skipped += [] if skipped in report.skipped else [skipped]
                continue
            try:
                results = case.run(_function(op, name), problem, tensors, make_grad)
            # A kernel that crashes is a finding like one that is wrong.
            except Exception as error:
                report.add(op, name, dtype, label, failure("error", f"{type(error).__name__}: {error}"))
                continue
            used = str(backends.last_used(op)).partition(":")[0] if op in backends.OPS else name
            ran = Comparison("backend", 0.0, 0.0, 0.0, EXACT)
            report.add(op, name, dtype, label, ran if used == name else failure("backend", f"{used} ran"))
            for comparison in case.compare(problem, results, oracle[canonical], TOLERANCES[DTYPES[dtype]]):
                report.add(op, name, dtype, label, comparison)
        bar.update()


def _winograd_errors(seed: int) -> list[WinogradError]:
    """Of a convolution that is like a model's: Winograd's algorithm trades digits for speed, here is how many."""
    problem = winograd_problem()
    case = problem.cases(problem)[0].canonical()
    tensors = _make_tensors(problem, "fp32", "cpu", seed)
    make_grad = _grad_maker(problem, "fp32", "cpu", seed)
    oracle = case.run(reference.partitioned_conv2d, problem, _double(tensors), make_grad)
    found = []
    for enabled in (True, False):
        with choice.use_winograd(enabled):
            results = case.run(_function("partitioned_conv2d", "cpp"), problem, tensors, make_grad)
        found.append([compare(name, results[name], oracle[name]) for name in ("output", "grad_input", "grad_weight")])
    return [WinogradError(fast.name, fast, direct) for fast, direct in zip(*found, strict=True)]


@contextlib.contextmanager
def _strict_numerics() -> Iterator[None]:
    """Full float32 precision, and uninitialised memory full of NaN, so that an element nobody wrote shows.

    Winograd's convolutions wherever they apply: the problems are smaller than what they pay for.
    """
    filler: Any = torch.utils.deterministic  # an object in a module's place, which the type checker cannot see into
    before = filler.fill_uninitialized_memory
    was_deterministic = torch.are_deterministic_algorithms_enabled()
    was_warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    try:
        torch.use_deterministic_algorithms(True, warn_only=True)
        filler.fill_uninitialized_memory = True
        with warnings.catch_warnings(), choice.use_winograd(True), fp32_precision("ieee"):
            warnings.filterwarnings("ignore", message=".*deterministic")
            yield
    finally:
        torch.use_deterministic_algorithms(was_deterministic, warn_only=was_warn_only)
        filler.fill_uninitialized_memory = before
