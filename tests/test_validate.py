"""`dfs validate` passes on the kernels that are right, and fails, by name, on ones that are broken on purpose."""

import importlib
import json

import pytest
import torch
import torch.nn.functional as F

from dfs_engine import backend as backends
from dfs_engine import validate
from dfs_engine.compare import DTYPES
from dfs_engine.ops import conv2d, linear
from dfs_engine.partition import fork_gradient
from dfs_engine.validate import ValidateConfig
from dfs_engine.validate_problems import PROBLEMS

MODULES = {"partitioned_conv2d": conv2d, "partitioned_linear": linear}


def quick(**options) -> validate.ValidateReport:
    return validate.run(ValidateConfig(quick=True, progress=False, **options))


def breached(report: validate.ValidateReport) -> set[str]:
    return {row.tensor for row in report.rows if not row.ok}


@pytest.mark.parametrize("dtype", ["fp64", "fp32", "bf16", "fp16"])
def test_every_usable_backend_passes(dtype):
    report = quick(dtypes=dtype, seed=int(torch.randint(2**31, ())))
    assert report.ok, report.table()
    usable = {name for name in backends.BACKENDS if backends.unavailable_reason(name) is None}
    served = {
        (op, name) for op in PROBLEMS for name in usable if backends.unsupported_dtype(op, name, DTYPES[dtype]) is None
    }
    assert {(row.op, row.backend) for row in report.rows} == served
    # Stock under a kernel's name would pass, and say nothing of the kernel.
    for op, name in {(op, name) for op in PROBLEMS for name in usable} - served:
        assert any(f"{op} {name} {dtype}: it has no kernel for" in line for line in report.skipped)
    sliced = {"output", "grad_input outside", "grad_weight outside"}
    produced = {"full", "shared", "average", "exit", "running_mean", "running_var"}
    # In half precision a residual is judged where bf16 storage is summed in fp32: by the cpp backend.
    judged = dtype in ("fp64", "fp32") or (dtype == "bf16" and "cpp" in usable)
    produced |= {"grad_residual"} if judged else set()
    everywhere = {"grad_input", "grad_weight", "grad_bias", "backend"}
    for op in PROBLEMS:
        expected = everywhere | (produced if op == "conv_block" else sliced)
        expected |= {"grad_norm_weight", "grad_norm_bias"} if op == "partitioned_norm_linear" else set()
        assert {row.tensor for row in report.rows if row.op == op} == expected


def test_all_combinations_are_there_without_quick(monkeypatch):
    problem = next(problem for problem in PROBLEMS["partitioned_linear"]() if problem.num_channels == 17)
    monkeypatch.setitem(PROBLEMS, "partitioned_linear", lambda: [problem])
    report = validate.run(ValidateConfig(ops="partitioned_linear", backends="aten", dtypes="fp64", progress=False))
    ends = [round(beta * 17) for beta in (0, 0.1, 0.3, 0.5, 0.7, 0.9, 1)]
    slices = {(0, k) for k in ends} | {(k, 17) for k in ends}
    output = next(row for row in report.rows if row.tensor == "output")
    assert output.num_cases == len(slices) * 2 * 2 * 4
    assert report.ok


def off_by_one(compute):
    """The slice starts one channel early (late at the left edge)."""

    def broken(*args):
        *before, start, stop = args[:-1] if isinstance(args[-1], bool) else args
        after = args[-1:] if isinstance(args[-1], bool) else ()
        shift = -1 if start > 0 else 0
        return compute(*before, start + shift, stop + shift, *after)

    return broken


@pytest.mark.parametrize("op", MODULES)
def test_an_off_by_one_slice_is_found(monkeypatch, op):
    module = MODULES[op]
    monkeypatch.setattr(module, "aten_grad_input", off_by_one(module.aten_grad_input))
    report = quick(ops=op, backends="aten", dtypes="fp64")
    assert not report.ok
    assert breached(report) == {"grad_input"}
    assert f"BREACH: {op} aten fp64 grad_input:" in report.table()


@pytest.mark.parametrize("op", MODULES)
def test_a_gradient_outside_the_slice_is_found(monkeypatch, op):
    """The whole input's gradient, as stock autograd gives it."""
    correct = getattr(validate.ops, op)
    stock = {"partitioned_conv2d": F.conv2d, "partitioned_linear": F.linear}[op]

    def broken(*args, start, stop, reference, backend, full=None, **options):
        result = correct(*args, start=start, stop=stop, reference=reference, backend=backend, full=full, **options)
        return stock(*args, **options) if full is None and reference else result

    monkeypatch.setattr(validate.ops, op, broken)
    report = quick(ops=op, backends="aten", dtypes="fp32")
    assert not report.ok
    assert breached(report) == {"grad_input", "grad_input outside"}
    assert f"BREACH: {op} aten fp32 grad_input outside:" in report.table()


@pytest.mark.parametrize("op", MODULES)
@pytest.mark.parametrize("leftover", [0.0, float("nan"), "unwritten"])
def test_a_missing_column_of_the_weight_gradient_is_found(monkeypatch, op, leftover):
    module = MODULES[op]
    compute = module.aten_grad_weight

    def broken(*args):
        grad_weight, grad_bias = compute(*args)
        if leftover == "unwritten":
            result = torch.empty_like(grad_weight)
            result[:, :-1] = grad_weight[:, :-1]
            return result, grad_bias
        grad_weight[:, -1:] = leftover
        return grad_weight, grad_bias

    monkeypatch.setattr(module, "aten_grad_weight", broken)
    report = quick(ops=op, backends="aten", dtypes="bf16")
    assert not report.ok
    assert breached(report) - {"grad_weight outside"} == {"grad_weight"}
    assert f"BREACH: {op} aten bf16 grad_weight:" in report.table()


CONV_BLOCK = importlib.import_module("dfs_engine.ops.conv_block")  # the package has a function of that name


def wrong_channels(feature, num_shared, exit_start, dim=1):
    """The exit's gradient reaches the channels one before its own."""
    full, shared, _ = fork_gradient(feature, num_shared, exit_start, dim)
    return full, shared, feature.narrow(dim, max(exit_start - 1, 0), feature.size(dim) - exit_start)


def whole_gradient(feature, num_shared, exit_start, dim=1):
    """As stock autograd routes: the deeper path trains everything."""
    full, _, live = fork_gradient(feature, num_shared, exit_start, dim)
    return full, feature.narrow(dim, 0, num_shared) + (feature.sum() - feature.sum().detach()), live


class BiasedVariance:
    """Running statistics with the wrong variance, everything else right."""

    def batch_norm(self, input, mean, variance, *parameters):
        output = F.batch_norm(input, mean, variance, *parameters)
        if parameters[2]:
            variance.data.mul_(0.99)  # behind autograd, which keeps it for the backward
        return output


@pytest.mark.parametrize(
    ("name", "broken", "tensors"),
    [
        ("fork_gradient", wrong_channels, {"grad_input", "grad_weight", "grad_bias", "grad_residual"}),
        ("fork_gradient", whole_gradient, {"grad_input", "grad_weight", "grad_bias", "grad_residual"}),
        ("oracle", BiasedVariance(), {"running_var"}),
    ],
    ids=["wrong-channels", "whole-gradient", "biased-variance"],
)
def test_a_broken_producer_is_found(monkeypatch, name, broken, tensors):
    monkeypatch.setattr(CONV_BLOCK, name, broken)
    report = quick(ops="conv_block", backends="aten", dtypes="fp64")
    assert breached(report) == tensors
    assert f"BREACH: conv_block aten fp64 {min(tensors)}:" in report.table()


def test_the_error_of_winograd_is_told_beside_the_direct_one(monkeypatch):
    if backends.unavailable_reason("cpp") is not None:
        pytest.skip(backends.unavailable_reason("cpp"))
    problems = PROBLEMS["partitioned_conv2d"]()
    monkeypatch.setitem(PROBLEMS, "partitioned_conv2d", lambda: problems[:1])
    report = quick(ops="partitioned_conv2d", dtypes="fp32")
    rows = report.to_json()["winograd"]
    assert [row["tensor"] for row in rows] == ["output", "grad_input", "grad_weight"]
    for row in rows:
        assert f"winograd {row['tensor']}: rms ratio {row['winograd_rms_ratio']:.1e} (direct" in report.table()
        # Fewer digits than the direct one, and far inside the tolerance.
        assert row["direct_rms_ratio"] < row["winograd_rms_ratio"] < 1e-5
    assert quick(ops="partitioned_conv2d", dtypes="fp64").winograd == []


def test_a_crash_is_a_breach_that_names_its_message(monkeypatch):
    def crash(*args):
        raise IndexError("deep inside")

    monkeypatch.setattr(linear, "aten_grad_weight", crash)
    report = quick(ops="partitioned_linear", backends="aten", dtypes="fp64")
    assert not report.ok
    assert "IndexError: deep inside" in report.table()


def test_a_silent_fallback_is_a_breach(monkeypatch):
    monkeypatch.setattr(validate.backends, "last_used", lambda op: "reference")
    report = quick(ops="partitioned_linear", backends="aten", dtypes="fp64")
    assert breached(report) == {"backend"}
    assert "reference ran" in report.table()


def test_settings_of_torch_are_restored():
    def settings():
        return (
            torch.are_deterministic_algorithms_enabled(),
            torch.is_deterministic_algorithms_warn_only_enabled(),
            torch.utils.deterministic.fill_uninitialized_memory,
            torch.backends.fp32_precision,
        )

    before = settings()
    quick(ops="partitioned_linear", backends="reference", dtypes="fp64")
    assert settings() == before


def test_report_is_strict_json_even_with_infinite_errors(monkeypatch):
    monkeypatch.setattr(linear, "aten_grad_weight", lambda *args: (torch.full((1, 1), float("nan")), torch.zeros(1)))
    report = quick(ops="partitioned_linear", backends="aten", dtypes="fp32")
    assert not json.loads(json.dumps(report.to_json(), allow_nan=False))["ok"]


def test_without_a_gpu_its_device_is_refused():
    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(RuntimeError, match="validate: expected a CUDA device, got device='cuda' where torch sees none"):
        quick(device="cuda")


def test_on_a_machine_with_a_gpu_the_error_says_how_to_use_it(monkeypatch):
    reason = backends.unavailable_reason
    monkeypatch.setattr(backends, "unavailable_reason", lambda name, device: reason(name) if device == "cpu" else None)
    with pytest.raises(RuntimeError, match=r"'triton', but .* cuda tensors.*Add --device cuda\.$"):
        quick(backends="triton")


def test_a_backend_that_is_not_there_is_an_error_when_named_and_skipped_otherwise():
    with pytest.raises(RuntimeError, match="backends: expected usable backends, got 'triton'"):
        quick(backends="aten,triton")
    report = quick(ops="partitioned_linear", dtypes="fp64")
    assert any("backend triton" in line for line in report.skipped)


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("ops", "partitioned_conv", "Did you mean 'partitioned_conv2d'"),
        ("backends", "atne", "Did you mean 'aten'"),
        ("dtypes", "fp23", "expected one of fp64, fp32, bf16, fp16"),
        ("dtypes", "", "expected a comma-separated list"),
        ("device", "gpu", "expected one of cpu, cuda"),
    ],
)
def test_bad_names(option, value, message):
    with pytest.raises(ValueError, match=message):
        ValidateConfig(**{option: value})
