"""The fused producer of a partitioned feature: ReLU, batch normalisation, 2x2 max pool and the exit's global average.

What follows a convolution in VGG, or, with the ReLU last, in ResNet and MSDNet (DESIGN section 4). The backward takes the two gradients as they come, the deeper path's
on its channels and the exit's as one number per image and channel, which is never spread out over the pixels.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dfs_engine import backend as backends
from dfs_engine.ops import _common
from dfs_engine.partition import fork_gradient

NAME = "conv_block"

_common.LIBRARY.define(
    "conv_block(Tensor z, Tensor gamma, Tensor beta, Tensor? running_mean, Tensor? running_var, float eps, bool pool,"
    " bool relu_first) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)
_common.LIBRARY.define(
    "conv_block_backward(Tensor grad_shared, Tensor grad_average, Tensor z, Tensor gamma, Tensor beta,"
    " Tensor average_hat, Tensor mean, Tensor inverse_std, Tensor passed, bool training, bool pool, bool relu_first)"
    " -> (Tensor, Tensor, Tensor)"
)


def _fake(z, gamma, beta, running_mean, running_var, eps, pool, relu_first):
    num_images, channels, height, width = z.shape
    shape = (num_images, channels, height // 2, width // 2) if pool else z.shape
    feature = torch.empty(shape, dtype=z.dtype, device=z.device, memory_format=torch.channels_last)
    average_hat = z.new_empty((num_images, channels), dtype=torch.float32)
    statistics = [z.new_empty(channels, dtype=torch.float32) for _ in range(3)]
    return feature, average_hat.to(z.dtype, copy=True), average_hat, *statistics, torch.empty_like(average_hat)


def _fake_backward(
    grad_shared, grad_average, z, gamma, beta, average_hat, mean, inverse_std, passed, training, pool, relu_first
):
    return torch.empty_like(z, memory_format=torch.channels_last), torch.empty_like(gamma), torch.empty_like(beta)


_common.register_fake("conv_block", _fake)
_common.register_fake("conv_block_backward", _fake_backward)


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


class _ConvBlock(torch.autograd.Function):
    @staticmethod
    def forward(ctx, z, gamma, beta, running_mean, running_var, eps, pool, relu_first, num_shared, exit_start):
        feature, average, average_hat, mean, inverse_std, variance, passed = torch.ops.dfs_engine.conv_block(
            z, gamma, beta, running_mean, running_var, eps, pool, relu_first
        )
        ctx.save_for_backward(z, gamma, beta, average_hat, mean, inverse_std, passed)
        ctx.modes, ctx.exit_start = (running_mean is None, pool, relu_first), exit_start
        ctx.mark_non_differentiable(feature, average, mean, variance)
        num_channels = z.size(1)
        shared = feature.narrow(1, 0, num_shared).detach()
        exit = average.narrow(1, exit_start, num_channels - exit_start).clone()
        return feature, shared, average, exit, mean, variance

    @staticmethod
    def backward(ctx, _, grad_shared: Tensor, __, grad_exit: Tensor, *___):
        if _common.creating_graph():
            raise RuntimeError(
                f"{NAME}: the fused backward cannot be differentiated again. Use backend='aten' for create_graph=True."
            )
        # The exit's gradient on all channels, zero where the exit trains nothing: it is small.
        grad_average = F.pad(grad_exit, (ctx.exit_start, 0))
        grads = torch.ops.dfs_engine.conv_block_backward(grad_shared, grad_average, *ctx.saved_tensors, *ctx.modes)
        return *grads, None, None, None, None, None, None, None


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


def conv_block(
    z: Tensor,
    weight: Tensor,
    bias: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    *,
    training: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
    pool: bool = False,
    relu_first: bool = True,
    num_shared: int,
    exit_start: int,
    backend: str | None = None,
) -> ProducedFeature:
    """ReLU, batch normalisation, optional 2x2 max pool and global average of a convolution's output, partitioned.

    Equivalent to: ``f = F.batch_norm(F.relu(z), ...); f = F.max_pool2d(f, 2) if pool else f;``
    ``ProducedFeature(f.detach(), f[:, :num_shared], f.mean((2, 3)).detach(), f.mean((2, 3))[:, exit_start:])``

    Args:
        z: (N, C, H, W).
        weight, bias: (C,), the normalisation's.
        running_mean, running_var: (C,) or None; updated in place when training, used when not.
        training, momentum, eps: as `F.batch_norm`.
        pool: whether a 2x2 max pool ends the block.
        relu_first: ReLU before the normalisation (True, VGG) or after it (ResNet, MSDNet).
        num_shared: channels [0, num_shared) carry the deeper path's gradient.
        exit_start: the averages of channels [exit_start, C) carry the exit's gradient.
        backend: "aten" or "reference" (stock PyTorch), "cpp" (fused for fp32 and bf16, with sums in
            fp32 and fp64; other dtypes run the stock operators); None picks.

    Raises:
        RuntimeError: a requested backend that is not there; differentiating the fused backward again.
    """
    z, *_ = _common.autocast(z)  # type: ignore[assignment]
    _common.check_tensors(NAME, z=z)
    kernels = backends.select(NAME, z.device, z.dtype, backend)
    training = training or running_mean is None
    if kernels == "cpp" and z.dtype in (torch.float32, torch.bfloat16):
        given = (None, None) if training else (running_mean, running_var)
        *produced, mean, variance = _ConvBlock.apply(z, weight, bias, *given, eps, pool, relu_first, num_shared, exit_start)
        if training and running_mean is not None and running_var is not None and z.numel() > 0:
            count = z.numel() // z.size(1)
            # As nn.BatchNorm2d: the running variance is the unbiased one.
            running_mean.lerp_(mean.to(running_mean.dtype), momentum)
            running_var.lerp_((variance * (count / max(count - 1, 1))).to(running_var.dtype), momentum)
        return ProducedFeature(*produced)
    feature = F.relu(z) if relu_first else z
    feature = F.batch_norm(feature, running_mean, running_var, weight, bias, training, momentum, eps)
    feature = feature if relu_first else F.relu(feature)
    feature = F.max_pool2d(feature, 2) if pool else feature
    full, shared, live = fork_gradient(feature, num_shared, exit_start)
    exit, average = live_mean(live, full, exit_start)
    return ProducedFeature(full, shared, average, exit)
