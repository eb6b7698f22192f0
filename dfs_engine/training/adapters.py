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
from dfs_engine.training.checkpoint import atomic_file, weights_path


def adapters_path(weights: Path | str) -> Path:
    """The file beside a weight file, or in a run folder."""
    path = weights_path(weights)
    return path.with_name(f"{path.stem}-adapters{path.suffix}")


def save_adapters(weights: Path, tensors: Mapping[str, Tensor]) -> None:
    """Writes a method's tensors beside the weight file; of a method without any, removes what lies there."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    path = adapters_path(weights)
    if not tensors:
        path.unlink(missing_ok=True)
        return
    with atomic_file(path) as partial:
        try:
            save_file({key: value.detach().contiguous() for key, value in tensors.items()}, partial)
        except SafetensorError as error:
            raise OSError(str(error)) from error


def load_adapters(weights: Path | str) -> dict[str, Tensor]:
    """What `save_adapters` wrote; empty where there are none."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = adapters_path(weights)
    if not path.is_file():
        return {}
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"adapters: expected a whole safetensors file, got {path} ({error}).") from None


def fresh_adapters(model: MultiExitModel) -> dict[str, Tensor]:
    """As a training run of the model's family begins with, drawn from seed 0; torch's random state stays as it is."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return create_method("byot", model).state_dict()
