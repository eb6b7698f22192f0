"""Checkpoints that are whole or not there, and self-describing weight files.

    RUN/checkpoints/step-00000120/   everything that continues the run exactly: weights, optimizer, loss scale, random
                                     states of every process (accelerate's save_state), and manifest.json
    RUN/model.safetensors            the weights, with what rebuilds the model in the file's own metadata

Both are written beside their place, flushed to the disk and renamed, so that a crash leaves the previous one.
"""

import contextlib
import json
import os
import shutil
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dfs_engine.models import MultiExitModel, create_model

if TYPE_CHECKING:
    from accelerate import Accelerator

WEIGHTS_FILE = "model.safetensors"
_MANIFEST = "manifest.json"
_METADATA_KEY = "dfs_engine"
# What configs did not say while it was the only way.
_ONCE_IMPLIED = {"vgg7_64": {"init": "torch"}, "vgg16_64": {"init": "torch"}}
_REMEDY = "Train anew in another --run_dir, or restore the file from a copy."


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Gives a path beside `path` to write to; on success it replaces `path`, on an exception it is removed."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        yield partial
        _flush(partial)
        partial.replace(path)
        _flush(path.parent)
    finally:
        partial.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Replaces `path` by `text` in one move."""
    with atomic_file(path) as partial:
        partial.write_text(text)


def save(accelerator: "Accelerator", run_dir: Path, *, step: int, description: dict[str, Any]) -> Path:
    """Saves the run's state, then removes the checkpoint before it; returns the new folder. Every process calls it.

    Args:
        description: JSON-able; `latest` returns it. Under "model" it holds the model's config.
    """
    folder = run_dir / "checkpoints"
    final = folder / f"step-{step:08d}"
    partial = folder / f".{final.name}.partial"
    if accelerator.is_main_process:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    accelerator.wait_for_everyone()
    accelerator.save_state(str(partial))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        files = {path.name: _size_and_crc(path) for path in sorted(partial.iterdir())}
        for name in files:
            _flush(partial / name)
        write_text(partial / _MANIFEST, json.dumps({**description, "files": files}, indent=1))
        shutil.rmtree(final, ignore_errors=True)
        partial.replace(final)
        _flush(folder)
        for old in _complete(run_dir):
            if old != final:
                shutil.rmtree(old)
    accelerator.wait_for_everyone()
    return final


def latest(run_dir: Path, model_config: dict[str, Any]) -> tuple[Path, dict[str, Any]]:
    """Finds and checks the last checkpoint, and changes nothing.

    Returns:
        Its folder and the description it was saved with.

    Raises:
        FileNotFoundError: there is none. ValueError: it is damaged, or of another model than `model_config` describes.
    """
    complete = _complete(run_dir)
    if not complete:
        raise FileNotFoundError(
            f"run_dir: expected a checkpoint to resume from, got none in {run_dir / 'checkpoints'}. "
            "Start the run without --resume true, in an empty --run_dir."
        )
    folder = complete[-1]
    try:
        manifest = json.loads((folder / _MANIFEST).read_text())
        files = manifest.pop("files")
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"checkpoint: expected a readable {folder / _MANIFEST}, got {error!r}. {_REMEDY}") from None
    for name, expected in files.items():
        path = folder / name
        found = _size_and_crc(path) if path.is_file() else "no such file"
        if found != expected:
            raise ValueError(
                f"checkpoint: expected {path} with [size, crc] {expected}, got {found}: truncated or damaged. {_REMEDY}"
            )
    manifest["model"] = _completed(manifest["model"])
    check_same_model(manifest["model"], model_config, str(folder))
    return folder, manifest


def check_same_model(saved: dict[str, Any], wanted: dict[str, Any], where: str) -> None:
    """Raises ValueError, naming every difference, if `saved` describes another model than `wanted`."""
    # The backend computes the same function with other kernels.
    names = (saved.keys() | wanted.keys()) - {"backend"}
    differences = [f"{name}={saved.get(name)!r}" for name in sorted(names) if saved.get(name) != wanted.get(name)]
    if differences:
        asked = ", ".join(f"{item.split('=')[0]}={wanted.get(item.split('=')[0])!r}" for item in differences)
        raise ValueError(
            f"checkpoint: expected a model with {asked}, got {where} of a model with {', '.join(differences)}. "
            "Give the same --model flags as the run that wrote it, or start in another --run_dir."
        )


def save_weights(path: Path, model: MultiExitModel, description: dict[str, Any]) -> None:
    """Writes weights that `load_model` can read alone.

    Args:
        description: JSON-able extras (data, epoch) that `load_model` returns.
    """
    from safetensors.torch import save_file

    # Contiguous, because safetensors stores no strides (channels_last weights have others).
    weights = {name: tensor.detach().contiguous() for name, tensor in model.state_dict().items()}
    header = json.dumps({**description, "model": model.get_config()})
    with atomic_file(path) as partial:
        save_file(weights, partial, metadata={"format": "pt", _METADATA_KEY: header})


def read_description(path: Path | str) -> dict[str, Any]:
    """What a weight file says about itself, without reading the weights.

    Args:
        path: a weight file, or a run folder with one.
    """
    with _open_weights(path) as file:
        return _header(path, file)


def load_model(path: Path | str) -> tuple[MultiExitModel, dict[str, Any]]:
    """Rebuilds the model of a run folder or of a weight file.

    Returns:
        The model on the CPU, and the file's description.

    Raises:
        FileNotFoundError: no such file. ValueError: truncated, or not written by dfs_engine.
    """
    with _open_weights(path) as file:
        description = _header(path, file)
        weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    model = create_model(**description["model"])
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"path: expected {path} to fit the model that it describes, got {reason}") from None
    return model, description


def is_own_file(path: Path) -> bool:
    """Whether a file is one that `save_weights` wrote, by its header."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            return _METADATA_KEY in (file.metadata() or {})
    except SafetensorError:
        return False


def weights_path(path: Path | str) -> Path:
    """The weight file that a run folder or a file's own path means."""
    path = Path(path).expanduser()
    return path / WEIGHTS_FILE if path.is_dir() else path


@contextlib.contextmanager
def _open_weights(path: Path | str) -> Iterator[Any]:
    from safetensors import SafetensorError, safe_open

    file_path = weights_path(path)
    if not file_path.is_file():
        raise FileNotFoundError(
            f"path: expected a run folder with {WEIGHTS_FILE}, or such a file, got {path} (nothing there). "
            "`dfs train` writes one after every epoch."
        )
    try:
        with safe_open(file_path, framework="pt") as file:
            yield file
    except SafetensorError as error:
        raise ValueError(f"path: expected a whole safetensors file, got {file_path} ({error}). {_REMEDY}") from None


def _header(path: Path | str, file: Any) -> dict[str, Any]:
    text = (file.metadata() or {}).get(_METADATA_KEY)
    if text is None:
        raise ValueError(
            f"path: expected weights written by dfs_engine, got {weights_path(path)} that does not describe its model."
        )
    header = json.loads(text)
    header["model"] = _completed(header["model"])
    return header


def _completed(model_config: dict[str, Any]) -> dict[str, Any]:
    """A saved config, with what it says by being old."""
    return {**_ONCE_IMPLIED.get(model_config["name"], {}), **model_config}


def _complete(run_dir: Path) -> list[Path]:
    return sorted((run_dir / "checkpoints").glob("step-*"))


def _size_and_crc(path: Path) -> list[int]:
    crc = 0
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            crc = zlib.crc32(chunk, crc)
    return [path.stat().st_size, crc]


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
