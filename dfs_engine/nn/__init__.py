"""Layers: drop-in partitioned ones, and the routing of a feature to its two readers."""

from dfs_engine.nn.attention import attend
from dfs_engine.nn.concat import concat, fork_concat
from dfs_engine.nn.conv2d import PartitionedConv2d
from dfs_engine.nn.conv_act import Affine, ConvAct, can_fix, is_fixed_norm
from dfs_engine.nn.conv_norm_relu import ConvNormReLU
from dfs_engine.nn.convert import convert_layers, layers_to_stock, partition_layer, to_stock
from dfs_engine.nn.dropout import Dropout, convert_dropouts
from dfs_engine.nn.exit_head import Exit, ExitHead, TokenHead
from dfs_engine.nn.fork import SLICED_VARIANTS, VARIANTS, Fork
from dfs_engine.nn.linear import PartitionedLinear, apply_linears
from dfs_engine.nn.loss import exit_loss, smooth_labels
from dfs_engine.nn.norm_act import NormAct2d, apply_norm_relu, produce_from, produce_readings
from dfs_engine.nn.norm_linear import PartitionedLayerNorm, apply_norm_linear
from dfs_engine.nn.reading import (
    Columns,
    Reading,
    add,
    apply_layer,
    flat,
    global_avg_pool,
    map_channels,
    multiply,
    readings,
    select_rows,
    select_samples,
    whole,
)

__all__ = [
    "SLICED_VARIANTS",
    "VARIANTS",
    "Affine",
    "Columns",
    "ConvAct",
    "ConvNormReLU",
    "Dropout",
    "Exit",
    "ExitHead",
    "Fork",
    "NormAct2d",
    "PartitionedConv2d",
    "PartitionedLayerNorm",
    "PartitionedLinear",
    "Reading",
    "TokenHead",
    "add",
    "apply_layer",
    "apply_linears",
    "apply_norm_linear",
    "apply_norm_relu",
    "attend",
    "can_fix",
    "concat",
    "convert_dropouts",
    "convert_layers",
    "exit_loss",
    "flat",
    "fork_concat",
    "global_avg_pool",
    "is_fixed_norm",
    "layers_to_stock",
    "map_channels",
    "multiply",
    "partition_layer",
    "produce_from",
    "produce_readings",
    "readings",
    "select_rows",
    "select_samples",
    "smooth_labels",
    "to_stock",
    "whole",
]
