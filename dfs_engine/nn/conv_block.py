"""The fused producer on a stock `nn.BatchNorm2d`: of a feature for its two readers, or of one that nobody splits."""

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from dfs_engine.nn.routing import Fork, Reading, SlicedReading, read_like
from dfs_engine.ops import conv_block, norm_relu


def produce_readings(
    z: Tensor,
    bn: nn.BatchNorm2d,
    fork: Fork,
    *,
    pool: bool = False,
    relu_first: bool = True,
    residual: Tensor | None = None,
    is_last: bool,
) -> tuple[Reading, Reading]:
    """ReLU, `bn`, optional 2x2 max pool, and the fork, in one op; updates `bn`'s statistics as its own forward would.

    Args:
        z: convolution output (N, C, H, W).
        fork: of the `dfs` variant.
        pool: whether a 2x2 max pool ends the block.
        relu_first: ReLU before `bn` (True, VGG) or after it (ResNet, MSDNet).
        residual: (N, C, H, W), added between `bn` and the ReLU; with relu_first=False and pool=False.
        is_last: the last feature is not split: its exit trains all of it.

    Returns:
        What the deeper path reads, and what an exit that starts with a global average pool reads, averaged already.
    """
    num_shared, exit_start = (0, 0) if is_last else fork.live_channels(z.size(1))
    produced = conv_block(
        z,
        **_normalisation(bn),
        pool=pool,
        relu_first=relu_first,
        residual=residual,
        num_shared=num_shared,
        exit_start=exit_start,
        backend=fork.backend,
    )
    return (
        SlicedReading(produced.shared, produced.full, 0, fork.reference, fork.backend),
        SlicedReading(produced.exit, produced.average, exit_start, fork.reference, fork.backend),
    )


def apply_norm_relu(bn: nn.BatchNorm2d, z: Tensor, input: Reading, residual: Tensor | None = None) -> Reading:
    """ReLU of `bn`'s output plus a residual, which nobody splits; in the `dfs` variant one op.

    Args:
        z: (N, C, H, W), what a layer made of `input`.
        input: how that layer read; the result is for layers that read alike (see `read_like`).
        residual: (N, C, H, W), added between `bn` and the ReLU.
    """
    if not isinstance(input, SlicedReading) or type(bn) is not nn.BatchNorm2d:  # e.g. converted to SyncBatchNorm
        feature = bn(z)
        return read_like(F.relu(feature if residual is None else feature.add_(residual), inplace=True), input)
    return read_like(norm_relu(z, **_normalisation(bn), residual=residual, backend=input.backend), input)


def _normalisation(bn: nn.BatchNorm2d) -> dict[str, Any]:
    """What the ops take from `bn`; counts the batch, as its own forward does."""
    training = bn.training or bn.running_mean is None
    momentum = 0.0 if bn.momentum is None else bn.momentum
    if bn.training and bn.num_batches_tracked is not None:
        bn.num_batches_tracked.add_(1)
        if bn.momentum is None:  # cumulative average
            momentum = 1.0 / float(bn.num_batches_tracked)
    return {
        "weight": bn.weight,
        "bias": bn.bias,
        "running_mean": bn.running_mean,
        "running_var": bn.running_var,
        "training": training,
        "momentum": momentum,
        "eps": bn.eps,
    }
