"""Layers: drop-in partitioned ones, and the routing of a feature to its two readers."""

from dfs_engine.nn.conv2d import PartitionedConv2d
from dfs_engine.nn.conv_block import produce_readings
from dfs_engine.nn.exit_head import ExitHead
from dfs_engine.nn.linear import PartitionedLinear, apply_linears, convert_linears
from dfs_engine.nn.loss import exit_loss
from dfs_engine.nn.norm_linear import apply_norm_linear
from dfs_engine.nn.routing import VARIANTS, Fork, Reading, add, apply_layer, global_avg_pool, map_channels, whole

__all__ = [
    "VARIANTS",
    "ExitHead",
    "Fork",
    "PartitionedConv2d",
    "PartitionedLinear",
    "Reading",
    "add",
    "apply_layer",
    "apply_linears",
    "apply_norm_linear",
    "convert_linears",
    "exit_loss",
    "global_avg_pool",
    "map_channels",
    "produce_readings",
    "whole",
]
