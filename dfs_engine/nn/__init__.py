"""Layers: drop-in partitioned ones, and the routing of a feature to its two readers."""

from dfs_engine.nn.conv2d import PartitionedConv2d
from dfs_engine.nn.conv_block import apply_norm_relu, produce_readings
from dfs_engine.nn.exit_head import ExitHead
from dfs_engine.nn.linear import PartitionedLinear
from dfs_engine.nn.norm_linear import apply_norm_linear
from dfs_engine.nn.routing import VARIANTS, Fork, Reading, add, apply_layer, global_avg_pool, multiply, read_like, whole

__all__ = [
    "VARIANTS",
    "ExitHead",
    "Fork",
    "PartitionedConv2d",
    "PartitionedLinear",
    "Reading",
    "add",
    "apply_layer",
    "apply_norm_linear",
    "apply_norm_relu",
    "global_avg_pool",
    "multiply",
    "produce_readings",
    "read_like",
    "whole",
]
