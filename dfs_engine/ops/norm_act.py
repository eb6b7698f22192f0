"""The fused producer of a partitioned feature: ReLU, batch normalisation, 2x2 max pool and the exit's global average.

What follows a convolution in VGG or, with the ReLU last and perhaps a residual before it, in ResNet and MSDNet. The
backward takes the two gradients as they come: the deeper path's on its channels, and the exit's as one number per
image and channel, which is never spread out over the pixels, unless a residual has to receive it there.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dfs_engine import reference as oracle
from dfs_engine.ops import _common
from dfs_engine.partition import expect_absent_gradients, fork_gradient
from dfs_engine.runtime import backend as backends
from dfs_engine.runtime import choice

NAME = "norm_act"


def _fake(z, gamma, beta, residual, running_mean, running_var, eps, pool, relu_first, averages):
    num_images, channels, height, width = z.shape
    shape = (num_images, channels, height // 2, width // 2) if pool else z.shape
    feature = torch.empty(shape, dtype=z.dtype, device=z.device, memory_format=torch.channels_last)
    average_hat = z.new_empty((num_images if averages else 0, channels), dtype=torch.float32)
    average, passed = average_hat.to(z.dtype, copy=True), torch.empty_like(average_hat)
    mean, inverse_std, variance = (
        z.new_empty(channels, dtype=dtype) for dtype in (torch.float64, torch.float32, torch.float32)
    )
    return feature, average, average_hat, mean, inverse_std, variance, passed


def _fake_backward(grad_shared, grad_average, z, gamma, beta, feature, *saved_and_modes):
    grad_z = torch.empty_like(z, memory_format=torch.channels_last)
    grad_residual = z.new_empty(0) if feature is None else torch.empty_like(grad_z)
    return grad_z, torch.empty_like(gamma), torch.empty_like(beta), grad_residual


_common.define(
    "norm_act",
    "Tensor z, Tensor gamma, Tensor beta, Tensor? residual, Tensor? running_mean, Tensor? running_var, float eps, "
    "bool pool, bool relu_first, bool averages",
    "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    fake=_fake,
)
_common.define(
    "norm_act_backward",
    "Tensor grad_shared, Tensor? grad_average, Tensor z, Tensor gamma, Tensor beta, Tensor? feature, "
    "Tensor average_hat, Tensor mean, Tensor inverse_std, Tensor passed, bool training, bool pool, bool relu_first",
    "(Tensor grad_z, Tensor grad_gamma, Tensor grad_beta, Tensor grad_residual)",
    fake=_fake_backward,
)


class ProducedFeature(NamedTuple):
    """A feature and its global average, each on its way to its reader.

    Attributes:
        full: (N, C, H', W') without gradient. shared: its channels [0, k), with the deeper path's gradient.
        average: (N, C), mean over the pixels of `full`, without gradient. exit: its channels [exit_start, C), with the
            exit's gradient.
    """

    full: Tensor
    shared: Tensor
    average: Tensor
    exit: Tensor


def _refuse_graph() -> None:
    if _common.creating_graph():
        raise RuntimeError(
            f"{NAME}: the fused backward cannot be differentiated again. Use backend='aten' for create_graph=True."
        )


def _forward(ctx, z, gamma, beta, residual, mean, variance, eps, pool, relu_first, averages):
    """Runs the op and saves what `_gradients` takes: (feature, average, mean, variance)."""
    training = mean is None
    # As the kernels read it, once for both passes; the original is then of no more use.
    z = z.contiguous(memory_format=torch.channels_last)
    feature, average, average_hat, mean, inverse_std, variance, passed = torch.ops.dfs_engine.norm_act(
        z, gamma, beta, residual, mean, variance, eps, pool, relu_first, averages
    )
    # Which pixels the last ReLU let through follows from z alone unless something was added to it.
    sum_passed = None if residual is None else feature
    ctx.save_for_backward(z, gamma, beta, sum_passed, average_hat, mean, inverse_std, passed)
    ctx.modes = training, pool, relu_first
    expect_absent_gradients(ctx)
    return feature, average, mean, variance


def _gradients(
    ctx, saved: tuple[Tensor, ...], grad_shared: Tensor, grad_average: Tensor | None
) -> tuple[Tensor | None, ...]:
    """Of z, gamma, beta and residual, where they are wanted."""
    grads = torch.ops.dfs_engine.norm_act_backward(grad_shared, grad_average, *saved, *ctx.modes)
    return tuple(grad if is_wanted else None for grad, is_wanted in zip(grads, ctx.needs_input_grad, strict=False))


class _NormAct(torch.autograd.Function):
    @staticmethod
    def forward(ctx, z, gamma, beta, residual, mean, variance, eps, pool, relu_first, num_shared, exit_start):
        feature, average, mean, variance = _forward(
            ctx, z, gamma, beta, residual, mean, variance, eps, pool, relu_first, True
        )
        ctx.exit_start = exit_start
        ctx.mark_non_differentiable(feature, average, mean, variance)
        num_channels = z.size(1)
        shared = feature.narrow(1, 0, num_shared).detach()
        exit = average.narrow(1, exit_start, num_channels - exit_start).clone()
        ctx.shapes = shared.shape, exit.shape, exit.dtype
        return feature, shared, average, exit, mean, variance

    @staticmethod
    def backward(ctx, _, grad_shared: Tensor | None, __, grad_exit: Tensor | None, *___):
        _refuse_graph()
        saved = ctx.saved_tensors  # once: activation checkpointing gives them no second time
        z = saved[0]
        shared_shape, exit_shape, exit_dtype = ctx.shapes
        if grad_shared is None:
            if grad_exit is None:
                return (None,) * len(ctx.needs_input_grad)
            grad_shared = z.new_zeros(shared_shape).contiguous(memory_format=torch.channels_last)
        if grad_exit is None:
            grad_exit = z.new_zeros(exit_shape, dtype=exit_dtype)
        # The exit's gradient on all channels, zero where the exit trains nothing: it is small.
        grad_average = F.pad(grad_exit, (ctx.exit_start, 0))
        return *_gradients(ctx, saved, grad_shared, grad_average), None, None, None, None, None, None, None


class _NormReLU(torch.autograd.Function):
    """The same for a feature that nobody splits and whose averages nobody reads."""

    @staticmethod
    def forward(ctx, z, gamma, beta, residual, mean, variance, eps):
        feature, _, mean, variance = _forward(ctx, z, gamma, beta, residual, mean, variance, eps, False, False, False)
        ctx.mark_non_differentiable(mean, variance)
        return feature, mean, variance

    @staticmethod
    def backward(ctx, grad_output: Tensor | None, *_):
        _refuse_graph()
        if grad_output is None:
            return (None,) * len(ctx.needs_input_grad)
        return *_gradients(ctx, ctx.saved_tensors, grad_output, None), None, None, None


class _LiveMean(torch.autograd.Function):
    """Mean over pixels of the live channels, taken from the mean of the whole feature, which is computed once."""

    @staticmethod
    def forward(ctx, live: Tensor, average: Tensor, start: int) -> Tensor:
        ctx.shape = live.shape
        return average[:, start : start + live.size(1)].clone()

    @staticmethod
    def backward(ctx, grad_output: Tensor):
        height, width = ctx.shape[2:]
        # One number per image and channel; never spread out over the pixels in memory.
        return (grad_output / (height * width))[:, :, None, None].expand(ctx.shape), None, None


def live_mean(live: Tensor, full: Tensor, start: int) -> tuple[Tensor, Tensor]:
    """Means over the pixels: (N, live channels) with gradient, and (N, C) of the whole feature without."""
    average = full.mean((2, 3))
    return _LiveMean.apply(live, average, start), average


def norm_act(
    z: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    *,
    training: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
    pool: bool = False,
    relu_first: bool = True,
    residual: Tensor | None = None,
    num_shared: int,
    exit_start: int,
    backend: str | None = None,
) -> ProducedFeature:
    """ReLU, batch normalisation, optional 2x2 max pool and global average of a convolution's output, partitioned.

    Equivalent to: ``f = F.batch_norm(F.relu(z), ...); f = F.max_pool2d(f, 2) if pool else f;``
    ``ProducedFeature(f.detach(), f[:, :num_shared], f.mean((2, 3)).detach(), f.mean((2, 3))[:, exit_start:])``,
    where with ``relu_first=False`` it is ``f = F.relu(F.batch_norm(z, ...) + residual)``.

    Args:
        z: (N, C, H, W).
        weight, bias: (C,) or None, the normalisation's.
        running_mean, running_var: (C,) or, when training, None; updated in place when training, used when not.
        training, momentum, eps: as `F.batch_norm`.
        pool: whether a 2x2 max pool ends the block.
        relu_first: ReLU before the normalisation (True, VGG) or after it (ResNet, MSDNet).
        residual: (N, C, H, W) of z's dtype, added between normalisation and ReLU: with relu_first=False, pool=False.
        num_shared: channels [0, num_shared) carry the deeper path's gradient.
        exit_start: the averages of channels [exit_start, C) carry the exit's gradient; at most num_shared.
        backend: "aten" or "reference" (stock PyTorch), "cpp" (fused: fp32 and bf16, with sums in fp32 and fp64) or
            "triton" (fused: fp32, bf16, fp16); None or "auto" picks: on the CPU, in those dtypes, cpp, unless
            rearranging an NCHW input would cost more than it gains; on CUDA triton where the tuned table of the GPU
            says that it wins on this shape; else aten.

    Raises:
        ValueError: shapes or channel numbers that do not match, one value per channel when training, several devices,
            a residual where none can be added.
        TypeError: integer or complex tensors, a residual of another dtype, channel numbers that are not integers.
        RuntimeError: a requested backend that is not there or has no kernel for the dtype; differentiating the fused
            backward again.
    """
    z, residual = _common.autocast(z, residual)  # type: ignore[assignment]
    parameters = {"weight": weight, "bias": bias, "running_mean": running_mean, "running_var": running_var}
    _check(z, parameters, training, pool, num_shared, exit_start)
    _check_residual(z, residual, pool, relu_first)
    chosen = choice.norm_act_backend(z, residual, pool, backend)
    if chosen == "reference":
        return ProducedFeature(
            *oracle.norm_act(
                z,
                weight,
                bias,
                running_mean,
                running_var,
                training=training,
                momentum=momentum,
                eps=eps,
                pool=pool,
                relu_first=relu_first,
                residual=residual,
                num_shared=num_shared,
                exit_start=exit_start,
            )
        )
    norm = _Norm(weight, bias, running_mean, running_var, training, momentum, eps)
    if chosen in backends.KERNEL_DTYPES:
        return _fused(z, norm, residual, pool, relu_first, num_shared, exit_start)
    feature = _stock(z, norm, residual, relu_first)
    feature = F.max_pool2d(feature, 2) if pool else feature
    full, shared, live = fork_gradient(feature, num_shared, exit_start)
    exit, average = live_mean(live, full, exit_start)
    return ProducedFeature(full, shared, average, exit)


def norm_relu(
    z: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    *,
    training: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
    residual: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Batch normalisation, a residual and ReLU by the kernels of `norm_act`, for a feature that nobody splits.

    Equivalent to: ``F.relu(F.batch_norm(z, ...) + residual)``

    Args, errors: as `norm_act`.

    Returns:
        (N, C, H, W), dtype of z.
    """
    z, residual = _common.autocast(z, residual)  # type: ignore[assignment]
    parameters = {"weight": weight, "bias": bias, "running_mean": running_mean, "running_var": running_var}
    num_channels = z.size(1) if z.dim() > 1 else 0
    _check(z, parameters, training, False, num_channels, num_channels)
    _check_residual(z, residual, False, False)
    chosen = choice.norm_act_backend(z, residual, False, backend)
    norm = _Norm(weight, bias, running_mean, running_var, training, momentum, eps)
    if chosen in backends.KERNEL_DTYPES:
        feature, mean, variance = _NormReLU.apply(z, *_affine(z, norm), residual, *_given(norm), norm.eps)
        _update(z, norm, mean, variance)
        return feature
    return _stock(z, norm, residual, False)


class _Norm(NamedTuple):
    weight: Tensor | None
    bias: Tensor | None
    running_mean: Tensor | None
    running_var: Tensor | None
    training: bool
    momentum: float
    eps: float


def _stock(z: Tensor, norm: _Norm, residual: Tensor | None, relu_first: bool) -> Tensor:
    feature = F.relu(z) if relu_first else z
    feature = oracle.batch_norm(feature, norm.running_mean, norm.running_var, norm.weight, norm.bias, *norm[4:])
    feature = feature if residual is None else feature + residual
    return feature if relu_first else F.relu(feature)


def _fused(
    z: Tensor, norm: _Norm, residual: Tensor | None, pool: bool, relu_first: bool, num_shared: int, exit_start: int
) -> ProducedFeature:
    *produced, mean, variance = _NormAct.apply(
        z, *_affine(z, norm), residual, *_given(norm), norm.eps, pool, relu_first, num_shared, exit_start
    )
    _update(z, norm, mean, variance)
    return ProducedFeature(*produced)


def _affine(z: Tensor, norm: _Norm) -> tuple[Tensor, Tensor]:
    gamma = z.new_ones(z.size(1), dtype=torch.float32) if norm.weight is None else norm.weight
    return gamma, z.new_zeros(z.size(1), dtype=torch.float32) if norm.bias is None else norm.bias


def _given(norm: _Norm) -> tuple[Tensor | None, Tensor | None]:
    return (None, None) if norm.training else (norm.running_mean, norm.running_var)


def _update(z: Tensor, norm: _Norm, mean: Tensor, variance: Tensor) -> None:
    """The running statistics, as nn.BatchNorm2d: the running variance is the unbiased one."""
    running_mean, running_var = norm.running_mean, norm.running_var
    if norm.training and running_mean is not None and running_var is not None and z.numel() > 0:
        count = z.numel() // z.size(1)
        running_mean.lerp_(mean.to(running_mean.dtype), norm.momentum)
        running_var.lerp_((variance * (count / max(count - 1, 1))).to(running_var.dtype), norm.momentum)


def _check(
    z: Tensor, parameters: dict[str, Tensor | None], training: bool, pool: bool, num_shared: int, exit_start: int
) -> None:
    # The statistics may be in float32 beside a feature in half precision.
    _common.check_tensors(NAME, same_dtype=False, z=z, **parameters)
    if z.dim() != 4:
        raise ValueError(f"{NAME}: expected z (N, C, H, W), got {tuple(z.shape)}.")
    num_images, channels, height, width = z.shape
    for name, parameter in parameters.items():
        if parameter is not None and parameter.shape != (channels,):
            raise ValueError(f"{NAME}: expected {name} of shape ({channels},), got {tuple(parameter.shape)}.")
    statistics = {name: parameters[name] for name in ("running_mean", "running_var")}
    for name, statistic in statistics.items():
        if training and statistic is not None and channels > 1 and statistic.stride(0) == 0:
            raise ValueError(
                f"{NAME}: expected {name} with a number of its own per channel, to be updated when training, "
                f"got one of stride 0. Pass `{name}.clone()`."
            )
    given = [statistic is not None for statistic in statistics.values()]
    if any(given) != all(given):
        raise ValueError(f"{NAME}: expected both running_mean and running_var, or neither, got one.")
    if not training and not all(given):
        raise ValueError(f"{NAME}: expected running statistics in eval mode, got none. Pass them, or training=True.")
    if training and num_images * height * width == 1:
        raise ValueError(f"{NAME}: expected more than 1 value per channel when training, got z {tuple(z.shape)}.")
    if pool and min(height, width) < 2:
        raise ValueError(f"{NAME}: expected z of height and width of at least 2 with pool, got {tuple(z.shape)}.")
    _common.check_integers(NAME, exit_start=exit_start, num_shared=num_shared)
    if not 0 <= exit_start <= num_shared <= channels:
        raise ValueError(
            f"{NAME}: expected 0 <= exit_start <= num_shared <= C={channels}, "
            f"got exit_start={exit_start}, num_shared={num_shared}."
        )


def _check_residual(z: Tensor, residual: Tensor | None, pool: bool, relu_first: bool) -> None:
    if residual is None:
        return
    _common.check_tensors(NAME, z=z, residual=residual)
    if residual.shape != z.shape:
        raise ValueError(f"{NAME}: expected residual of z's shape {tuple(z.shape)}, got {tuple(residual.shape)}.")
    if relu_first or pool:
        raise ValueError(
            f"{NAME}: expected residual with relu_first=False and pool=False, got relu_first={relu_first}, "
            f"pool={pool}. Change them, or add the residual outside."
        )
