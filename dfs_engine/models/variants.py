"""The same function in another variant. With referencing that is a matter of gradients alone.

Without, a reader takes the other part of a feature for zeros. A `dense` model reads all of it, so there the columns of
the weights that meet the other part have to be zero. Where something without a weight reads a feature (a residual sum,
a product, a normalisation), nothing can be zeroed, and the two differ.
"""

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dfs_engine.nn import Columns, PartitionedConv2d, PartitionedLinear
from dfs_engine.nn.channel_order import ChannelOrder
from dfs_engine.partition import ChannelSlice

_TOLERANCE = 1e-9
"""Relative, in float64."""


@torch.no_grad()
def zero_unread_columns(model: nn.Module, dense: nn.Module, inputs: Mapping[str, Tensor]) -> None:
    """Zeroes in `dense` what `model`, of a sliced variant, multiplies by zeros, as a run on `inputs` shows."""
    unread: dict[str, list[ChannelSlice]] = {}

    def see(name: str) -> Any:
        def hook(layer: Any, input: tuple) -> None:
            unread[name] = _unread(layer, *input)

        return hook

    layers = {
        name: layer for name, layer in model.named_modules() if isinstance(layer, PartitionedConv2d | PartitionedLinear)
    }
    hooks = [layer.register_forward_pre_hook(see(name)) for name, layer in layers.items()]
    try:
        model(**inputs)
    finally:
        for hook in hooks:
            hook.remove()
    for name, ranges in unread.items():
        layer: Any = dense.get_submodule(name)
        for channels in ranges:
            groups, num_channels = getattr(layer, "groups", 1), layers[name].weight.size(1)
            if groups == 1:
                channels.of(layer.weight, 1).zero_()
            elif num_channels == 1:  # depthwise: some filters of its own for each channel
                layer.weight.view(groups, -1)[channels.start : channels.stop] = 0


def _unread(layer: Any, input: Tensor, full: Tensor | None = None, columns: Columns | None = None, *_: Any) -> list:
    """Channels of its weight that a layer reads as zero in this call."""
    if full is None or columns is None:
        columns, stop = Columns(layer.start, layer.reference), layer.stop
        num_channels = getattr(layer, layer.arguments[0])
    else:
        stop, num_channels = columns.start + input.size(columns.dim), full.size(columns.dim)
    if columns.reference:
        return []
    order = columns.order or ChannelOrder.ascending(0, num_channels)
    before, _ = order.cut(columns.start)
    _, behind = order.cut(stop)
    return [channels for channels in (*before.ranges, *behind.ranges) if channels.width > 0]


@torch.no_grad()
def check_same_outputs(model: Any, other: Any, inputs: Mapping[str, Tensor]) -> None:
    """Compares two models in float64.

    Raises:
        ValueError: they differ.
    """
    numbers = {name: value.double() if value.is_floating_point() else value for name, value in inputs.items()}
    expected, found = (copy.deepcopy(each).double().eval()(**numbers) for each in (model, other))
    for index, (a, b) in enumerate(zip(expected, found, strict=True)):
        if float((a - b).abs().max()) <= _TOLERANCE * max(1.0, float(a.abs().max())):
            continue
        name = model.name or type(model).__name__
        if model.variant == "dense":
            reason = (
                "a dense model reads all channels, and reference=False would have it read some as zero. Build it with "
                "reference=True for the same outputs"
            )
        else:
            reason = (
                "without referencing its readers take a part of each feature for zeros. That can be said by zero "
                "columns of convolutions and linear layers; here a residual sum, a product or a normalisation reads a "
                f"feature too. Keep variant={model.variant!r}, which can be exported as it is"
            )
        raise ValueError(
            f"to_variant: expected {name} to compute the same in variant {other.variant!r} as in {model.variant!r}, "
            f"got other logits at exit {index + 1}: {reason}."
        )
