"""Functional API: stock operators whose backward skips the work outside a channel slice.

One file an op: dispatcher schema, fake, argument checks, `aten` implementation, autograd.
"""

from dfs_engine.ops import _triton
from dfs_engine.ops.conv2d import partitioned_conv2d
from dfs_engine.ops.conv_block import ProducedFeature, conv_block, live_mean, norm_relu
from dfs_engine.ops.dropout import dropout
from dfs_engine.ops.linear import partitioned_linear
from dfs_engine.ops.norm_linear import partitioned_norm_linear

__all__ = [
    "ProducedFeature",
    "conv_block",
    "dropout",
    "live_mean",
    "norm_relu",
    "partitioned_conv2d",
    "partitioned_linear",
    "partitioned_norm_linear",
]

_triton.register()
