"""Dense concatenation of a split feature: a frozen channel stays frozen, and nothing computes a gradient for it.

How the channels lie, and why: see `channel_order`.
"""

import torch
from torch import Tensor

from dfs_engine.nn.channel_order import ChannelOrder
from dfs_engine.nn.fork import Fork
from dfs_engine.nn.reading import Reading, whole
from dfs_engine.partition import expect_absent_gradients, fork_gradient


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


def concat(reading: Reading, *new: Reading) -> Reading:
    """``torch.cat([feature, *new], 1)`` for the layers behind it.

    Args:
        reading: of a feature (N, C, H, W) or a concatenation, whose live channels come first.
        new: features (N, C_i, H, W) that nobody has split.
    """
    added = [whole(feature) for feature in new]
    if len(reading) == 1:
        return (torch.cat([*reading, *added], 1),)
    live, full, columns = reading
    order = columns.order or ChannelOrder.ascending(0, full.size(1))
    kept, frozen = order.cut(live.size(1))
    first_new = order.num_channels
    between = ChannelOrder.ascending(first_new, first_new + sum(feature.size(1) for feature in added))
    full, extended = _Extend.apply(live, full, *added)
    return extended, full, columns._replace(order=kept.followed_by(between, frozen))


def fork_concat(reading: Reading, fork: Fork) -> tuple[Reading, Reading]:
    """`fork` of a feature of which some channels may be frozen already, and stay so for both readers.

    Args:
        reading: as that of `concat`.

    Returns:
        What the deeper path and the exit read.
    """
    if len(reading) == 1:
        return fork(*reading)
    live, full, columns = reading
    order = columns.order or ChannelOrder.ascending(0, full.size(1))
    kept, _ = order.cut(live.size(1))
    num_shared, exit_start = (kept.num_below(channel) for channel in fork.live_channels(order.num_channels))
    _, shared, exit = fork_gradient(live, num_shared, exit_start)
    return (
        (shared, full, fork.columns(0)._replace(order=order)),
        (exit, full, fork.columns(exit_start)._replace(order=order)),
    )
