"""Weights in safetensors files that say themselves what rebuilds the model; a run writes one, and so does anybody."""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from dfs_engine.models.multi_exit import MultiExitModel
from dfs_engine.models.registry import check_model, create_model
from dfs_engine.runtime.files import open_tensors, tensors_of, write_tensors

WEIGHTS_FILE = "model.safetensors"
REMEDY = "Train anew in another --run_dir, or restore the file from a copy."
"""What helps where a run's file is damaged."""
_METADATA_KEY = "dfs_engine"
_OTHER_FORMATS = (".pth", ".pt", ".bin", ".ckpt")
_MAX_LISTED = 5
# What configs did not say while it was the only way.
_ONCE_IMPLIED = {"vgg7_64": {"init": "torch"}, "vgg16_64": {"init": "torch"}}


def describe_model(config: dict[str, Any]) -> str:
    """The model that a config means, in words."""
    name = config.get("name") or "a class without a name"
    at = config.get("at")
    return f"{name} with exits attached at {at}" if at else str(name)


def check_same_model(saved: dict[str, Any], wanted: dict[str, Any], where: str) -> None:
    """Raises ValueError, naming every difference, if `saved` describes another model than `wanted`."""
    # The backend computes the same function with other kernels.
    names = (saved.keys() | wanted.keys()) - {"backend"}
    differences = [f"{name}={saved.get(name)!r}" for name in sorted(names) if saved.get(name) != wanted.get(name)]
    if differences:
        remedy = "Give the same --model flags as the run that wrote it, or start in another --run_dir."
        if saved.get("name") != wanted.get("name") and not _is_buildable(saved):
            remedy = "It was made in Python: make it there again, and give it as model=... (Trainer, load_model)."
        asked = ", ".join(f"{item.split('=')[0]}={wanted.get(item.split('=')[0])!r}" for item in differences)
        raise ValueError(
            f"checkpoint: expected a model with {asked}, got {where} of a model with {', '.join(differences)}. {remedy}"
        )


def save_model(model: MultiExitModel, path: Path | str, description: dict[str, Any] | None = None) -> Path:
    """Writes weights, and what they are of, for `load_model`. The file is replaced in one move, or left as it was.

    Args:
        model: of `create_model`, of `attach_exits` or of a class of one's own; not what wraps one (DDP, torch.compile).
        path: a file that ends in .safetensors, or a folder that gets a model.safetensors; it is made where it is not.
        description: JSON-able words of one's own about them, which `read_description` returns.

    Returns:
        The file.
    """
    if not isinstance(model, MultiExitModel):
        raise TypeError(
            f"model: expected a MultiExitModel, got a {type(model).__name__}. Of a wrapped model give what it wraps: "
            "model.module of DistributedDataParallel, model._orig_mod of torch.compile."
        )
    path = Path(path).expanduser()
    if path.suffix in _OTHER_FORMATS and not path.is_dir():
        raise ValueError(f"path: expected a folder, or a file that ends in .safetensors, got {path}.")
    file = path if path.suffix == ".safetensors" and not path.is_dir() else path / WEIGHTS_FILE
    header = json.dumps({**(description or {}), "model": model.get_config()})
    file.parent.mkdir(parents=True, exist_ok=True)
    write_tensors(file, model.state_dict(), {_METADATA_KEY: header})
    return file


def read_description(path: Path | str) -> dict[str, Any]:
    """What a weight file says about itself, without reading the weights: "model", the arguments of `create_model`, and
    what `save_model` was told; of a run "data", "epoch" and more.

    Args:
        path: a weight file, or a folder with one.

    Raises:
        FileNotFoundError: no such file. ValueError: it is damaged, or dfs_engine did not write it.
    """
    with _open_weights(path) as file:
        return _header(path, file)


def load_model(path: Path | str, model: MultiExitModel | None = None) -> MultiExitModel:
    """The model of a weight file, with its weights; `read_description` tells what else is known of them.

    Args:
        path: what `save_model` wrote, or a run folder.
        model: gets the weights, once all of them are known to fit. Needed where `create_model` cannot build it: with
            exits attached to a backbone, or of a class of one's own.

    Returns:
        `model`, or a new one, on the CPU and in training mode, as any that is built.

    Raises:
        FileNotFoundError: no such file. ValueError: it is damaged, dfs_engine did not write it, or it is of another
            model; every difference is named.
    """
    with _open_weights(path) as file:
        description = _header(path, file)
        weights = tensors_of(file)
    if model is None:
        model = _build(path, description["model"])
    else:
        check_same_model(description["model"], model.get_config(), str(path))
    _check_fits(path, weights, model)
    model.load_state_dict(weights)
    return model


def _check_fits(path: Path | str, weights: dict[str, Tensor], model: MultiExitModel) -> None:
    expected = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    found = {name: tuple(value.shape) for name, value in weights.items()}
    misfits = [f"no {name}" for name in expected if name not in found]
    misfits += [f"{name}, which the model does not have" for name in found if name not in expected]
    misfits += [
        f"{name} of shape {found[name]} where the model has {shape}"
        for name, shape in expected.items()
        if found.get(name, shape) != shape
    ]
    if misfits:
        more = f", and {len(misfits) - _MAX_LISTED} more" if len(misfits) > _MAX_LISTED else ""
        raise ValueError(
            f"path: expected {path} to fit the model that it describes, got {', '.join(misfits[:_MAX_LISTED])}{more}."
        )


def _build(path: Path | str, config: dict[str, Any]) -> MultiExitModel:
    if not _is_buildable(config):
        raise ValueError(
            f"path: expected weights of a model that create_model builds, got {path} of {describe_model(config)}. "
            "Make that model in Python and give it: load_model(path, model=...)."
        )
    return create_model(**config)


def _is_buildable(config: dict[str, Any]) -> bool:
    try:
        check_model(config.get("name", ""))
    except ValueError:
        return False
    return "at" not in config


def is_own_file(path: Path) -> bool:
    """Whether a file is one that `save_model` wrote, by its header."""
    try:
        with open_tensors(path, "path") as file:
            return _METADATA_KEY in (file.metadata() or {})
    except ValueError:
        return False


def weights_path(path: Path | str) -> Path:
    """The weight file that a run folder or a file's own path means."""
    path = Path(path).expanduser()
    return path / WEIGHTS_FILE if path.is_dir() else path


@contextlib.contextmanager
def _open_weights(path: Path | str) -> Iterator[Any]:
    file_path = weights_path(path)
    if not file_path.is_file():
        raise FileNotFoundError(
            f"path: expected a run folder with {WEIGHTS_FILE}, or such a file, got {path} (nothing there). "
            "`dfs train` writes one after every epoch, save_model(model, path) whenever it is called."
        )
    with open_tensors(file_path, "path", f" {REMEDY}") as file:
        yield file


def _header(path: Path | str, file: Any) -> dict[str, Any]:
    text = (file.metadata() or {}).get(_METADATA_KEY)
    if text is None:
        raise ValueError(
            f"path: expected weights written by dfs_engine, got {weights_path(path)} that does not describe its model."
        )
    try:
        description = json.loads(text)
    except ValueError:
        description = None
    if not isinstance(description, dict) or not isinstance(description.get("model"), dict):
        raise ValueError(
            f"path: expected a description of the model in the file's metadata, got {weights_path(path)} with "
            f"{text[:80]!r}. {REMEDY}"
        )
    return {"data": {}, "epoch": None, **description, "model": completed(description["model"])}


def completed(model_config: dict[str, Any]) -> dict[str, Any]:
    """A saved config, with what it says by being old."""
    return {**_ONCE_IMPLIED.get(model_config.get("name", ""), {}), **model_config}
