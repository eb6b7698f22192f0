"""Triton's norm_act against stock PyTorch in float64, over shapes, dtypes, modes, strides and launch geometries."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dfs_engine import reference
from dfs_engine.validate.tolerances import TOLERANCES, assert_close, gradient_scale

triton = pytest.importorskip("triton")

from dfs_engine.kernels import norm_act as op  # noqa: E402

pytestmark = pytest.mark.usefixtures("poison")

EPS = 1e-5
# (N, C, H, W): odd sizes, so that a pool leaves a row or a column over; channels beside and beyond the tile's 64.
SHAPES = [(2, 17, 5, 7), (1, 3, 4, 5), (3, 1, 9, 2), (1, 65, 3, 4)]
# (relu_first, pool, with a residual): what the op allows.
MODES = {
    "relu-first": (True, False, False),
    "relu-first-pool": (True, True, False),
    "relu-last": (False, False, False),
    "relu-last-pool": (False, True, False),
    "residual": (False, False, True),
}
MODE = pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
TRAINING = pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])


def make(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """On the CPU. z's elements lie apart and no weight is near zero, so that no rounding makes two pixels tie."""
    size, channels = math.prod(shape), shape[1]
    spread = torch.special.ndtri((torch.randperm(size, dtype=torch.float64) + torch.rand(())) / max(size, 1))
    weight = torch.randn(channels)
    return {
        "z": spread.reshape(shape).to(dtype),
        "weight": weight + 0.5 * weight.sign(),
        "bias": torch.randn(channels),
        "residual": torch.randn(shape).to(dtype),
        "running_mean": torch.randn(channels),
        "running_var": torch.rand(channels) + 0.5,
    }


def random_grads(shape: tuple[int, ...], pool: bool, num_shared: int, exit_start: int, dtype) -> tuple[Tensor, Tensor]:
    """Of the shared part and of the exit's averages."""
    num_images, channels, *size = shape
    height, width = (size[0] // 2, size[1] // 2) if pool else size
    return (
        torch.randn(num_images, num_shared, height, width).to(dtype),
        (torch.randn(num_images, channels - exit_start) * math.sqrt(height * width)).to(dtype),
    )


def by_kernels(tensors, grads, mode, training, exit_start) -> dict[str, Tensor]:
    relu_first, pool, has_residual = mode
    z, gamma, beta = (tensors[name] for name in ("z", "weight", "bias"))
    given = (None, None) if training else (tensors["running_mean"], tensors["running_var"])
    residual = tensors["residual"] if has_residual else None
    made = op.norm_act(z, gamma, beta, residual, *given, EPS, pool, relu_first, True)
    feature, average, average_hat, mean, inverse_std, variance, passed = made
    grad_average = F.pad(grads[1], (exit_start, 0))
    saved = (z, gamma, beta, feature if has_residual else None)
    modes = (training, pool, relu_first)
    grad_z, grad_gamma, grad_beta, grad_residual = op.norm_act_backward(
        grads[0], grad_average, *saved, average_hat, mean, inverse_std, passed, *modes
    )
    if exit_start == z.size(1):  # nobody asks for averages: the same without them
        alone = op.norm_act(z, gamma, beta, residual, *given, EPS, pool, relu_first, False)
        assert torch.equal(alone[0], feature)
        assert all(alone[index].shape == (0, z.size(1)) for index in (1, 2, 6))
        others = op.norm_act_backward(grads[0], None, *saved, *alone[2:5], alone[6], *modes)
        for one, other in zip(others, (grad_z, grad_gamma, grad_beta, grad_residual), strict=True):
            assert torch.equal(one, other)
    for rows in (feature, grad_z):
        assert rows.is_contiguous(memory_format=torch.channels_last)
    assert mean.dtype == torch.float64
    results = {"feature": feature, "average": average, "mean": mean, "variance": variance, "inverse_std": inverse_std}
    results |= {"grad_z": grad_z, "grad_weight": grad_gamma, "grad_bias": grad_beta}
    if has_residual:
        return results | {"grad_residual": grad_residual}
    assert grad_residual.shape == (0,)
    return results


def by_reference(tensors, grads, mode, training, exit_start) -> dict[str, Tensor]:
    """The same in float64 by stock operators, on the CPU."""
    relu_first, pool, has_residual = mode
    wide = {name: tensor.detach().cpu().double() for name, tensor in tensors.items()}
    names = ["z", "weight", "bias"] + (["residual"] if has_residual else [])
    leaves = [wide[name].requires_grad_() for name in names]
    running = [wide["running_mean"], wide["running_var"]]
    r = wide["z"].detach().relu() if relu_first else wide["z"].detach()
    mean, variance = (r.mean((0, 2, 3)), r.var((0, 2, 3), unbiased=False)) if training else running
    feature, shared, average, exit = reference.norm_act(
        *leaves[:3], *[tensor.clone() for tensor in running], training=training, eps=EPS, pool=pool,
        relu_first=relu_first, residual=wide["residual"] if has_residual else None,
        num_shared=grads[0].size(1), exit_start=exit_start,
    )  # fmt: skip
    wide_grads = [grad.cpu().double() for grad in grads]
    found = torch.autograd.grad([shared, exit], leaves, wide_grads, materialize_grads=True)
    results = {"feature": feature, "average": average, "mean": mean, "variance": variance}
    results["inverse_std"] = (variance + EPS).rsqrt()
    return results | {f"grad_{name}": grad for name, grad in zip(names, found, strict=True)}


# The mean is exact to what it is for: float32 inputs.
OF_MEAN = TOLERANCES[torch.float32]


def check(tensors, grads, mode, *, device, training=True, exit_start=0) -> None:
    """Kernels and float64 oracle agree on everything, each result to what its dtype allows."""
    here = {name: tensor.to(device) for name, tensor in tensors.items()}
    actual = by_kernels(here, [grad.to(device) for grad in grads], mode, training, exit_start)
    expected = by_reference(tensors, grads, mode, training, exit_start)
    assert actual.keys() == expected.keys()
    cancelled = 10 * gradient_scale(
        value for name, value in expected.items() if name.startswith("grad_") and value.numel()
    )
    for name, value in actual.items():
        if name in ("grad_z", "grad_weight") and not (expected[name].abs() > 1e-9).any():
            # A gradient that is the same on all pixels does not get past the statistics: only rounding is left.
            assert not (value.abs() > 1e-4).any(), name
            continue
        scale = cancelled if name.startswith("grad_") else 0.0
        assert_close(name, value, expected[name], OF_MEAN if value.dtype == torch.float64 else None, scale=scale)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@MODE
def test_equals_stock_in_float64(shape, mode, dtype, device):
    half = shape[1] // 2
    check(make(shape, dtype), random_grads(shape, mode[1], half, half, dtype), mode, device=device, exit_start=half)


@MODE
@TRAINING
# The last block, beta = 1, and exit_gradient="whole".
@pytest.mark.parametrize("route", [(0, 0), (5, 5), (2, 0)], ids=str)
def test_routes_and_eval_mode(mode, training, route, device):
    shape, (num_shared, exit_start) = (2, 5, 4, 3), route
    grads = random_grads(shape, mode[1], num_shared, exit_start, torch.float32)
    check(make(shape), grads, mode, device=device, training=training, exit_start=exit_start)


@MODE
@pytest.mark.parametrize("programs", [1, 6])
def test_any_split_into_programs(mode, programs, device, monkeypatch):
    """Few programs take several tiles each, the last ones fewer; and many partial sums are merged in turns."""
    monkeypatch.setattr(op, "_PROGRAMS", programs)
    monkeypatch.setattr(op, "_MERGES", ((16, 2),))
    shape = (3, 66, 13, 11)
    check(make(shape), random_grads(shape, mode[1], 40, 7, torch.float32), mode, device=device, exit_start=7)


@pytest.mark.parametrize("parts", [32, 33])
def test_few_and_many_partial_sums(parts, device):
    shape = (parts, 3, 2, 2)
    grads = random_grads(shape, True, 2, 1, torch.float32)
    check(make(shape), grads, MODES["relu-first-pool"], device=device, exit_start=1)


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
@MODE
def test_any_strides_of_the_inputs(layout, mode, device):
    shape = (2, 17, 5, 7)
    tensors = make(shape)
    strided = {name: layout(tensors[name]) for name in ("z", "residual")}
    strided |= {name: every_other(tensors[name]) for name in ("weight", "bias")}
    check(tensors | strided, random_grads(shape, mode[1], 8, 8, torch.float32), mode, device=device, exit_start=8)


@pytest.mark.parametrize("layout", [channels_last, channel_slice, channels_last_slice, transposed, expanded])
@pytest.mark.parametrize("exit_layout", [expanded, every_other])
@pytest.mark.parametrize("name", ["relu-first-pool", "residual"])
def test_any_strides_of_the_gradients(layout, exit_layout, name, device):
    shape, mode = (2, 17, 5, 7), MODES[name]
    shared, exit = random_grads(shape, mode[1], 9, 0, torch.float32)
    check(make(shape), [layout(shared), exit_layout(exit)], mode, device=device)


@MODE
@TRAINING
@pytest.mark.parametrize(("mean", "deviation"), [(1e4, 1.0), (-1e4, 1e-3), (0.0, 1e-3)], ids=str)
def test_extreme_statistics(mode, training, mean, deviation, device):
    """float64 of the same float32 inputs: neither a large mean nor a variance of 1e-6 may cost digits."""
    shape = (2, 9, 8, 9)
    tensors = make(shape)
    tensors["z"] = tensors["z"] * deviation + mean
    tensors["running_mean"] = tensors["running_mean"] * deviation + mean
    grads = random_grads(shape, mode[1], 4, 4, torch.float32)
    check(tensors, grads, mode, device=device, training=training, exit_start=4)


@MODE
@TRAINING
def test_batch_of_no_images(mode, training, device):
    shape = (0, 5, 4, 6)
    tensors = {name: tensor.to(device) for name, tensor in make(shape).items()}
    grads = [grad.to(device) for grad in random_grads(shape, mode[1], 2, 2, torch.float32)]
    results = by_kernels(tensors, grads, mode, training, 2)
    assert results["grad_z"].shape == shape
    assert not results["grad_weight"].any()
    assert not results["grad_bias"].any()


@pytest.mark.parametrize("sign", [1.0, -1.0], ids=["rising", "falling"])
def test_the_first_of_equal_values_wins_the_pool(sign, device):
    """Exact ties above zero, so that the ReLU hides none: where the gradient goes tells which pixel won."""
    shape = (2, 19, 6, 7)
    tensors = make(shape)
    tensors["z"] = torch.randint(1, 3, shape).float()
    tensors["weight"] = tensors["weight"].abs() * sign
    grads = random_grads(shape, True, 19, 19, torch.float32)
    check(tensors, grads, (True, True, False), device=device, training=False, exit_start=19)


@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=str)
@MODE
@TRAINING
def test_a_bad_value_is_not_hidden(value, mode, training, device):
    """A NaN loss has to stay one, so that the trainer stops."""
    shape = (2, 17, 4, 4)
    tensors = make(shape)
    tensors["z"][1, 5, 1, 1] = value
    tensors["weight"].abs_()
    tensors = {name: tensor.to(device) for name, tensor in tensors.items()}
    grads = [grad.to(device) for grad in random_grads(shape, mode[1], 8, 0, torch.float32)]
    results = by_kernels(tensors, grads, mode, training, 0)
    for name in ("feature", "average"):
        assert not results[name][1, 5].isfinite().all()
        assert results[name][:, :5].isfinite().all()


@MODE
def test_a_second_run_is_bitwise_the_same_and_nothing_is_written_to(mode, device):
    shape = (2, 33, 7, 10)
    tensors = {name: tensor.to(device) for name, tensor in make(shape).items()}
    grads = [grad.to(device) for grad in random_grads(shape, mode[1], 16, 16, torch.float32)]
    copies = [tensor.clone() for tensor in (*tensors.values(), *grads)]
    first = by_kernels(tensors, grads, mode, True, 16)
    for _ in range(2):
        again = by_kernels(tensors, grads, mode, True, 16)
        for name, value in first.items():
            assert torch.equal(value, again[name]), name
    for tensor, copy in zip((*tensors.values(), *grads), copies, strict=True):
        assert torch.equal(tensor, copy)


@pytest.mark.parametrize("held", [torch.float64, torch.float16], ids=["fp64", "fp16"])
def test_parameters_of_another_dtype(held, device):
    shape = (2, 6, 5, 4)
    tensors = make(shape, torch.float16)
    for name in ("weight", "bias", "running_mean", "running_var"):
        tensors[name] = tensors[name].to(held)
    grads = random_grads(shape, True, 3, 3, torch.float16)
    for training in (True, False):
        here = {name: tensor.to(device) for name, tensor in tensors.items()}
        results = by_kernels(here, [grad.to(device) for grad in grads], (True, True, False), training, 3)
        expected = by_reference(tensors, grads, (True, True, False), training, 3)
        for name in ("feature", "grad_z", "grad_weight", "grad_bias"):
            assert_close(name, results[name], expected[name], TOLERANCES[torch.float16])
        assert results["grad_weight"].dtype == held
