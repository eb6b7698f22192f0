"""Files of the published code into ours, and back: `dfs convert`."""

import copy
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dfs_engine.checks import check_numbers
from dfs_engine.data.normalization import published_data
from dfs_engine.methods import create_method
from dfs_engine.models import MultiExitModel, load_official_state_dict, to_official_state_dict
from dfs_engine.models.official import adapter_keys, published_beta
from dfs_engine.models.weights import WEIGHTS_FILE, is_own_file, load_model, read_description, save_model, weights_path
from dfs_engine.runtime.files import atomic_file, write_tensors
from dfs_engine.training.adapters import fresh_adapters, load_adapters, save_adapters
from dfs_engine.training.build import build_model
from dfs_engine.training.config import ModelConfig
from dfs_engine.training.published_files import SAFE, is_transformers_folder, read_published

_PICKLED = (".pth", ".pt", ".tar", ".bin")


@dataclass(frozen=True, kw_only=True)
class PublishedModelConfig(ModelConfig):
    """The model of a published checkpoint."""

    beta: float | None = None  # type: ignore[assignment]
    """The share (dns_ratio) that it was trained with. Default: a VGG's tensors tell, and a dense model has none; for
    others it has to be given."""

    def _check_beta(self) -> None:
        if self.beta is not None:
            super()._check_beta()


@dataclass(frozen=True, kw_only=True)
class ConvertConfig:
    """What to convert, and which model it is of."""

    source: Path
    """A checkpoint of the published code (a file, or a folder of transformers), or a run folder or weight file of
    dfs."""
    output: Path
    """The file or run folder to write."""
    model: PublishedModelConfig = field(default_factory=PublishedModelConfig)
    """The model of a published checkpoint; weights of dfs name their own."""
    num_classes: int | None = None
    """Classes of a published checkpoint. Default: as many as its last classifier has."""
    ema: bool = False
    """Take the averaged weights of a checkpoint that timm saved."""
    adapters: bool | None = None
    """Whether a published checkpoint gets adapters of feature distillation (VGG, ResNet), without which the published
    ResNet and, by default, VGG do not load: those of the run, or fresh ones. Default: yes, unless the weights came from
    a checkpoint without."""
    overwrite: bool = False
    """Replace an output that is there already."""

    def __post_init__(self) -> None:
        check_numbers(self, "", {">= 1": ("num_classes",)})


def run(config: ConvertConfig) -> dict[str, Any]:
    """Reads `config.source`, writes `config.output`; the source says in which direction.

    Returns:
        "source", "output", "format" ("dfs" or "official"), "model" (its config), "num_tensors", "left_out", the keys of
        the source that are no part of the model, and "notes", sentences on what was found or made up.

    Raises:
        FileNotFoundError, FileExistsError, ValueError: the source cannot be read or is of another model, or the output
            cannot be written. Nothing is written then.
    """
    source = config.source.expanduser()
    if not source.exists():
        raise FileNotFoundError(f"source: expected a file or a run folder, got {source} (nothing there).")
    weights = weights_path(source)
    convert = _to_official if weights.is_file() and is_own_file(weights) else _from_official
    return {"source": str(source), **convert(source, config)}


def _to_official(source: Path, config: ConvertConfig) -> dict[str, Any]:
    output = _free(config.output, config.overwrite)
    endings = (*_PICKLED, SAFE)
    if output.suffix not in endings:
        raise ValueError(f"output: expected a published checkpoint to end in {', '.join(endings)}, got {output}.")
    model = load_model(source)
    wanted = read_description(source).get("adapters", True) if config.adapters is None else config.adapters
    adapters, notes = _published_adapters(source, model) if wanted else ({}, [])
    tensors = to_official_state_dict(model, adapters)
    if output.suffix == SAFE:
        write_tensors(output, tensors)
    else:
        with atomic_file(output) as partial:
            torch.save(tensors, partial)
    return {
        "output": str(output),
        "format": "official",
        "model": model.get_config(),
        "num_tensors": len(tensors),
        "left_out": [],
        "notes": notes,
    }


def _published_adapters(source: Path, model: MultiExitModel) -> tuple[dict[str, Tensor], list[str]]:
    """Adapters by their published keys, and what there is to say of them."""
    keys = adapter_keys(model)
    if not keys:
        return {}, []
    ours = load_adapters(source)
    notes = [] if ours else ["its adapters of feature distillation are fresh ones: the weights were trained without"]
    ours = ours or fresh_adapters(model)
    _check_adapters(ours, model, f"beside {source}. Add --adapters false to leave them out.")
    return {keys[key]: value for key, value in ours.items()}, notes


def _from_official(source: Path, config: ConvertConfig) -> dict[str, Any]:
    output = config.output.expanduser()
    if output.suffix in _PICKLED:
        raise ValueError(
            f"output: expected a run folder, or a file that ends in {SAFE}, for weights of dfs, got {output}."
        )
    output = _free(output if output.suffix == SAFE else output / WEIGHTS_FILE, config.overwrite)
    found = read_published(source, config.ema)
    notes = ["its averaged weights are left out; --ema takes them instead"] if found.has_ema and not config.ema else []
    named = _of_folder(source, config.model) if source.is_dir() else config.model
    settings = ModelConfig(**{**vars(named), "beta": ModelConfig.beta if named.beta is None else named.beta})
    num_classes = config.num_classes or _num_classes(found.tensors, settings)
    beta = _beta(named, settings, found.tensors)
    if named.beta is None and named.variant != "dense":
        notes.append(f"beta {beta:g}, as its layers are split")
    model = build_model(replace(settings, beta=beta), num_classes)
    loaded = load_official_state_dict(model, found.tensors)
    keys = {official: ours for ours, official in adapter_keys(model).items()}
    adapters = {keys[key]: value for key, value in loaded.extras.items() if key in keys}
    if adapters:
        _check_adapters(adapters, model, f"in {source}. Give the --model flags of the checkpoint.")
    output.parent.mkdir(parents=True, exist_ok=True)
    description = {
        "data": published_data(model.input_shape),
        "epoch": found.epoch,
        "converted_from": source.name,
        "adapters": bool(adapters),
    }
    save_model(model, output, description)
    save_adapters(output, adapters)
    if adapters:
        notes.append(f"{len(adapters)} tensors of its adapters of feature distillation are kept beside the weights")
    return {
        "output": str(output),
        "format": "dfs",
        "model": model.get_config(),
        "num_tensors": len(model.state_dict()),
        "left_out": [key for key in loaded.extras if key not in keys],
        "notes": notes,
    }


def _of_folder(folder: Path, model: PublishedModelConfig) -> PublishedModelConfig:
    """The model of a transformers folder, whose sizes stand in its config."""
    if not is_transformers_folder(folder):
        raise ValueError(
            f"source: expected a run folder with {WEIGHTS_FILE} of dfs, or a transformers folder with config.json, got "
            f"{folder} with neither."
        )
    if model.name != "bert":
        raise ValueError(
            f"model.name: expected bert of a transformers folder, got {model.name} of {folder}. Add --model.name bert."
        )
    return replace(model, options={"config": str(folder), **model.options})


def _beta(model: PublishedModelConfig, settings: ModelConfig, tensors: dict[str, Tensor]) -> float:
    """As given, or as the checkpoint's layers are split."""
    if model.beta is not None:
        return model.beta
    beta = published_beta(build_model(settings, 1, device="meta"), tensors)
    if beta is None and model.variant == "dense":
        return settings.beta
    if beta is None:
        raise ValueError(
            f"model.beta: expected the dns_ratio that the checkpoint of {model.name} was trained with, which its "
            "tensors do not tell, got none. Add --model.beta (of the published ResNet18 it is always 0.5), or "
            "--model.variant dense."
        )
    return beta


def _check_adapters(adapters: dict[str, Tensor], model: MultiExitModel, where: str) -> None:
    """Raises unless they are those of the family's published form of feature distillation."""
    with torch.device("meta"):
        method = create_method("byot", copy.deepcopy(model).to("meta"))
    expected = {key: list(value.shape) for key, value in method.state_dict().items()}
    got = {key: list(value.shape) for key, value in adapters.items()}
    if got != expected:
        key = next(key for key in (*expected, *got) if got.get(key) != expected.get(key))
        raise ValueError(
            f"adapters: expected those of the published feature distillation, {key} of shape {expected.get(key)}, got "
            f"{got.get(key)} {where}"
        )


def _free(output: Path, overwrite: bool) -> Path:
    output = output.expanduser()
    if output.exists() and not overwrite:
        raise FileExistsError(
            f"output: expected a path with nothing there, got {output}. Add --overwrite to replace it."
        )
    return output


def _num_classes(tensors: dict[str, Tensor], config: ModelConfig) -> int:
    """Rows of the last classifier's weight."""
    shapes = to_official_state_dict(build_model(config, 1, device="meta"))
    last = [key for key, value in shapes.items() if key.endswith("weight") and value.dim() == 2][-1]
    if last not in tensors:
        raise ValueError(
            f"source: expected a checkpoint of {config.name}, got one without {last}. Give --model flags that fit it."
        )
    return tensors[last].size(0)
