"""Layers: drop-in partitioned ones, and the routing of a feature to its two readers."""

from dfs_engine.nn.concat import concat, fork_concat
from dfs_engine.nn.conv2d import PartitionedConv2d
from dfs_engine.nn.conv_block import apply_norm_relu, produce_readings
from dfs_engine.nn.dropout import Dropout, attend, convert_dropouts
from dfs_engine.nn.exit_head import Exit, ExitHead, TokenHead
from dfs_engine.nn.linear import PartitionedLinear, apply_linears, convert_linears
from dfs_engine.nn.loss import exit_loss, smooth_labels
from dfs_engine.nn.norm_linear import apply_norm_linear
from dfs_engine.nn.routing import (
    VARIANTS,
    ConcatReading,
    Fork,
    Reading,
    add,
    apply_layer,
    global_avg_pool,
    map_channels,
    multiply,
    read_like,
    whole,
)

__all__ = [
    "VARIANTS",
    "ConcatReading",
    "Dropout",
    "Exit",
    "ExitHead",
    "Fork",
    "PartitionedConv2d",
    "PartitionedLinear",
    "Reading",
    "TokenHead",
    "add",
    "apply_layer",
    "apply_linears",
    "apply_norm_linear",
    "apply_norm_relu",
    "attend",
    "concat",
    "convert_dropouts",
    "convert_linears",
    "exit_loss",
    "fork_concat",
    "global_avg_pool",
    "map_channels",
    "multiply",
    "produce_readings",
    "read_like",
    "smooth_labels",
    "whole",
]
