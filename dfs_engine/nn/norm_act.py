"""Batch normalisation and what follows it, ReLU, a residual, a pool, the fork of the feature, as one called layer."""

from typing import Any, NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from dfs_engine.nn.fork import Fork
from dfs_engine.nn.reading import Reading, readings
from dfs_engine.ops import norm_act, norm_relu


class _Tail(NamedTuple):
    """What `NormAct2d` computes besides the normalisation: a ReLU and, of a feature that is split, its readings."""

    fork: Fork | None = None
    is_last: bool = False
    pool: bool = False


class NormAct2d(nn.BatchNorm2d):
    """`nn.BatchNorm2d`, and on request what follows it. Same parameters, buffers and state_dict keys."""

    backend: str | None = None

    def forward(self, input: Tensor, residual: Tensor | None = None, tail: _Tail | None = None) -> Any:
        """(N, C, H, W) -> the same. `residual`, `tail`: as `apply_norm_relu` and `produce_readings` give them."""
        if tail is None:
            return super().forward(input)
        if tail.fork is None:
            return norm_relu(input, **self._normalisation(), residual=residual, backend=self.backend)
        # The last feature is not split: its exit trains all of it.
        num_shared, exit_start = (0, 0) if tail.is_last else tail.fork.live_channels(input.size(1))
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
