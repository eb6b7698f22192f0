"""Dense concatenation of a split feature: a frozen channel stays frozen, and nothing computes a gradient for it.

How the channels lie, and why: see `channel_order`.
"""

import torch
from torch import Tensor

from dfs_engine.nn.channel_order import ChannelOrder
from dfs_engine.nn.routing import ConcatReading, Fork, Reading, SlicedReading, TwoCallReading, whole
from dfs_engine.partition import ChannelSlice, expect_absent_gradients, fork_gradient


class _Extend(torch.autograd.Function):
    """Puts new channels between the live ones and the frozen ones: one write; the backward hands out views."""

    @staticmethod
    def forward(ctx, live: Tensor, full: Tensor, *new: Tensor) -> tuple[Tensor, Tensor]:
        num_live = live.size(1)
        ctx.widths = [num_live, *(part.size(1) for part in new)]
        parts = [live, *new, full.narrow(1, num_live, full.size(1) - num_live)]
        # An empty part would have its say in the memory format.
        stored = torch.cat([part for part in parts if part.size(1) > 0], 1)
        ctx.mark_non_differentiable(stored)
        expect_absent_gradients(ctx)
        return stored, stored.narrow(1, 0, sum(ctx.widths)).detach()

    @staticmethod
    def backward(ctx, _, grad_live: Tensor | None):
        if grad_live is None:
            return None, None, *(None for _ in ctx.widths[1:])
        grad_input, *grads_new = grad_live.split(ctx.widths, 1)
        return grad_input, None, *grads_new


def concat(input: Reading, *new: Reading) -> Reading:
    """``torch.cat([input, *new], 1)`` for the layers behind it.

    Args:
        input: a feature (N, C, H, W), what the deeper path reads of one, or a concatenation.
        new: features (N, C_i, H, W) that nobody has split.
    """
    added = [whole(feature, 1) for feature in new]
    if isinstance(input, Tensor):
        return torch.cat([input, *added], 1)
    stored, order = _stored(input)
    live, frozen = order.cut(stored.live.size(1))
    first_new = order.num_channels
    order = live.followed_by(
        ChannelOrder.ascending(first_new, first_new + sum(feature.size(1) for feature in added)), frozen
    )
    if isinstance(stored, SlicedReading):
        full, extended = _Extend.apply(stored.live, stored.full, *added)
        return ConcatReading(stored._replace(live=extended, full=full), order)
    extended = torch.cat([stored.live, *added], 1)
    return ConcatReading(_two_calls(extended, stored.rest, order), order)


def fork_concat(input: Reading, fork: Fork) -> tuple[Reading, Reading]:
    """`fork` of a feature of which some channels may be frozen already, and stay so for both readers.

    Args:
        input: as that of `concat`.

    Returns:
        What the deeper path and the exit read.
    """
    if isinstance(input, Tensor):
        return fork(input)
    stored, order = _stored(input)
    num_live = stored.live.size(1)
    live, _ = order.cut(num_live)
    num_shared, exit_start = (live.num_below(channel) for channel in fork.live_channels(order.num_channels))
    if isinstance(stored, SlicedReading):
        _, shared, exit = fork_gradient(stored.live, num_shared, exit_start)
        deeper = stored._replace(live=shared, reference=fork.reference)
        return ConcatReading(deeper, order), ConcatReading(deeper._replace(live=exit, start=exit_start), order)
    return _keep_live(stored, order, 0, num_shared), _keep_live(stored, order, exit_start, num_live)


def _keep_live(stored: TwoCallReading, order: ChannelOrder, start: int, stop: int) -> Reading:
    """Of the live channels only [start, stop) stay live."""
    live, frozen = order.cut(stored.live.size(1))
    before, others = live.cut(start)
    kept, after = others.cut(stop - start)
    head, middle, tail = stored.live.split([before.num_channels, kept.num_channels, after.num_channels], 1)
    rest = None if stored.rest is None else torch.cat([head.detach(), tail.detach(), stored.rest], 1)
    order = kept.followed_by(before, after, frozen)
    reading = ConcatReading(_two_calls(middle, rest, order), order)
    return reading if start < stop else reading.whole(1)  # stock convolutions refuse an empty part


def _two_calls(live: Tensor, rest: Tensor | None, order: ChannelOrder) -> TwoCallReading:
    return TwoCallReading(live, rest, ChannelSlice(0, live.size(1)), order.num_channels)


def _stored(
    input: SlicedReading | TwoCallReading | ConcatReading,
) -> tuple[SlicedReading | TwoCallReading, ChannelOrder]:
    """A reading whose live channels come first, and which ones of the layer's it holds where."""
    if isinstance(input, ConcatReading):
        return input.stored, input.order
    num_channels = input.full.size(1) if isinstance(input, SlicedReading) else input.num_channels
    return input, ChannelOrder.ascending(0, num_channels)
