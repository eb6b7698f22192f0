"""norm_act against stock PyTorch in float64, over shapes, dtypes, layouts, statistics and routes."""

import itertools
import math
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dfs_engine import create_model, ops, reference
from dfs_engine.nn import Fork, apply_norm_relu, convert_layers, produce_readings
from dfs_engine.ops import ProducedFeature, norm_act
from dfs_engine.runtime import backend as backends
from dfs_engine.validate.tolerances import TOLERANCES, Tolerance, assert_close

pytestmark = pytest.mark.usefixtures("poison")

# (N, C, H, W): odd sizes, so that a pool leaves a row or a column over; channels beside the vector widths.
SHAPES = [(2, 17, 5, 7), (1, 3, 4, 5), (3, 1, 9, 2), (2, 65, 6, 6), (1, 256, 3, 4), (4, 16, 2, 2)]
LEAVES = ("z", "weight", "bias", "residual")
STATISTICS = ("running_mean", "running_var")
OUTPUTS = ProducedFeature._fields


class Form(NamedTuple):
    """What the block is made of."""

    relu_first: bool = True
    pool: bool = False
    residual: bool = False

    @property
    def options(self) -> dict[str, bool]:
        return {"relu_first": self.relu_first, "pool": self.pool}


FORMS = {
    "relu-first": Form(),
    "relu-first-pool": Form(pool=True),
    "relu-last": Form(relu_first=False),
    "relu-last-pool": Form(relu_first=False, pool=True),
    "residual": Form(relu_first=False, residual=True),
}
FORM = pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
TRAINING = pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])


def routes(channels: int) -> list[tuple[int, int]]:
    """(num_shared, exit_start) of exit_gradient="own", the last block, beta = 1, exit_gradient="whole", and between."""
    half = channels // 2
    return [(half, half), (0, 0), (channels, channels), (half, 0), (half, half // 2)]


def make(
    shape: tuple[int, ...], dtype: torch.dtype = torch.float32, form: Form = FORMS["relu-first"], training: bool = True
) -> dict[str, Tensor]:
    """Parameters and statistics stay in float32 at least, as under autocast; `residual` only where `form` has one.

    z is normal and its elements lie apart, no weight is near zero, and what reaches a last ReLU stays clear of zero:
    rounding then makes no two pixels of a pool's window equal, and no pixel negative that was positive, which would
    send the gradient elsewhere.
    """
    channels, wide = shape[1], torch.promote_types(dtype, torch.float32)
    size = max(math.prod(shape), 1)
    spread = torch.special.ndtri((torch.randperm(math.prod(shape), dtype=torch.float64) + torch.rand(())) / size)
    weight = torch.randn(channels)
    tensors = {
        "z": spread.reshape(shape).to(dtype),
        "weight": (weight + 0.5 * weight.sign()).to(wide),
        "bias": torch.randn(channels).to(wide),
        "running_mean": torch.randn(channels).to(wide),
        "running_var": torch.rand(channels).to(wide) + 0.5,
    }
    if form.residual:
        tensors["residual"] = residual_of(tensors, training)
    elif not form.relu_first and size > channels:
        # Zero lies in a wide gap between two values of each channel, not far from its median.
        values = normalise(tensors | {"bias": torch.zeros(channels)}, training)
        values = values.transpose(0, 1).flatten(1).sort(1).values
        quarter = values.size(1) // 4
        below = quarter + values.diff()[:, quarter : 3 * quarter + 1].argmax(1, keepdim=True)
        tensors["bias"] = -(values.gather(1, below) + values.gather(1, below + 1)).flatten().div(2).to(wide)
    return tensors


def normalise(tensors: dict[str, Tensor], training: bool) -> Tensor:
    """In float64; leaves the statistics alone."""
    z, weight, bias, mean, var = (tensors[name].double() for name in ("z", "weight", "bias", *STATISTICS))
    return F.batch_norm(z, mean.clone(), var.clone(), weight, bias, training)


def residual_of(tensors: dict[str, Tensor], training: bool) -> Tensor:
    """One that keeps the sum clear of zero."""
    z = tensors["z"]
    total = torch.randn(z.shape, dtype=torch.float64)
    return (total + 0.1 * total.sign() - normalise(tensors, training)).to(z.dtype)


def call(op, leaves: dict[str, Tensor], statistics=(None, None), **options) -> ProducedFeature:
    """`op` on tensors by name; without running statistics unless they are given."""
    given = (leaves[name] for name in ("z", "weight", "bias"))
    return ProducedFeature(*op(*given, *statistics, residual=leaves.get("residual"), **options))


def leaves_of(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensors[name].detach().requires_grad_() for name in LEAVES if name in tensors}


def evaluate(op, tensors: dict[str, Tensor], grads: tuple[Tensor, Tensor] | None = None, **options) -> dict:
    """Everything that comes out of `op`: four parts, gradients, running statistics; and the `incoming` gradients."""
    leaves = leaves_of(tensors)
    statistics = [tensors[name].clone() for name in STATISTICS]
    produced = call(op, leaves, statistics, **options)
    if grads is None:
        grads = torch.randn_like(produced.shared), torch.randn_like(produced.exit)
    found = torch.autograd.grad([produced.shared, produced.exit], list(leaves.values()), grads, materialize_grads=True)
    results = {name: tensor.detach() for name, tensor in produced._asdict().items()}
    results |= {f"grad_{name}": grad for name, grad in zip(leaves, found, strict=True)}
    return results | dict(zip(STATISTICS, statistics, strict=True)) | {"incoming": grads}


def check(tensors: dict[str, Tensor], *, backend: str, grads=None, tolerance: Tolerance | None = None, **options):
    """Compares op and float64 oracle on everything; returns the op's results."""
    actual = evaluate(norm_act, tensors, grads, backend=backend, **options)
    wide = {name: tensor.double() for name, tensor in tensors.items()}
    grads = tuple(grad.double() for grad in actual.pop("incoming"))
    expected = evaluate(reference.norm_act, wide, grads, **options)
    for name, value in actual.items():
        assert value.dtype == tensors.get(name.removeprefix("grad_"), tensors["z"]).dtype, name
    for results in (actual, expected):
        # Together: the terms of one sum may cancel, and with one channel nothing else would tell the scale.
        results["grad_parameters"] = torch.cat([results["grad_weight"], results["grad_bias"]])
    for name in actual.keys() - {"grad_weight", "grad_bias"}:
        value = actual[name]
        if name == "grad_z" and not (expected[name].abs() > 1e-9).any():
            # A gradient that is the same on all pixels does not get past the statistics: only rounding is left.
            assert not (value.abs() > 1e-5).any(), name
            continue
        assert_close(name, value, expected[name], tolerance)
    return actual


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@FORM
@TRAINING
def test_equals_stock_in_float64(shape, form, training, backend, exact_dtype):
    for num_shared, exit_start in routes(shape[1]):
        check(
            make(shape, exact_dtype, form, training),
            backend=backend,
            **form.options,
            training=training,
            num_shared=num_shared,
            exit_start=exit_start,
        )
        assert backends.last_used("norm_act").partition(":")[0] == backend


@pytest.fixture
def cpp() -> str:
    reason = backends.unavailable_reason("cpp")
    if reason is not None:
        pytest.skip(reason)
    return "cpp"


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@FORM
@TRAINING
def test_bf16_storage_with_fp32_sums(shape, form, training, cpp):
    """Each result as good as its own dtype allows: the parameters' gradients and the statistics are in float32."""
    for num_shared, exit_start in routes(shape[1]):
        check(
            make(shape, torch.bfloat16, form, training),
            backend=cpp,
            **form.options,
            training=training,
            num_shared=num_shared,
            exit_start=exit_start,
        )


@pytest.mark.parametrize("name", ["relu-first", "relu-last", "residual"])
def test_bf16_by_stock_operators(name):
    form = FORMS[name]
    tensors = make((2, 17, 5, 7), torch.bfloat16, form)
    options = {**form.options, "num_shared": 8, "exit_start": 8}
    check(tensors, backend="aten", tolerance=TOLERANCES[torch.bfloat16], **options)


def channel_slice(tensor: Tensor) -> Tensor:
    """The same values, as a view into a tensor of more channels, with NaN around."""
    wide = tensor.new_full((tensor.size(0), tensor.size(1) + 5, *tensor.shape[2:]), float("nan"))
    return wide.narrow(1, 2, tensor.size(1)).copy_(tensor)


def channels_last(tensor: Tensor) -> Tensor:
    return tensor.contiguous(memory_format=torch.channels_last)


def channels_last_slice(tensor: Tensor) -> Tensor:
    return channels_last(tensor.repeat(1, 2, 1, 1))[:, : tensor.size(1)]


def transposed(tensor: Tensor) -> Tensor:
    return tensor.transpose(-1, -2).contiguous().transpose(-1, -2)


def expanded(tensor: Tensor) -> Tensor:
    """Stride 0 everywhere, as the gradient of `.sum()`."""
    return tensor.new_tensor(0.7).expand(tensor.shape)


def every_other(tensor: Tensor) -> Tensor:
    return tensor.repeat_interleave(2, -1)[..., ::2]


@pytest.mark.parametrize("layout", [channels_last, channel_slice, channels_last_slice, transposed])
@FORM
def test_any_strides_of_the_input(layout, form, backend):
    tensors = make((2, 17, 5, 7), form=form)
    options = {**form.options, "num_shared": 8, "exit_start": 8, "backend": backend}
    check({**tensors, "z": layout(tensors["z"]), "weight": every_other(tensors["weight"])}, **options)


@pytest.mark.parametrize("name", ["weight", "bias", *STATISTICS])
@pytest.mark.parametrize("layout", [expanded, every_other])
@pytest.mark.parametrize("z_layout", [torch.Tensor.contiguous, channels_last])
@FORM
@TRAINING
def test_any_strides_of_parameters_and_statistics(name, layout, z_layout, form, training, backend, exact_dtype):
    """Whatever ATen's batch norm makes of them in channels_last; an update reaches the caller's own statistics."""
    if training and name in STATISTICS and layout is expanded:
        pytest.skip("refused: see the next test")
    tensors = make((2, 17, 5, 7), exact_dtype, form, training)
    tensors |= {"z": z_layout(tensors["z"]), name: layout(tensors[name].abs() + 0.5)}
    if form.residual:
        tensors["residual"] = residual_of(tensors, training)
    options = {**form.options, "training": training, "num_shared": 8, "exit_start": 8}
    statistics = [tensors[name].detach().clone() for name in STATISTICS]
    if name in STATISTICS and layout is every_other:
        # In a buffer of another tensor's, which has to change where it is.
        index = STATISTICS.index(name)
        statistics[index] = tensors[name].new_full((17, 2), float("nan"))[:, 0].copy_(tensors[name])
    elif name in STATISTICS:
        statistics[STATISTICS.index(name)] = tensors[name]
    leaves = leaves_of(tensors)
    wide = {key: tensor.double() for key, tensor in tensors.items()}
    exact = leaves_of(wide | {key: tensor.contiguous() for key, tensor in wide.items() if tensor.dim() == 1})
    wide_statistics = [wide[name].clone(memory_format=torch.contiguous_format) for name in STATISTICS]
    produced = call(norm_act, leaves, statistics, backend=backend, **options)
    expected = call(reference.norm_act, exact, wide_statistics, **options)
    grads = [torch.randn_like(expected.shared), torch.randn_like(expected.exit)]
    found = torch.autograd.grad(
        [produced.shared, produced.exit], list(leaves.values()), [grad.to(exact_dtype) for grad in grads]
    )
    truth = torch.autograd.grad([expected.shared, expected.exit], list(exact.values()), grads)
    scale = max(grad.abs().max().item() for grad in truth)
    for key, one, other in zip(leaves, found, truth, strict=True):
        assert_close(f"grad_{key}", one, other, scale=0.0 if key in ("z", "residual") else 0.1 * scale)
    assert_close("full", produced.full, expected.full)
    for key, one, other in zip(STATISTICS, statistics, wide_statistics, strict=True):
        assert_close(key, one, other)


@pytest.mark.parametrize("name", STATISTICS)
def test_statistics_that_cannot_be_updated(name, backend):
    tensors = make((2, 17, 5, 7))
    statistics = {key: tensors[key].clone() for key in STATISTICS} | {name: torch.ones(1).expand(17)}
    options = {"num_shared": 8, "exit_start": 8, "backend": backend}
    with pytest.raises(ValueError, match=rf"expected {name} with a number of its own.*Pass `{name}\.clone\(\)`"):
        call(norm_act, tensors, statistics.values(), **options)


@pytest.mark.parametrize("layout", [channels_last, channel_slice, channels_last_slice, transposed, expanded])
@pytest.mark.parametrize("z_layout", [torch.Tensor.contiguous, channels_last])
def test_any_strides_of_the_residual(layout, z_layout, backend):
    form = FORMS["residual"]
    tensors = make((2, 17, 5, 7), form=form)
    tensors |= {"z": z_layout(tensors["z"]), "residual": layout(tensors["residual"])}
    check(tensors, **form.options, num_shared=8, exit_start=4, backend=backend)


@pytest.mark.parametrize("layout", [channels_last, channel_slice, transposed, expanded, every_other])
@pytest.mark.parametrize("exit_layout", [expanded, every_other])
@FORM
def test_any_strides_of_the_gradients(layout, exit_layout, form, backend):
    tensors = make((2, 17, 5, 7), form=form)
    options = {**form.options, "num_shared": 9, "exit_start": 0, "backend": backend}
    shared, exit = evaluate(norm_act, tensors, **options)["incoming"]
    check(tensors, grads=(layout(shared), exit_layout(exit)), **options)


@FORM
@TRAINING
def test_batch_of_no_images(form, training, backend):
    tensors = make((0, 5, 4, 6), form=form, training=training)
    options = {**form.options, "training": training, "num_shared": 2, "exit_start": 2}
    results = check(tensors, backend=backend, **options)
    for name in ("running_mean", "running_var"):
        assert torch.equal(results[name], tensors[name])
    for name in ("grad_weight", "grad_bias"):
        assert not results[name].any()


@FORM
@TRAINING
@pytest.mark.parametrize("mean", [1e4, -1e4, 0.0], ids=str)
@pytest.mark.parametrize("deviation", [1.0, 1e-3], ids=str)
def test_extreme_statistics(form, training, mean, deviation, cpp):
    """float64 of the same float32 inputs: neither a large mean nor a variance of 1e-6 may cost digits.

    The stock operators, which keep the mean in float32, lose up to a tenth here.
    """
    tensors = make((3, 17, 8, 9))
    tensors["z"] = tensors["z"] * deviation + mean
    tensors["running_mean"] = tensors["running_mean"] * deviation + mean
    if form.residual:
        tensors["residual"] = residual_of(tensors, training)
    options = {**form.options, "training": training, "num_shared": 8, "exit_start": 8}
    check(tensors, backend=cpp, **options)


@FORM
@TRAINING
@pytest.mark.parametrize("wanted", list(itertools.product([False, True], repeat=4)), ids=str)
def test_only_what_is_asked_for_is_computed(form, training, wanted, backend):
    tensors = make((2, 5, 4, 5), form=form, training=training)
    options = {**form.options, "training": training, "num_shared": 2, "exit_start": 2}
    everything = evaluate(norm_act, tensors, backend=backend, **options)
    leaves = leaves_of(tensors)
    for leaf, is_wanted in zip(leaves.values(), wanted, strict=False):  # the last is for a residual
        leaf.requires_grad_(is_wanted)
    statistics = [tensors[name] for name in STATISTICS]
    produced = call(norm_act, leaves, statistics, backend=backend, **options)
    any_wanted = any(leaf.requires_grad for leaf in leaves.values())
    assert produced.shared.requires_grad == produced.exit.requires_grad == any_wanted
    assert not produced.full.requires_grad
    assert not produced.average.requires_grad
    if any_wanted:
        torch.autograd.backward([produced.shared, produced.exit], everything["incoming"])
    for name, leaf in leaves.items():
        assert (leaf.grad is not None) == leaf.requires_grad
        if leaf.requires_grad:
            assert_close(name, leaf.grad, everything[f"grad_{name}"])


def test_the_function_returns_none_for_what_is_not_asked_for(cpp):
    form = FORMS["residual"]
    for wanted in itertools.product([False, True], repeat=4):
        if not any(wanted):
            continue
        leaves = leaves_of(make((2, 5, 4, 5), form=form))
        for leaf, flag in zip(leaves.values(), wanted, strict=True):
            leaf.requires_grad_(flag)
        produced = call(norm_act, leaves, num_shared=2, exit_start=2, backend=cpp, **form.options)
        with torch.no_grad():
            received = produced.shared.grad_fn.apply(
                None, torch.ones_like(produced.shared), None, torch.ones_like(produced.exit), None, None
            )
        assert [grad is not None for grad in received[:4]] == list(wanted)
        assert all(grad is None for grad in received[4:])


@pytest.mark.parametrize("reader", ["shared", "exit"])
@FORM
def test_one_reader_alone(reader, form, backend):
    """The other reader's gradient is zero, whether it was never used or has no channels."""
    tensors = make((2, 6, 4, 5), form=form)
    options = {**form.options, "num_shared": 3, "exit_start": 3}
    incoming = torch.randn(2 * 3 * 4 * 5)

    def grads(op, tensors, **options):
        leaves = leaves_of(tensors)
        part = getattr(call(op, leaves, **options), reader)
        found = torch.autograd.grad((part * incoming[: part.numel()].view_as(part)).sum(), list(leaves.values()))
        return dict(zip(leaves, found, strict=True))

    expected = grads(reference.norm_act, {name: tensor.double() for name, tensor in tensors.items()}, **options)
    for name, grad in grads(norm_act, tensors, backend=backend, **options).items():
        assert_close(name, grad, expected[name])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@FORM
def test_second_backward_second_run_and_two_threads_are_bitwise_the_same(dtype, form, cpp):
    # Several tasks an image, several blocks of statistics.
    tensors = make((5, 33, 40, 34), dtype, form)
    options = {**form.options, "num_shared": 16, "exit_start": 16, "backend": cpp}
    leaves = leaves_of(tensors)
    incoming = evaluate(norm_act, tensors, **options)["incoming"]
    runs = []
    for num_threads in (1, 1, 2):
        torch.set_num_threads(num_threads)
        produced = call(norm_act, leaves, **options)
        heads = [produced.shared, produced.exit]
        for _ in range(2):
            runs.append([*produced, *torch.autograd.grad(heads, list(leaves.values()), incoming, retain_graph=True)])
    for run in runs[1:]:
        for name, first, again in zip((*OUTPUTS, *leaves), runs[0], run, strict=True):
            assert torch.equal(first, again), name


@FORM
def test_nothing_is_written_to(form, backend):
    leaves = leaves_of(make((2, 6, 5, 4), form=form))
    produced = call(norm_act, leaves, num_shared=3, exit_start=3, backend=backend, **form.options)
    watched = [*leaves.values(), *produced, torch.randn_like(produced.shared), torch.randn_like(produced.exit)]
    before = [(tensor._version, tensor.detach().clone()) for tensor in watched]
    torch.autograd.grad([produced.shared, produced.exit], list(leaves.values()), watched[-2:])
    for tensor, (version, copy) in zip(watched, before, strict=True):
        assert tensor._version == version
        assert torch.equal(tensor, copy)


@FORM
def test_double_backward_names_the_op_or_works(form, backend):
    tensors = leaves_of(make((2, 4, 4, 4), form=form))
    options = {**form.options, "num_shared": 2, "exit_start": 2, "backend": backend}
    loss = sum(part.square().sum() for part in call(norm_act, tensors, **options))
    leaves = list(tensors.values())
    if backend == "cpp":
        with pytest.raises(RuntimeError, match=r"^norm_act: .*backend='aten'"):
            torch.autograd.grad(loss, leaves, create_graph=True)
        return
    first = torch.autograd.grad(loss, leaves, create_graph=True)
    assert all(grad.isfinite().all() for grad in torch.autograd.grad(sum(g.square().sum() for g in first), leaves))


@pytest.mark.parametrize("sign", [1.0, -1.0], ids=["rising", "falling"])
def test_the_first_of_equal_values_wins_the_pool(sign, backend):
    """Exact ties above zero, so that the ReLU hides none: where the gradient goes tells which pixel won."""
    tensors = make((2, 19, 6, 6))
    tensors["z"] = torch.randint(1, 3, (2, 19, 6, 6)).float()
    tensors["weight"] = tensors["weight"].abs() * sign
    # In eval mode nothing else than the winner of a window receives gradient.
    options = {"pool": True, "training": False, "num_shared": 19, "exit_start": 19}
    results = check(tensors, backend=backend, **options)
    assert (results["grad_z"] != 0).sum() == 2 * 19 * 9


@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=str)
@TRAINING
@FORM
def test_a_bad_value_is_not_hidden(value, training, form, backend):
    """A NaN loss has to stay one, so that the trainer stops."""
    tensors = make((2, 17, 4, 4), form=form)
    tensors["z"][1, 5, 1, 1] = value
    tensors["weight"].abs_().add_(0.1)
    options = {"training": training, **form.options, "num_shared": 8, "exit_start": 0}
    statistics = [tensors[name] for name in STATISTICS]
    produced = call(norm_act, tensors, statistics, backend=backend, **options)
    for part in (produced.full, produced.average):
        assert not part[1, 5].isfinite().all()
        assert part[:, :5].isfinite().all()


class TestAsBatchNorm2d:
    """`produce_readings` on a converted `nn.BatchNorm2d`, beside the module's own forward."""

    @pytest.mark.parametrize("momentum", [0.1, 0.7, None], ids=str)
    @pytest.mark.parametrize("affine", [True, False], ids=["affine", "plain"])
    @pytest.mark.parametrize("tracking", [True, False], ids=["tracking", "no-tracking"])
    def test_three_steps_then_eval(self, momentum, affine, tracking, backend, exact_dtype):
        dtype = exact_dtype
        bn = nn.BatchNorm2d(6, momentum=momentum, affine=affine, track_running_stats=tracking, dtype=dtype)
        twin = nn.BatchNorm2d(6, momentum=momentum, affine=affine, track_running_stats=tracking, dtype=torch.float64)
        convert_layers(bn, "dfs", backend)
        fork = Fork(0.5, "dfs", backend=backend)
        for step in range(4):
            bn.train(step < 3)
            twin.train(step < 3)
            z = torch.randn(3, 6, 5, 4, dtype=dtype) * 2 + 1
            deeper, exit = produce_readings(bn, z, fork, pool=False, is_last=False)
            assert backends.last_used("norm_act").partition(":")[0] == backend
            expected = twin(F.relu(z.double()))
            assert_close("feature", deeper[1], expected)
            assert_close("average", exit[1], expected.mean((2, 3)))
        assert set(bn.state_dict()) == set(twin.state_dict())
        for name, value in bn.state_dict().items():
            if value.is_floating_point():
                assert_close(name, value, twin.state_dict()[name])
            else:
                assert torch.equal(value, twin.state_dict()[name])

    @TRAINING
    def test_before_a_residual(self, training, backend):
        """As in ResNet: relu(bn(z) + shortcut)."""
        bn, twin = (nn.BatchNorm2d(6, dtype=dtype).train(training) for dtype in (torch.float32, torch.float64))
        z, shortcut = torch.randn(2, 3, 6, 5, 4)
        convert_layers(bn, "dfs", backend)
        assert_close("feature", apply_norm_relu(bn, z, shortcut), F.relu(twin(z.double()) + shortcut.double()))
        assert_close("running_var", bn.running_var, twin.running_var)

    @TRAINING
    def test_parameters_in_half_precision(self, training, backend):
        """A model converted whole: `model.bfloat16()`."""
        bn = nn.BatchNorm2d(6, dtype=torch.bfloat16).train(training)
        z = torch.randn(3, 6, 5, 4).bfloat16().requires_grad_()
        convert_layers(bn, "dfs", backend)
        (live, full, _), _ = produce_readings(bn, z, Fork(0.5, "dfs", backend=backend), pool=True, is_last=False)
        live.sum().backward()
        grads = (z.grad, bn.weight.grad, bn.bias.grad)
        assert {tensor.dtype for tensor in (full, bn.running_mean, *grads)} == {torch.bfloat16}

    def test_one_value_per_channel_is_refused_as_stock_does(self, backend):
        options = {"num_shared": 2, "exit_start": 2, "backend": backend}
        with pytest.raises(ValueError, match="more than 1 value per channel when training"):
            norm_act(*make((1, 4, 1, 1)).values(), **options)
        norm_act(*make((1, 4, 1, 1)).values(), training=False, **options)


OPS = torch.ops.dfs_engine


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(2, 5, 5, 4), (0, 5, 4, 4)], ids=str)
@TRAINING
@FORM
def test_opcheck(dtype, shape, training, form, cpp):
    tensors = make(shape, dtype, form, training)
    z, weight, bias, *statistics = (tensors[name] for name in ("z", "weight", "bias", *STATISTICS))
    given = (None, None) if training else statistics
    arguments = (z, weight, bias, tensors.get("residual"), *given, 1e-5, form.pool, form.relu_first)
    for averages in (False, True):
        torch.library.opcheck(OPS.norm_act, (*arguments, averages))
    feature, average, average_hat, mean, inverse_std, _, passed = OPS.norm_act(*arguments, True)
    saved = (z, weight, bias, feature if form.residual else None, average_hat, mean, inverse_std, passed)
    for num_shared in (0, 2, 5):
        for grad_average in (torch.randn_like(average), None):
            grads = torch.randn_like(feature[:, :num_shared]), grad_average
            torch.library.opcheck(OPS.norm_act_backward, (*grads, *saved, training, form.pool, form.relu_first))


@FORM
def test_compiles_whole(form, backend):
    options = {**form.options, "num_shared": 2, "exit_start": 2, "backend": backend}

    def op(*tensors, **options):
        return norm_act(*tensors, **options)

    tensors = make((2, 5, 4, 5), form=form)
    eager = evaluate(op, tensors, **options)
    torch.compiler.reset()  # every form is a compilation of the same function
    compiled = torch.compile(op, fullgraph=True, backend="aot_eager")
    traced = evaluate(compiled, tensors, eager.pop("incoming"), **options)
    for name, value in eager.items():
        assert_close(name, traced[name], value)


@FORM
def test_runs_under_autocast(form, backend):
    leaves = leaves_of(make((2, 6, 5, 4), form=form))
    with torch.autocast("cpu", torch.bfloat16):
        produced = call(norm_act, leaves, num_shared=3, exit_start=3, backend=backend, **form.options)
        assert {part.dtype for part in produced} == {torch.bfloat16}
    (produced.shared.sum() + produced.exit.sum()).backward()
    assert {leaf.grad.dtype for leaf in leaves.values()} == {torch.float32}


def test_the_kernels_keep_one_channels_last_copy_of_the_input(cpp):
    """z is rearranged once, not in both passes."""
    leaves = leaves_of(make((2, 6, 5, 4)))
    produced = call(norm_act, leaves, num_shared=3, exit_start=3, backend=cpp)
    saved = produced.shared.grad_fn.saved_tensors[0]
    assert torch.equal(saved, leaves["z"])
    assert saved.is_contiguous(memory_format=torch.channels_last)


@FORM
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_automatic_choice_knows_what_rearranging_costs(form, dtype, cpp):
    tensors = make((2, 6, 4, 4), dtype, form)
    options = {**form.options, "num_shared": 3, "exit_start": 3}
    with backends.use_backend(None):
        call(norm_act, {**tensors, "z": channels_last(tensors["z"])}, **options)
        assert backends.last_used("norm_act").partition(":")[0] == "cpp"
        call(norm_act, tensors, **options)
    pays = form.pool or (dtype == torch.float32 and not form.residual)
    assert backends.last_used("norm_act").partition(":")[0] == ("cpp" if pays else "aten")


GOOD = {"num_shared": 2, "exit_start": 2}
BAD = {
    "exit-after-shared": (
        {"num_shared": 1}, ValueError, "0 <= exit_start <= num_shared <= C=4, got exit_start=2, num_shared=1"
    ),
    "shared-too-many": ({"num_shared": 5}, ValueError, "got exit_start=2, num_shared=5"),
    "exit-negative": ({"exit_start": -1}, ValueError, "got exit_start=-1, num_shared=2"),
    "exit-float": ({"exit_start": 2.0}, TypeError, "expected an integer, got exit_start=2.0"),
    "z-3-D": ({"z": torch.randn(4, 3, 3)}, ValueError, r"expected z \(N, C, H, W\), got \(4, 3, 3\)"),
    "z-integer": ({"z": torch.ones(2, 4, 3, 3).int()}, TypeError, "floating-point tensor, got z"),
    "weight": ({"weight": torch.ones(3)}, ValueError, r"expected weight of shape \(4,\), got \(3,\)"),
    "bias": ({"bias": torch.ones(4, 1)}, ValueError, r"expected bias of shape \(4,\), got \(4, 1\)"),
    "running-mean": ({"running_mean": torch.ones(5)}, ValueError, r"running_mean of shape \(4,\), got \(5,\)"),
    "half-statistics": ({"running_var": None}, ValueError, "running_mean and running_var, or neither"),
    "no-statistics": (
        {"running_mean": None, "running_var": None, "training": False}, ValueError, "running statistics in eval mode"
    ),
    "pool-too-small": ({"z": torch.randn(2, 4, 1, 3), "pool": True}, ValueError, "at least 2 with pool, got"),
    "residual-relu-first": (
        {"residual": torch.ones(2, 4, 3, 3)}, ValueError,
        "expected residual with relu_first=False and pool=False, got relu_first=True, pool=False. Change them, or add",
    ),
    "residual-pool": (
        {"residual": torch.ones(2, 4, 3, 3), "relu_first": False, "pool": True}, ValueError,
        "expected residual with .*, got relu_first=False, pool=True",
    ),
    "residual-shape": (
        {"residual": torch.ones(2, 4, 1, 1), "relu_first": False}, ValueError,
        r"expected residual of z's shape \(2, 4, 3, 3\), got \(2, 4, 1, 1\)",
    ),
    "residual-dtype": (
        {"residual": torch.ones(2, 4, 3, 3).double(), "relu_first": False}, TypeError,
        r"one dtype, got z=torch.float32 and residual=torch.float64",
    ),
    "device": ({"weight": torch.ones(4, device="meta")}, ValueError, "one device, got z on cpu and weight on meta"),
}  # fmt: skip


@pytest.mark.parametrize(("arguments", "error", "message"), BAD.values(), ids=BAD)
def test_bad_arguments(arguments, error, message, backend):
    with pytest.raises(error, match=f"^norm_act: .*{message}"):
        norm_act(**{**make((2, 4, 3, 3)), **GOOD, **arguments}, backend=backend)


@pytest.mark.skipif(backends.unavailable_reason("cpp") is not None, reason="needs the C++ extension")
def test_the_backward_fills_no_feature_with_zeros():
    """Autograd would, for each output that carries no gradient."""
    torch.use_deterministic_algorithms(False)  # which fills with NaN what is not yet written
    model = create_model("vgg7_64", width=8, variant="dfs", backend="cpp").train()
    loss = sum(logits.sum() for logits in model(torch.randn(4, 3, 32, 32)))
    with torch.profiler.profile(record_shapes=True) as recorded:
        loss.backward()
    filled = [event.input_shapes[0] for event in recorded.events() if event.name == "aten::fill_"]
    assert filled
    assert not [shape for shape in filled if shape[0:1] == [4] and len(shape) == 4 and math.prod(shape[1:]) > 0]


def test_the_old_name_warns():
    with pytest.warns(FutureWarning, match="ops.conv_block is now ops.norm_act"):
        assert ops.conv_block is ops.norm_act
