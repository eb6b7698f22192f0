"""The fused producer on a stock `nn.BatchNorm2d`, and what its two readers get."""

from torch import Tensor, nn

from dfs_engine.nn.routing import Fork, Reading, SlicedReading
from dfs_engine.ops import conv_block


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
    training = bn.training or bn.running_mean is None
    momentum = 0.0 if bn.momentum is None else bn.momentum
    if bn.training and bn.num_batches_tracked is not None:
        bn.num_batches_tracked.add_(1)
        if bn.momentum is None:  # cumulative average
            momentum = 1.0 / float(bn.num_batches_tracked)
    num_channels = z.size(1)
    num_shared, exit_start = (0, 0) if is_last else fork.live_channels(num_channels)
    produced = conv_block(
        z,
        bn.weight,
        bn.bias,
        bn.running_mean,
        bn.running_var,
        training=training,
        momentum=momentum,
        eps=bn.eps,
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
