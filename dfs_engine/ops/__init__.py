"""Functional API: stock operators whose backward skips the work outside a channel slice.

One file an op: dispatcher schema, fake, argument checks, `aten` implementation, autograd.
"""

import warnings
from typing import Any

from dfs_engine.ops import _triton
from dfs_engine.ops.conv2d import partitioned_conv2d
from dfs_engine.ops.conv_act import FixedConv, conv_act
from dfs_engine.ops.dropout import dropout
from dfs_engine.ops.linear import partitioned_linear
from dfs_engine.ops.norm_act import ProducedFeature, live_mean, norm_act, norm_relu
from dfs_engine.ops.norm_linear import partitioned_norm_linear

__all__ = [
    "FixedConv",
    "ProducedFeature",
    "conv_act",
    "dropout",
    "live_mean",
    "norm_act",
    "norm_relu",
    "partitioned_conv2d",
    "partitioned_linear",
    "partitioned_norm_linear",
]

_triton.register()


def __getattr__(name: str) -> Any:
    if name == "conv_block":
        warnings.warn("ops.conv_block is now ops.norm_act; the old name goes with 0.2.", FutureWarning, stacklevel=2)
        return norm_act
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
