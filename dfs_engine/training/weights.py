"""Weight files, which say themselves what rebuilds the model: RUN/model.safetensors."""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dfs_engine.checks import one_line
from dfs_engine.models import MultiExitModel, check_model, create_model
from dfs_engine.training.files import open_tensors, tensors_of, write_tensors

WEIGHTS_FILE = "model.safetensors"
REMEDY = "Train anew in another --run_dir, or restore the file from a copy."
"""What helps where a run's file is damaged."""
_METADATA_KEY = "dfs_engine"
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


def save_weights(path: Path, model: MultiExitModel, description: dict[str, Any]) -> None:
    """Writes weights that `load_model` can read alone.

    Args:
        description: JSON-able extras (data, epoch) that `load_model` returns.
    """
    header = json.dumps({**description, "model": model.get_config()})
    write_tensors(path, model.state_dict(), {_METADATA_KEY: header})


def read_description(path: Path | str) -> dict[str, Any]:
    """What a weight file says about itself, without reading the weights.

    Args:
        path: a weight file, or a run folder with one.
    """
    with _open_weights(path) as file:
        return _header(path, file)


def load_model(path: Path | str, model: MultiExitModel | None = None) -> tuple[MultiExitModel, dict[str, Any]]:
    """Rebuilds the model of a run folder or of a weight file.

    Args:
        model: gets the weights. Needed where `create_model` cannot build it: with exits attached to a backbone, or of
            a class of one's own.

    Returns:
        The model, on the CPU if it was built here, and the file's description.

    Raises:
        FileNotFoundError: no such file. ValueError: truncated, not written by dfs_engine, or of another model.
    """
    with _open_weights(path) as file:
        description = _header(path, file)
        weights = tensors_of(file)
    if model is None:
        model = _build(path, description["model"])
    else:
        check_same_model(description["model"], model.get_config(), str(path))
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        reason = one_line(error, 300)
        raise ValueError(f"path: expected {path} to fit the model that it describes, got {reason}") from None
    return model, description


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
    """Whether a file is one that `save_weights` wrote, by its header."""
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
            "`dfs train` writes one after every epoch."
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
