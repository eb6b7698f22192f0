"""Multi-exit training by Deep Feature Surgery (ECCV 2024), with backward passes that skip what nobody reads."""

from importlib.metadata import PackageNotFoundError, version

import dfs_engine._checkout  # noqa: F401
from dfs_engine.models import (
    MultiExitModel,
    attach_exits,
    create_model,
    list_models,
    load_model,
    load_official_state_dict,
    read_description,
    save_model,
    to_official_state_dict,
)
from dfs_engine.partition import ChannelSlice, Partition, PartitionedFeature, partition
from dfs_engine.runtime import memory

try:
    __version__ = version("dfs_engine")
except PackageNotFoundError:  # an uninstalled checkout on PYTHONPATH
    __version__ = "0+unknown"

__all__ = [
    "ChannelSlice",
    "MultiExitModel",
    "Partition",
    "PartitionedFeature",
    "attach_exits",
    "create_model",
    "list_models",
    "load_model",
    "load_official_state_dict",
    "memory",
    "partition",
    "read_description",
    "save_model",
    "to_official_state_dict",
]
