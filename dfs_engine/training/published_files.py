"""Reads weights as the published code leaves them: its own files, timm's checkpoints, folders of transformers."""

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dfs_engine.checks import one_line
from dfs_engine.models.pretrained import WEIGHT_FILES, weight_file
from dfs_engine.runtime.files import read_tensors

SAFE = ".safetensors"
# Under which a training checkpoint holds its state_dict, and the average of its weights.
_WRAPPERS = ("state_dict", "model")
_EMA_WRAPPERS = ("state_dict_ema", "model_ema")
# What DistributedDataParallel and torch.compile put before every key.
_PREFIXES = ("module.", "_orig_mod.")


class PublishedFile(NamedTuple):
    """What was found in a file.

    Attributes:
        tensors: published key -> tensor.
        epoch: epochs trained, if the file says so.
        has_ema: whether it holds averaged weights too.
    """

    tensors: dict[str, Tensor]
    epoch: int | None
    has_ema: bool


def is_transformers_folder(path: Path) -> bool:
    """Whether `path` is a folder as `save_pretrained` writes it."""
    return path.is_dir() and (path / "config.json").is_file()


def read_published(path: Path, ema: bool = False) -> PublishedFile:
    """Reads tensors, and runs no code that a file may hold.

    Args:
        path: a file of torch.save or safetensors, or a folder of transformers: a state_dict, alone or in a training
            checkpoint, its keys as they are or with what DistributedDataParallel and torch.compile put before them.
        ema: take the averaged weights of a timm checkpoint.

    Raises:
        ValueError: something else is in it.
    """
    found = weight_file(path)
    if found is None:
        raise ValueError(
            f"source: expected a run folder, or a transformers folder with {' or '.join(WEIGHT_FILES)}, got {path} "
            "without."
        )
    path, content = found, _load(found)
    epoch, has_ema = None, False
    wrappers = _EMA_WRAPPERS if ema else _WRAPPERS
    while True:
        if not isinstance(content, Mapping):
            raise ValueError(f"source: expected a state_dict in {path}, got a {type(content).__name__}.")
        if isinstance(content.get("epoch"), int):
            epoch = content["epoch"] + 1  # they count from 0
        has_ema = has_ema or any(content.get(key) is not None for key in _EMA_WRAPPERS)
        inner = next((content[key] for key in wrappers if isinstance(content.get(key), Mapping)), None)
        if inner is None:
            break
        content, wrappers = inner, _WRAPPERS
    if ema and not has_ema:
        raise ValueError(
            f"ema: expected averaged weights ({' or '.join(_EMA_WRAPPERS)}) in {path}, got none. Leave --ema out."
        )
    return PublishedFile(_without_prefixes(content), epoch, has_ema)


def _load(path: Path) -> Any:
    if path.suffix == SAFE:
        return read_tensors(path, "source")
    try:
        # timm's CheckpointSaver adds its arguments, a Namespace: a class of attributes, which has no code to run.
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # the pickle of a stranger may fail in any way
        raise ValueError(
            f"source: expected a file of tensors alone, by torch.save or safetensors, got {path} ({one_line(error)}). "
            "Nothing else is unpickled, because that may run code."
        ) from None


def _without_prefixes(tensors: Mapping[str, Any]) -> dict[str, Any]:
    keys = [str(key) for key in tensors]
    for prefix in _PREFIXES * 2:  # in either order
        if all(key.startswith(prefix) for key in keys):
            keys = [key.removeprefix(prefix) for key in keys]
    return dict(zip(keys, tensors.values(), strict=True))
