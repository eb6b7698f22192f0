"""`dfs validate` passes on the kernels that are right, and fails, by name, on ones that are broken on purpose."""

import functools
import importlib
import itertools
import json
import random

import pytest
import torch
import torch.nn.functional as F

from dfs_engine import ops, validate
from dfs_engine.ops import _two_calls
from dfs_engine.ops._common import ATEN
from dfs_engine.ops.linear import _matrix
from dfs_engine.partition import fork_gradient
from dfs_engine.runtime import backend as backends
from dfs_engine.validate import ValidateConfig
from dfs_engine.validate.cases import covering_sample
from dfs_engine.validate.problems import PROBLEMS
from dfs_engine.validate.report import ValidateReport
from dfs_engine.validate.tolerances import DTYPES

RUN = importlib.import_module("dfs_engine.validate.run")  # the package has a function of that name
PASSES = {"partitioned_conv2d": "conv2d", "partitioned_linear": "linear"}


def quick(**options) -> ValidateReport:
    return validate.run(ValidateConfig(quick=True, progress=False, **options))


def breached(report: ValidateReport) -> set[str]:
    return {row.tensor for row in report.rows if not row.ok}


@pytest.mark.parametrize("dtype", ["fp64", "fp32", "bf16", "fp16"])
def test_every_usable_backend_passes(dtype):
    report = quick(dtypes=dtype, seed=int(torch.randint(2**31, ())))
    assert report.ok, report.table()
    usable = {name for name in backends.BACKENDS if backends.unavailable_reason(name) is None}
    asked = {(op, name) for op in backends.OPS for name in usable}
    served = {(op, name) for op, name in asked if backends.unsupported_dtype(op, name, DTYPES[dtype]) is None}
    two_calls = {("partitioned_conv2d", "split"), ("partitioned_linear", "split")}
    assert {(row.op, row.backend) for row in report.rows} == served | two_calls | {("partition", "aten")}
    # Stock under a kernel's name would pass, and say nothing of the kernel.
    for op, name in asked - served:
        assert any(f"{op} {name} {dtype}: it has no kernel" in line for line in report.skipped)
    sliced = {"output", "grad_input outside", "grad_weight outside"}
    produced = {"full", "shared", "average", "exit", "running_mean", "running_var"}
    # In half precision a residual is judged where bf16 storage is summed in fp32: by the cpp backend.
    judged = dtype in ("fp64", "fp32") or (dtype == "bf16" and "cpp" in usable)
    produced |= {"grad_residual"} if judged else set()
    everywhere = {"grad_input", "grad_weight", "grad_bias", "backend"}
    partitioned = {row.tensor for row in report.rows if row.op == "partition"}
    assert partitioned == {"full", "shared", "exit", "grad_input", "backend"}
    for op in backends.OPS[:-1]:
        expected = everywhere | (produced if op == "norm_act" else sliced)
        expected |= {"grad_norm_weight", "grad_norm_bias"} if op == "partitioned_norm_linear" else set()
        assert {row.tensor for row in report.rows if row.op == op} == expected
    assert {row.tensor for row in report.rows if row.op == "conv_act"} == {"feature", "average", "backend"}


def test_all_combinations_are_there_without_quick(monkeypatch):
    problem = next(problem for problem in PROBLEMS["partitioned_linear"]() if problem.num_channels == 17)
    monkeypatch.setitem(PROBLEMS, "partitioned_linear", lambda: [problem])
    report = validate.run(ValidateConfig(ops="partitioned_linear", backends="aten", dtypes="fp64", progress=False))
    ends = [round(beta * 17) for beta in (0, 0.1, 0.3, 0.5, 0.7, 0.9, 1)]
    slices = {(0, k) for k in ends} | {(k, 17) for k in ends}
    output = next(row for row in report.rows if row.tensor == "output")
    cases = problem.cases(problem)
    assert output.num_cases == len(cases)
    modes = [(case.part, case.reference, case.form, case.layout) for case in cases if not case.alone]
    assert set(modes) == set(itertools.product(slices, (True, False), ("plain", "internal"), problem.layouts))
    assert len(modes) == len(slices) * 2 * 2 * 4
    assert {case.alone for case in cases} == {"", "input", "weight", "bias"}
    assert report.ok


@pytest.mark.parametrize("op", PROBLEMS)
def test_in_a_quick_sample_any_two_modes_meet_that_can(op):
    def pairs(problem, cases):
        return {pair for case in cases for pair in itertools.combinations(sorted(case.traits(problem)), 2)}

    samples = []
    for problem in PROBLEMS[op]():
        cases = problem.cases(problem)
        sample = covering_sample(problem, cases, random.Random(random.getrandbits(32)))
        assert pairs(problem, sample) == pairs(problem, cases), problem.label
        assert len(set(sample)) == len(sample) <= 26, problem.label
        samples.append(sample)
    others = [covering_sample(problem, problem.cases(problem), random.Random(1)) for problem in PROBLEMS[op]()]
    assert samples != others, "another seed draws others"


def off_by_one(compute):
    """The slice starts one channel early (late at the left edge)."""

    def broken(*args):
        *before, start, stop = args[:-1] if isinstance(args[-1], bool) else args
        after = args[-1:] if isinstance(args[-1], bool) else ()
        shift = -1 if start > 0 else 0
        return compute(*before, start + shift, stop + shift, *after)

    return broken


@pytest.mark.parametrize("op", PASSES)
def test_an_off_by_one_slice_is_found(monkeypatch, op):
    name = f"{PASSES[op]}_grad_input"
    monkeypatch.setitem(ATEN, name, off_by_one(ATEN[name]))
    report = quick(ops=op, backends="aten", dtypes="fp64")
    assert not report.ok
    assert breached(report) == {"grad_input"}
    assert f"BREACH: {op} aten fp64 grad_input:" in report.table()


@pytest.mark.parametrize("op", PASSES)
def test_a_gradient_outside_the_slice_is_found(monkeypatch, op):
    """The whole input's gradient, as stock autograd gives it."""
    correct = getattr(RUN.ops, op)
    stock = {"partitioned_conv2d": F.conv2d, "partitioned_linear": F.linear}[op]

    def broken(*args, start, stop, reference, backend, full=None, **options):
        result = correct(*args, start=start, stop=stop, reference=reference, backend=backend, full=full, **options)
        return stock(*args, **options) if full is None and reference else result

    monkeypatch.setattr(RUN.ops, op, broken)
    report = quick(ops=op, backends="aten", dtypes="fp32")
    assert not report.ok
    assert breached(report) == {"grad_input", "grad_input outside"}
    assert f"BREACH: {op} aten fp32 grad_input outside:" in report.table()


@pytest.mark.parametrize("op", PASSES)
@pytest.mark.parametrize("leftover", [0.0, float("nan"), "unwritten"])
def test_a_missing_column_of_the_weight_gradient_is_found(monkeypatch, op, leftover):
    name = f"{PASSES[op]}_grad_weight"
    compute = ATEN[name]

    def broken(*args):
        grad_weight, grad_bias = compute(*args)
        if leftover == "unwritten":
            result = torch.empty_like(grad_weight)
            result[:, :-1] = grad_weight[:, :-1]
            return result, grad_bias
        grad_weight[:, -1:] = leftover
        return grad_weight, grad_bias

    monkeypatch.setitem(ATEN, name, broken)
    report = quick(ops=op, backends="aten", dtypes="bf16")
    assert not report.ok
    assert breached(report) - {"grad_weight outside"} == {"grad_weight"}
    assert f"BREACH: {op} aten bf16 grad_weight:" in report.table()


@pytest.mark.parametrize(("op", "name"), [("partitioned_conv2d", "conv2d"), ("partitioned_linear", "linear")])
def test_two_stock_calls_that_leave_one_out_are_found(monkeypatch, op, name):
    correct = getattr(_two_calls, name)
    monkeypatch.setattr(_two_calls, name, lambda *args: correct(*args[:-1], False))  # nothing beside the slice is read
    report = quick(ops=op, dtypes="fp64")
    assert {row.backend for row in report.rows if not row.ok} == {"split"}
    assert {"output", "grad_weight"} <= breached(report)


def test_quick_compares_the_two_stock_calls_in_one_dtype():
    report = quick(ops="partitioned_linear", dtypes="fp32,bf16")
    assert {row.dtype for row in report.rows if row.backend == "split"} == {"fp32"}
    assert "backend split: quick compares it in fp32 alone" in report.skipped


CONV_BLOCK = importlib.import_module("dfs_engine.ops.norm_act")  # the package has a function of that name


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


class StatisticsOfABlock:
    """Of many pixels, the means over the first images."""

    def batch_norm(self, input, mean, variance, weight, bias, training, momentum, eps):
        if not training or input.numel() // input.size(1) <= 2048:
            return F.batch_norm(input, mean, variance, weight, bias, training, momentum, eps)
        F.batch_norm(input[:-1], mean, variance, weight, bias, training, momentum, eps)
        return F.batch_norm(input, None, None, weight, bias, training, momentum, eps)


class TrainingBackward:
    """In eval mode the gradient of training mode."""

    def batch_norm(self, input, mean, variance, weight, bias, training, momentum, eps):
        output = F.batch_norm(input, mean, variance, weight, bias, training, momentum, eps)
        if training or input.numel() == 0:
            return output
        trained = F.batch_norm(input, None, None, weight, bias, True, momentum, eps)
        return output.detach() + trained - trained.detach()


class LastOfTies:
    """The pool takes the last of equal pixels, as a kernel with >= for > does."""

    def __getattr__(self, name):
        return getattr(F, name)

    def max_pool2d(self, input, size):
        height, width = input.shape[2:]
        if height % size or width % size:
            return F.max_pool2d(input, size)
        return F.max_pool2d(input.flip(2, 3), size).flip(2, 3)


def without_residual(z, norm, residual, relu_first):
    """The residual is added, and gets no gradient."""
    return stock(z, norm, None if residual is None else residual.detach(), relu_first)


def unscaled_mean(live, full, start):
    """The exit's gradient reaches each pixel whole."""
    average = full.mean((2, 3))
    return live.sum((2, 3)) + (average[:, start:] - live.sum((2, 3))).detach(), average


stock = CONV_BLOCK._stock


@pytest.mark.parametrize(
    ("name", "broken", "tensors"),
    [
        ("oracle", StatisticsOfABlock(), {"running_mean", "running_var"}),
        ("oracle", TrainingBackward(), {"grad_input", "grad_weight"}),
        ("F", LastOfTies(), {"grad_input"}),
        ("_stock", without_residual, {"grad_residual"}),
        ("live_mean", unscaled_mean, {"grad_input", "grad_weight", "grad_bias", "grad_residual"}),
        ("fork_gradient", wrong_channels, {"grad_input", "grad_weight", "grad_bias", "grad_residual"}),
        ("fork_gradient", whole_gradient, {"grad_input", "grad_weight", "grad_bias", "grad_residual"}),
        ("oracle", BiasedVariance(), {"running_var"}),
    ],
    ids=[
        "statistics-of-a-block",
        "training-backward",
        "last-of-ties",
        "without-residual",
        "unscaled-mean",
        "wrong-channels",
        "whole-gradient",
        "biased-variance",
    ],
)
def test_a_broken_producer_is_found(monkeypatch, name, broken, tensors):
    monkeypatch.setattr(CONV_BLOCK, name, broken)
    found = set()
    for _ in range(3):  # a draw of shapes may have none on which one of the tensors is wrong
        report = quick(ops="norm_act", backends="aten", dtypes="fp64", seed=random.getrandbits(31))
        assert f"BREACH: norm_act aten fp64 {min(breached(report))}:" in report.table()
        found |= breached(report)
        if found == tensors:
            break
    assert found == tensors


def quick_with_any_seed(op, dtype="fp64"):
    return breached(quick(ops=op, backends="aten", dtypes=dtype, seed=random.getrandbits(31)))


@pytest.mark.parametrize("op", [op for op in PROBLEMS if op not in ("partition", "conv_act")])
@pytest.mark.parametrize("name", ["weight", "bias"])
def test_a_gradient_that_is_wrong_when_it_is_wanted_alone_is_found(monkeypatch, op, name):
    """As with the other parameters frozen: kernels and autograd's functions have paths of their own for it."""
    correct = getattr(RUN.ops, op)

    def broken(*args, **options):
        tensors = [*args, options.get("residual")]
        wanting = [tensor for tensor in tensors if isinstance(tensor, torch.Tensor) and tensor.requires_grad]
        position = {"partitioned_norm_linear": 2}.get(op, 0) + ("weight", "bias").index(name) + 1
        if len(wanting) == 1 and wanting[0] is args[position]:
            wanting[0].register_hook(lambda grad: grad * 1.01)
        return correct(*args, **options)

    monkeypatch.setattr(RUN.ops, op, broken)
    assert quick_with_any_seed(op) == {f"grad_{name}"}


def other_taps(input, conv, residual, **asked):
    turned = ops.FixedConv(conv.weight.flip(-1), conv.geometry, conv.bias, conv.scale, conv.shift)
    return ops.conv_act(input, turned, residual, **asked)


def doubled_average(*given, **asked):
    feature, average = ops.conv_act(*given, **asked)
    return feature, None if average is None else 2 * average


@pytest.mark.parametrize(
    ("broken", "tensors"),
    [
        (other_taps, None),
        (lambda input, conv, residual, **asked: ops.conv_act(input, conv, None, **asked), None),
        (lambda input, conv, residual, **asked: ops.conv_act(input, conv, residual, **asked | {"relu": True}), None),
        (doubled_average, {"average"}),
    ],
    ids=["other-taps", "without-residual", "unasked-relu", "doubled-average"],
)
def test_a_broken_convolution_for_evaluation_is_found(monkeypatch, broken, tensors):
    with monkeypatch.context() as patched:
        patched.setattr(RUN, "_function", lambda op, backend: functools.partial(broken, backend=backend))
        found = quick_with_any_seed("conv_act")
    assert found == (tensors or {"feature", "average"})


PARTITION = importlib.import_module("dfs_engine.partition")  # the package has a function of that name


@pytest.mark.parametrize("op", ["partition", "norm_act"])
@pytest.mark.parametrize("missing", ["shared", "exit"])
def test_memory_that_nobody_writes_when_a_reader_is_missing_is_found(monkeypatch, op, missing):
    correct = PARTITION._Partition.backward

    def broken(ctx, _, grad_shared, grad_exit):
        grad, *nones = correct(ctx, _, grad_shared, grad_exit)
        if {"shared": grad_shared, "exit": grad_exit}[missing] is not None:
            return grad, *nones
        forgotten = slice(0, ctx.num_shared) if missing == "shared" else slice(ctx.num_shared, None)
        result = torch.empty_like(grad)
        written = torch.ones(grad.size(ctx.dim), dtype=torch.bool)
        written[forgotten] = False
        result.movedim(ctx.dim, 0)[written] = grad.movedim(ctx.dim, 0)[written]
        return result, *nones

    monkeypatch.setattr(PARTITION._Partition, "backward", staticmethod(broken))
    assert "grad_input" in quick_with_any_seed(op)


def by_winograd(weight, stride, padding, dilation, groups, start, stop):
    columns = weight[:, start:stop] if groups == 1 else weight
    is_plain = stride == dilation == (1, 1) and groups == 1 and max(padding) <= 2
    return weight.dtype == torch.float32 and is_plain and columns.shape[2:] == (3, 3) and min(columns.shape[:2]) >= 16


def padding_of_the_other_axis(compute):
    """Winograd's tiles start, along a row, where the padding of the columns says."""

    def broken(grad_output, weight, size, stride, padding, dilation, groups, start, stop, channels_last):
        if not by_winograd(weight, stride, padding, dilation, groups, start, stop):
            return compute(grad_output, weight, size, stride, padding, dilation, groups, start, stop, channels_last)
        before = 2 - padding[0]
        after = size[3] + 2 - grad_output.size(3) - before
        turned = weight[:, start:stop].transpose(0, 1).flip(2, 3)
        return F.conv2d(F.pad(grad_output, (before, after, before, before)), turned)

    return broken


def a_row_too_far(compute):
    """Winograd's tiles whose last row is one behind the image count as inside: they read the next image's first row."""

    def broken(grad_output, weight, size, stride, padding, dilation, groups, start, stop, channels_last):
        modes = (stride, padding, dilation, groups, start, stop)
        grad_input = compute(grad_output, weight, size, *modes, channels_last)
        height, width = grad_output.shape[2:]
        above, left = 2 - padding[0], 2 - padding[1]
        tile = height + 1 - 6 + above
        if not by_winograd(weight, *modes) or not grad_output.numel() or tile % 4 or tile < above:
            return grad_input
        too_much = torch.cat([grad_output, grad_output.roll(-1, 0)[:, :, :1]], 2)
        size = [*size[:2], size[2] + 1, size[3]]
        wrong = compute(too_much, weight, size, *modes, channels_last)
        rows = slice(tile, min(tile + 4, grad_input.size(2)))
        for column in range(0, size[3], 4):
            if left <= column <= width - 6 + left:
                columns = slice(column, column + 4)
                grad_input[:, :, rows, columns] = wrong[:, :, rows, columns]
        return grad_input

    return broken


def groups_off_by_one(compute):
    """Of several groups, the weight of the ones before."""

    def broken(grad_output, weight, size, stride, padding, dilation, groups, *slice_and_layout):
        weight = weight.roll(1, 0) if groups > 1 else weight
        return compute(grad_output, weight, size, stride, padding, dilation, groups, *slice_and_layout)

    return broken


def strides_ignored(compute):
    """The last axis of the gradient is read as if it had stride 1."""

    def broken(grad_output, *args):
        if grad_output.numel() and grad_output.stride(-1) == 0:
            grad_output = grad_output.as_strided(grad_output.shape, (*grad_output.stride()[:-1], 1))
        return compute(grad_output, *args)

    return broken


def last_channel_missing(compute):
    """The slice stops one early."""

    def broken(*args):
        grad_input = compute(*args).clone()
        axis = -3 if len(args) > 4 else -1
        if grad_input.size(axis):
            grad_input.select(axis, -1).zero_()
        return grad_input

    return broken


def dilation_ignored(compute):
    def broken(grad_output, input, size, stride, padding, dilation, *rest):
        taps = size[2:]
        padding = tuple(p - (d - 1) * (k - 1) // 2 for p, d, k in zip(padding, dilation, taps, strict=True))
        return compute(grad_output, input, size, stride, padding, (1, 1), *rest)

    return broken


def last_pixels_missing(compute):
    """The last of several blocks of images."""

    def broken(grad_output, input, *args):
        many = grad_output.numel() // max(grad_output.size(1), 1) > 4096
        return compute(grad_output[:-1], input[:-1], *args) if many else compute(grad_output, input, *args)

    return broken


def depth_block_missing(compute):
    """A product of a depth that no block of 320 divides, beyond the first."""

    def broken(grad_output, other, *args):
        rows = _matrix(grad_output)
        if not isinstance(args[0], bool):  # grad_input: the depth is the output's features
            depth = rows.size(1) // 320 * 320 or rows.size(1)
            return compute(grad_output[..., :depth], other[:depth], *args)
        depth = rows.size(0) // 320 * 320 or rows.size(0)
        return compute(rows[:depth], _matrix(other)[:depth], *args)

    return broken


def summed_in_half_precision(compute):
    """Every term is rounded into the sum."""

    def broken(grad_output, input, bias, dtype=None):
        rows, columns = _matrix(grad_output), _matrix(input)
        total = rows.new_zeros(rows.size(1), columns.size(1))
        for row, column in zip(rows, columns, strict=True):
            total += row[:, None] * column
        return total.to(dtype), rows.sum(0, dtype=dtype) if bias else rows.new_empty(0, dtype=dtype)

    return broken


@pytest.mark.parametrize(
    ("op", "dtype", "name", "plant"),
    [
        ("partitioned_conv2d", "fp32", "grad_input", padding_of_the_other_axis),
        ("partitioned_conv2d", "fp32", "grad_input", a_row_too_far),
        ("partitioned_conv2d", "fp64", "grad_input", groups_off_by_one),
        ("partitioned_conv2d", "fp64", "grad_input", strides_ignored),
        ("partitioned_conv2d", "bf16", "grad_input", last_channel_missing),
        ("partitioned_conv2d", "fp64", "grad_weight", dilation_ignored),
        ("partitioned_conv2d", "fp32", "grad_weight", last_pixels_missing),
        ("partitioned_linear", "fp64", "grad_input", strides_ignored),
        ("partitioned_linear", "fp16", "grad_input", last_channel_missing),
        ("partitioned_linear", "fp32", "grad_input", depth_block_missing),
        ("partitioned_linear", "fp32", "grad_weight", depth_block_missing),
        ("partitioned_linear", "bf16", "grad_weight", summed_in_half_precision),
        ("partitioned_norm_linear", "fp64", "grad_input", depth_block_missing),
        ("partitioned_norm_linear", "fp64", "grad_weight", depth_block_missing),
    ],
)
def test_a_broken_gradient_is_found(monkeypatch, op, dtype, name, plant):
    name = f"{PASSES.get(op, 'linear')}_{name}"  # whose products norm_linear takes
    monkeypatch.setitem(ATEN, name, plant(ATEN[name]))
    found = quick_with_any_seed(op, dtype)
    sliced = {"grad_input"} if name.endswith("grad_input") else {"grad_weight"}
    # The last, where a column beside the slice becomes a wrong number rather than zero.
    assert sliced <= found <= sliced | {"grad_norm_weight", "grad_bias", "grad_input outside", "grad_weight outside"}


def test_a_partition_that_rounds_down_is_found(monkeypatch):
    class Floor(PARTITION.Partition):
        def __init__(self, num_channels, beta):
            super().__init__(num_channels, beta)
            self.num_shared = int(beta * num_channels)

    monkeypatch.setattr(PARTITION, "Partition", Floor)
    assert quick_with_any_seed("partition") == {"shared", "exit", "grad_input"}


def test_partition_has_no_backends():
    report = quick(ops="partition,partitioned_linear", backends="reference", dtypes="fp64")
    assert report.ok
    assert {row.op for row in report.rows} == {"partitioned_linear"}
    assert "partition: it has no backends, and its stock operators come under aten" in report.skipped


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

    monkeypatch.setitem(ATEN, "linear_grad_weight", crash)
    report = quick(ops="partitioned_linear", backends="aten", dtypes="fp64")
    assert not report.ok
    assert "IndexError: deep inside" in report.table()


def test_a_silent_fallback_is_a_breach(monkeypatch):
    monkeypatch.setattr(RUN.backends, "last_used", lambda op: "reference")
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
            torch.backends.cuda.matmul.fp32_precision,
            torch.backends.cudnn.conv.fp32_precision,
        )

    before = settings()
    quick(ops="partitioned_linear", backends="reference", dtypes="fp64")
    assert settings() == before


def test_report_is_strict_json_even_with_infinite_errors(monkeypatch):
    monkeypatch.setitem(ATEN, "linear_grad_weight", lambda *args: (torch.full((1, 1), float("nan")), torch.zeros(1)))
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
