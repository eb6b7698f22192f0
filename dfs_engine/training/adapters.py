"""Adapters of feature distillation: trained with a model, no part of it, kept in a file beside its weights.

RUN/model.safetensors            the weights
RUN/model-adapters.safetensors   the adapters, where there are any
"""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from dfs_engine.methods import create_method
from dfs_engine.models import MultiExitModel
from dfs_engine.models.weights import weights_path
from dfs_engine.runtime.files import read_tensors, write_tensors


def adapters_path(weights: Path | str) -> Path:
    """The file beside a weight file, or in a run folder."""
    path = weights_path(weights)
    return path.with_name(f"{path.stem}-adapters{path.suffix}")


def save_adapters(weights: Path, tensors: Mapping[str, Tensor]) -> None:
    """Writes a method's parameters beside the weight file; of a method without any, removes what lies there."""
    path = adapters_path(weights)
    if tensors:
        write_tensors(path, tensors)
    else:
        path.unlink(missing_ok=True)


def load_adapters(weights: Path | str) -> dict[str, Tensor]:
    """What `save_adapters` wrote; empty where there are none."""
    path = adapters_path(weights)
    return read_tensors(path, "adapters") if path.is_file() else {}


def fresh_adapters(model: MultiExitModel) -> dict[str, Tensor]:
    """As a training run of the model's family begins with, drawn from seed 0; torch's random state stays as it is."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return create_method("byot", model).state_dict()
