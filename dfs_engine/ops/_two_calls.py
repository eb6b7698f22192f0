"""The backend of `variant="split"`: two stock calls a layer, on the live part and on the rest, as in the published VGG.

A form to compare with, which `DFS_BACKEND` does not offer.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dfs_engine import reference as oracle
from dfs_engine.partition import ChannelSlice


def conv2d(
    live: Tensor,
    data: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    geometry: tuple[Any, Any, Any, int],
    columns: ChannelSlice,
    reference: bool,
) -> Tensor:
    """`partitioned_conv2d` of the live channels and of all (N, C, H, W); one call where one is enough."""
    *window, groups = geometry
    if columns.width == data.size(1):
        return F.conv2d(live, weight, bias, *geometry)
    if columns.width == 0 or groups != 1:
        return _one_call(live, data, weight, bias, geometry, columns, reference)
    output = F.conv2d(live, columns.of(weight, 1), bias, *window)
    if not reference:
        return output
    return output + F.conv2d(_others(data, columns).detach(), _others(weight, columns), None, *window)


def _one_call(
    live: Tensor,
    data: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    geometry: tuple[Any, Any, Any, int],
    columns: ChannelSlice,
    reference: bool,
) -> Tensor:
    """Stock convolutions refuse to read nothing; and a convolution by groups has two parts where a group ends."""
    stride, padding, dilation, groups = geometry
    per_group = weight.size(1)
    border = columns.stop if columns.start == 0 else columns.start
    touches_an_end = columns.start == 0 or columns.stop == data.size(1)
    if columns.width == 0 or not reference or not touches_an_end or border % per_group != 0:
        return F.conv2d(oracle.live_slice(live, *columns, reference, 1, data), weight, bias, *geometry)
    rest = _others(data, columns).detach()
    parts = (live, rest) if columns.start == 0 else (rest, live)
    counts = [part.size(1) // per_group for part in parts]
    rows = [count * (weight.size(0) // groups) for count in counts]
    biases = (None, None) if bias is None else bias.split(rows)
    calls = zip(parts, weight.split(rows), biases, counts, strict=True)
    return torch.cat([F.conv2d(x, w, b, stride, padding, dilation, count) for x, w, b, count in calls], 1)


def linear(
    live: Tensor, data: Tensor, weight: Tensor, bias: Tensor | None, columns: ChannelSlice, reference: bool
) -> Tensor:
    """`partitioned_linear` of the live features and of all (..., C)."""
    if columns.width in (0, data.size(-1)):
        return F.linear(oracle.live_slice(live, *columns, reference, -1, data), weight, bias)
    output = F.linear(live, columns.of(weight, 1), bias)
    if not reference:
        return output
    return output + F.linear(_others(data, columns, -1).detach(), _others(weight, columns))


def _others(tensor: Tensor, columns: ChannelSlice, dim: int = 1) -> Tensor:
    """What lies outside the slice; a view where that is one piece."""
    sides = ChannelSlice(0, columns.start), ChannelSlice(columns.stop, tensor.size(dim))
    parts = [side.of(tensor, dim) for side in sides if side.width > 0]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)
