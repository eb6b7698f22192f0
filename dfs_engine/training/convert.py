"""Files of the published code into ours, and back: `dfs convert`."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dfs_engine.data.normalization import published_data
from dfs_engine.models import load_official_state_dict, to_official_state_dict
from dfs_engine.training.build import build_model
from dfs_engine.training.checkpoint import (
    WEIGHTS_FILE,
    atomic_file,
    is_own_file,
    load_model,
    save_weights,
)
from dfs_engine.training.config import ModelConfig

_PICKLED = (".pth", ".pt", ".tar", ".bin")
_SAFE = ".safetensors"


@dataclass(frozen=True, kw_only=True)
class ConvertConfig:
    """What to convert, and which model it is of."""

    source: Path
    """A checkpoint of the published code, or a run folder or weight file of dfs."""
    output: Path
    """The file or run folder to write."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """The model of a published checkpoint; weights of dfs name their own."""
    num_classes: int | None = None
    """Classes of a published checkpoint. Default: as many as its last classifier has."""
    overwrite: bool = False
    """Replace an output that is there already."""

    def __post_init__(self) -> None:
        if self.num_classes is not None and self.num_classes < 1:
            raise ValueError(f"num_classes: expected an integer >= 1, got {self.num_classes}.")


def run(config: ConvertConfig) -> dict[str, Any]:
    """Reads `config.source`, writes `config.output`; the source says in which direction.

    Returns:
        "source", "output", "format" ("dfs" or "official"), "model" (its config), "num_tensors" and "left_out", the keys
        of the source that are no part of the model.

    Raises:
        FileNotFoundError, FileExistsError, ValueError: the source cannot be read or is of another model, or the output
            cannot be written. Nothing is written then.
    """
    source = config.source.expanduser()
    if not source.exists():
        raise FileNotFoundError(f"source: expected a file or a run folder, got {source} (nothing there).")
    convert = _to_official if source.is_dir() or is_own_file(source) else _from_official
    return {"source": str(source), **convert(source, config)}


def _to_official(source: Path, config: ConvertConfig) -> dict[str, Any]:
    output = _free(config.output, config.overwrite)
    endings = (*_PICKLED, _SAFE)
    if output.suffix not in endings:
        raise ValueError(f"output: expected a published checkpoint to end in {', '.join(endings)}, got {output}.")
    model, _ = load_model(source)
    tensors = to_official_state_dict(model)
    with atomic_file(output) as partial:
        if output.suffix == _SAFE:
            from safetensors.torch import save_file

            save_file(tensors, partial, metadata={"format": "pt"})
        else:
            torch.save(tensors, partial)
    return {
        "output": str(output),
        "format": "official",
        "model": model.get_config(),
        "num_tensors": len(tensors),
        "left_out": [],
    }


def _from_official(source: Path, config: ConvertConfig) -> dict[str, Any]:
    output = config.output.expanduser()
    if output.suffix in _PICKLED:
        raise ValueError(
            f"output: expected a run folder, or a file that ends in {_SAFE}, for weights of dfs, got {output}."
        )
    output = _free(output if output.suffix == _SAFE else output / WEIGHTS_FILE, config.overwrite)
    tensors, epoch = _read(source)
    model = build_model(config.model, config.num_classes or _num_classes(tensors, config.model))
    loaded = load_official_state_dict(model, tensors)
    output.parent.mkdir(parents=True, exist_ok=True)
    save_weights(
        output, model, {"data": published_data(model.input_shape), "epoch": epoch, "converted_from": source.name}
    )
    return {
        "output": str(output),
        "format": "dfs",
        "model": model.get_config(),
        "num_tensors": len(model.state_dict()),
        "left_out": list(loaded.extras),
    }


def _free(output: Path, overwrite: bool) -> Path:
    output = output.expanduser()
    if output.exists() and not overwrite:
        raise FileExistsError(
            f"output: expected a path with nothing there, got {output}. Add --overwrite to replace it."
        )
    return output


def _read(path: Path) -> tuple[dict[str, Tensor], int | None]:
    """(published key -> tensor, epochs trained if the file says so) of a state_dict or of a training checkpoint."""
    if path.suffix == _SAFE:
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return load_file(path), None
        except SafetensorError as error:
            raise ValueError(f"source: expected a whole safetensors file, got {path} ({error}).") from None
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # the pickle of a stranger may fail in any way
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"source: expected a file of tensors alone, by torch.save or safetensors, got {path} ({reason}). "
            "Nothing else is unpickled, because that may run code."
        ) from None
    if not isinstance(content, dict):
        raise ValueError(f"source: expected a state_dict in {path}, got a {type(content).__name__}.")
    if "state_dict" in content:  # as the published training script saves while it runs
        epoch = content.get("epoch")
        return content["state_dict"], epoch + 1 if isinstance(epoch, int) else None
    return content, None


def _num_classes(tensors: dict[str, Tensor], config: ModelConfig) -> int:
    """Rows of the last classifier's weight."""
    shapes = to_official_state_dict(build_model(config, 1, device="meta"))
    last = [key for key, value in shapes.items() if key.endswith("weight") and value.dim() == 2][-1]
    if last not in tensors:
        raise ValueError(
            f"source: expected a checkpoint of {config.name}, got one without {last}. Give --model flags that fit it."
        )
    return tensors[last].size(0)
