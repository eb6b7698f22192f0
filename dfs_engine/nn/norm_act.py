"""Batch normalisation and what follows it, ReLU, a residual, a pool, the fork of the feature, as one called layer."""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dfs_engine.nn.conv2d import PartitionedConv2d
from dfs_engine.nn.fork import Fork
from dfs_engine.nn.reading import Reading, apply_layer, readings
from dfs_engine.ops import norm_act, norm_relu
from dfs_engine.partition import ChannelSlice


class _Tail(NamedTuple):
    """What `NormAct2d` computes besides the normalisation: a ReLU and, of a feature that is split, its readings.

    Attributes:
        fork: None: a ReLU alone.
        is_last: the last feature is not split: its exit trains all of it.
        pool: whether a 2x2 max pool ends the block.
        num_channels, first: of a feature of so many channels the input is those from the first on (see `nn.apart`).
    """

    fork: Fork | None = None
    is_last: bool = False
    pool: bool = False
    num_channels: int | None = None
    first: int = 0

    def live_channels(self, width: int) -> tuple[int, int]:
        """`Fork.live_channels` in an input of this width."""
        assert self.fork is not None
        if self.is_last:
            return 0, 0
        borders = self.fork.live_channels(self.num_channels or width)
        num_shared, exit_start = (min(max(border - self.first, 0), width) for border in borders)
        return num_shared, exit_start


class NormAct2d(nn.BatchNorm2d):
    """`nn.BatchNorm2d`, and on request what follows it. Same parameters, buffers and state_dict keys."""

    backend: str | None = None

    def forward(self, input: Tensor, residual: Tensor | None = None, tail: _Tail | None = None) -> Any:
        """(N, C, H, W) -> the same. `residual`, `tail`: as `apply_norm_relu` and `produce_readings` give them."""
        if tail is None:
            return super().forward(input)
        if tail.fork is None:
            return norm_relu(input, **self._normalisation(), residual=residual, backend=self.backend)
        num_shared, exit_start = tail.live_channels(input.size(1))
        made = norm_act(
            input,
            **self._normalisation(),
            pool=tail.pool,
            num_shared=num_shared,
            exit_start=exit_start,
            backend=self.backend,
        )
        deeper, exit = tail.fork.columns(0), tail.fork.columns(exit_start)
        return made.shared, made.full, deeper, made.exit, made.average, exit

    def _normalisation(self) -> dict[str, Any]:
        """What the ops take; counts the batch, as the stock layer's forward does."""
        training = self.training or self.running_mean is None
        momentum = 0.0 if self.momentum is None else self.momentum
        if self.training and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            if self.momentum is None:  # cumulative average
                momentum = 1.0 / float(self.num_batches_tracked)
        return {
            "weight": self.weight,
            "bias": self.bias,
            "running_mean": self.running_mean,
            "running_var": self.running_var,
            "training": training,
            "momentum": momentum,
            "eps": self.eps,
        }


def apply_norm_relu(bn: nn.Module, z: Tensor, residual: Tensor | None = None) -> Tensor:
    """ReLU of `bn`'s output plus a residual, (N, C, H, W) each, for a feature that nobody splits."""
    if isinstance(bn, NormAct2d):
        return bn(z, residual, _Tail())
    feature = bn(z)  # a stock layer, or what has taken the place of one, e.g. a SyncBatchNorm
    return F.relu(feature if residual is None else feature.add_(residual), inplace=True)


def produce_readings(bn: NormAct2d, z: Tensor, fork: Fork, *, pool: bool, is_last: bool) -> tuple[Reading, Reading]:
    """ReLU, `bn`, an optional 2x2 max pool, and the fork, in one op.

    Args:
        z: convolution output (N, C, H, W).
        fork: of the `dfs` variant.
        pool: whether a 2x2 max pool ends the block.
        is_last: the last feature is not split: its exit trains all of it.

    Returns:
        What the deeper path reads, and what an exit that starts with a global average pool reads, averaged already.
    """
    deeper, exit = readings(bn(z, None, _Tail(fork, is_last, pool)))
    return deeper, exit


def produce_from(
    conv: nn.Module, bn: NormAct2d, input: tuple, fork: Fork, *, pool: bool, is_last: bool
) -> tuple[Reading, Reading]:
    """`produce_readings` of the convolution of `input`, a reading; each part by itself where the fork wants that.

    A layer that somebody has put in the place of one of this package's is never taken apart.
    """
    can = type(conv) is PartitionedConv2d and conv.groups == 1 and type(bn) is NormAct2d
    num_shared, exit_start = fork.live_channels(bn.num_features)
    if fork.leaves is None or is_last or not can or num_shared in (0, bn.num_features) or torch.compiler.is_compiling():
        return produce_readings(bn, apply_layer(conv, input), fork, pool=pool, is_last=is_last)
    made = []
    for rows in (ChannelSlice(0, num_shared), ChannelSlice(num_shared, bn.num_features)):
        tail = _Tail(fork, pool=pool, num_channels=bn.num_features, first=rows.start)
        made.append(fork.leaves.call(bn, rows, fork.leaves.call(conv, rows, *input), None, tail))
    (shared, full, _, *exits), (_, full_rest, _, *exits_rest) = made
    exit, average = (_join(*parts) for parts in zip(exits[:2], exits_rest[:2], strict=True))
    return (shared, _join(full, full_rest), fork.columns(0)), (exit, average, fork.columns(exit_start))


def _join(first: Tensor, rest: Tensor) -> Tensor:
    return torch.cat([first, rest], 1) if first.size(1) > 0 else rest
