"""Channels that lie in another order than a layer's, so that the live ones stay one interval.

Behind a fork the channels [k, C) of a feature x are frozen, and they stay so in every concatenation that carries x: of
cat[x, new] the live channels are [0, k) and the new ones, with the frozen ones between them. An op computes the
gradient of one interval. A concatenation therefore keeps its live channels first, in the layer's order, and the frozen
ones behind them. New channels go between the two, and a fork cuts the live ones into a head and a tail, so that neither
moves data for the order's sake. What follows the order are the columns of a layer's weight: a copy of a few hundred
numbers an output channel, where the feature has as many a pixel.
"""

from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from dfs_engine.partition import ChannelSlice


class ChannelOrder(NamedTuple):
    """Which channels of a layer's input a tensor holds, in the order in which it holds them."""

    ranges: tuple[ChannelSlice, ...]

    @classmethod
    def ascending(cls, start: int, stop: int) -> "ChannelOrder":
        """Channels [start, stop) as the layer has them."""
        return cls((ChannelSlice(start, stop),))

    @property
    def num_channels(self) -> int:
        return sum(channels.width for channels in self.ranges)

    def cut(self, position: int) -> tuple["ChannelOrder", "ChannelOrder"]:
        """The first `position` channels, and the others."""
        ends = list(accumulate(channels.width for channels in self.ranges))
        head, tail = [], []
        for (start, stop), end in zip(self.ranges, ends, strict=True):
            border = min(max(stop - (end - position), start), stop)
            head.append(ChannelSlice(start, border))
            tail.append(ChannelSlice(border, stop))
        return _joined(head), _joined(tail)

    def followed_by(self, *others: "ChannelOrder") -> "ChannelOrder":
        return _joined([channels for order in (self, *others) for channels in order.ranges])

    def num_below(self, channel: int) -> int:
        """How many of these channels the layer numbers below `channel`."""
        return sum(min(max(channel - start, 0), stop - start) for start, stop in self.ranges)

    def columns_of(self, weight: Tensor) -> Tensor:
        """The columns (dimension 1) of a layer's weight, in this order."""
        if len(self.ranges) == 1:
            return weight
        ascending = sorted(self.ranges)
        columns = weight.split([channels.width for channels in ascending], 1)
        return torch.cat([columns[ascending.index(channels)] for channels in self.ranges], 1)

    def restore(self, stored: Tensor, dim: int) -> Tensor:
        """A tensor that is held in this order, in the layer's."""
        if len(self.ranges) == 1:
            return stored
        parts = stored.split([channels.width for channels in self.ranges], dim)
        return torch.cat([parts[self.ranges.index(channels)] for channels in sorted(self.ranges)], dim)


def _joined(ranges: list[ChannelSlice]) -> ChannelOrder:
    """Without empty ranges, and with neighbours made one."""
    joined: list[ChannelSlice] = []
    for channels in ranges:
        if joined and joined[-1].stop == channels.start:
            joined[-1] = ChannelSlice(joined[-1].start, channels.stop)
        elif channels.width > 0:
            joined.append(channels)
    return ChannelOrder(tuple(joined))
