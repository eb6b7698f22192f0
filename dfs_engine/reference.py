"""Every op in naive PyTorch: the published `cat` + `detach` on stock autograd. The oracle, never fast.

The ops run it for `backend="reference"` and where a backward is differentiated again, the `detach` variant routes by
it, and tests, `dfs validate` and benchmarks compare with it. Imports only torch.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def live_slice(input: Tensor, start: int, stop: int, reference: bool, dim: int, full: Tensor | None = None) -> Tensor:
    """A feature with gradient in [start, stop) only; outside it reads as itself (referencing), or as zero.

    Paper section 3.3: with referencing the reader sees its own part and sg(the other's). With `full`, `input` is the
    live part alone and the rest is read from `full`.
    """
    data = input if full is None else full
    live = input.narrow(dim, start, stop - start) if full is None else input
    before = data.narrow(dim, 0, start).detach()
    after = data.narrow(dim, stop, data.size(dim) - stop).detach()
    if not reference:
        before, after = torch.zeros_like(before), torch.zeros_like(after)
    return torch.cat([before, live, after], dim)


def partition(
    feature: Tensor, beta: float, *, dim: int = 1, exit_gradient: str = "own", reference: bool = True
) -> tuple[Tensor, Tensor, Tensor]:
    """See `dfs_engine.partition`: (full, shared, exit)."""
    num_channels = feature.size(dim)
    num_shared = round(beta * num_channels)
    exit_start = 0 if exit_gradient == "whole" and reference and beta < 1 else num_shared
    shared, exit = feature.narrow(dim, 0, num_shared), feature.narrow(dim, exit_start, num_channels - exit_start)
    return feature.detach(), shared, exit


def partitioned_conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] = 0,
    dilation: int | tuple[int, int] = 1,
    groups: int = 1,
    *,
    start: int,
    stop: int,
    reference: bool = True,
    full: Tensor | None = None,
) -> Tensor:
    """See `dfs_engine.ops.partitioned_conv2d`."""
    return F.conv2d(
        live_slice(input, start, stop, reference, -3, full), weight, bias, stride, padding, dilation, groups
    )


def partitioned_linear(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    start: int,
    stop: int,
    reference: bool = True,
    full: Tensor | None = None,
) -> Tensor:
    """See `dfs_engine.ops.partitioned_linear`."""
    return F.linear(live_slice(input, start, stop, reference, -1, full), weight, bias)


def batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
) -> Tensor:
    """`F.batch_norm`, right for parameters and statistics of any strides.

    ATen's backward on channels_last reads them as if they were contiguous.
    """
    mean, variance, gain, shift = (
        None if tensor is None else tensor.contiguous() for tensor in (running_mean, running_var, weight, bias)
    )
    output = F.batch_norm(input, mean, variance, gain, shift, training, momentum, eps)
    if training:
        for given, updated in ((running_mean, mean), (running_var, variance)):
            if given is not None and updated is not None and given is not updated:
                given.copy_(updated)
    return output


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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See `dfs_engine.ops.norm_act`: (full, shared, average, exit)."""
    feature = F.relu(z) if relu_first else z
    feature = batch_norm(feature, running_mean, running_var, weight, bias, training, momentum, eps)
    feature = feature if residual is None else feature + residual
    feature = feature if relu_first else F.relu(feature)
    feature = F.max_pool2d(feature, 2) if pool else feature
    average = feature.mean((2, 3))
    return feature.detach(), feature[:, :num_shared], average.detach(), average[:, exit_start:]


def partitioned_norm_linear(
    input: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    eps: float = 1e-5,
    start: int,
    stop: int,
    reference: bool = True,
    full: Tensor | None = None,
) -> Tensor:
    """See `dfs_engine.ops.partitioned_norm_linear`."""
    seen = live_slice(input, start, stop, reference, -1, full)
    return F.linear(F.layer_norm(seen, seen.shape[-1:], norm_weight, norm_bias, eps).to(weight.dtype), weight, bias)


def conv_act(
    input: Tensor,
    conv: Any,
    residual: Tensor | None = None,
    *,
    relu: bool = True,
    pool: bool = False,
    averages: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """See `dfs_engine.ops.conv_act`, whose `FixedConv` `conv` is, or another object with its attributes."""
    bias = None if conv.bias is None else conv.bias.to(input.dtype)
    feature = F.conv2d(input, conv.weight.to(input.dtype), bias, *conv.geometry)
    feature = feature if residual is None else feature + residual
    feature = F.relu(feature) if relu else feature
    if conv.scale is not None:
        scale, shift = (tensor.to(input.dtype)[:, None, None] for tensor in (conv.scale, conv.shift))
        feature = feature * scale + shift
    feature = F.max_pool2d(feature, 2) if pool else feature
    return feature, feature.mean((2, 3)) if averages else None
