"""Layers: drop-in partitioned ones, and the routing of a feature to its two readers."""

from dfs_engine.nn.conv2d import PartitionedConv2d
from dfs_engine.nn.conv_block import produce_readings
from dfs_engine.nn.exit_head import ExitHead
from dfs_engine.nn.linear import PartitionedLinear
from dfs_engine.nn.norm_linear import apply_norm_linear
from dfs_engine.nn.routing import VARIANTS, Fork, Reading, add, apply_layer, global_avg_pool, whole

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
    "global_avg_pool",
    "produce_readings",
    "whole",
]
