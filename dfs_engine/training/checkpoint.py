"""Checkpoints that are whole or not there, and self-describing weight files.

    RUN/checkpoints/step-00000120/   everything that continues the run exactly: weights, optimizer, loss scale, random
                                     states of every process (accelerate's save_state), and manifest.json
    RUN/model.safetensors            the weights, with what rebuilds the model in the file's own metadata

Both are written beside their place, flushed to the disk and renamed, so that a crash leaves the previous one.
"""

import contextlib
import json
import logging
import os
import shutil
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from dfs_engine.models import MultiExitModel, check_model, create_model

if TYPE_CHECKING:
    from accelerate import Accelerator

logger = logging.getLogger(__name__)

WEIGHTS_FILE = "model.safetensors"
_MANIFEST = "manifest.json"
_MANIFEST_KEYS = ("files", "model", "config", "progress")
_METADATA_KEY = "dfs_engine"
# What configs did not say while it was the only way.
_ONCE_IMPLIED = {"vgg7_64": {"init": "torch"}, "vgg16_64": {"init": "torch"}}
_REMEDY = "Train anew in another --run_dir, or restore the file from a copy."


class WriteError(OSError):
    """A file could not be written; the message names it and the room that the disk has left."""


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Gives a path beside `path` to write to; on success it replaces `path`, on an exception it is removed."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        yield partial
        _flush(partial)
        partial.replace(path)
        _flush(path.parent)
    except OSError as error:
        raise _write_error(path, error) from error
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
    try:
        with together(accelerator, partial):
            if accelerator.is_main_process:
                for left in folder.glob(".*.partial"):  # by a process that was killed
                    shutil.rmtree(left)
                partial.mkdir(parents=True)
        with together(accelerator, partial):
            accelerator.save_state(str(partial))
        with together(accelerator, partial):
            if accelerator.is_main_process:
                _complete(partial, description)
                _publish(partial, final)
    except BaseException:
        if accelerator.is_main_process:
            shutil.rmtree(partial, ignore_errors=True)
        raise
    return final


@contextlib.contextmanager
def together(accelerator: "Accelerator", path: Path) -> Iterator[None]:
    """Raises WriteError in every process where the block failed to write in one, so that none waits for it in vain."""
    from accelerate.utils import gather_object
    from safetensors import SafetensorError

    error: Exception | None = None
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as caught:  # RuntimeError: torch.save
        error = caught
    reasons = gather_object([None if error is None else str(_write_error(path, error))])
    for reason in reasons:
        if reason is not None:
            raise WriteError(reason) from error


def _write_error(path: Path, error: Exception) -> WriteError:
    """torch and safetensors write files by themselves, and do not say what the system said."""
    if isinstance(error, WriteError):
        return error
    free = shutil.disk_usage(path.parent if path.parent.is_dir() else path.parent.parent).free
    reason = " ".join(str(error).split())[:200]
    return WriteError(f"expected to write {path}, got {reason}; {free / 2**20:.1f} MiB of the disk are free.")


def _complete(partial: Path, description: dict[str, Any]) -> None:
    """Adds the manifest, which says that the files are all there and what is in them."""
    files = {path.name: _size_and_crc(path) for path in sorted(partial.iterdir())}
    for name in files:
        _flush(partial / name)
    write_text(partial / _MANIFEST, json.dumps({**description, "files": files}, indent=1))


def _publish(partial: Path, final: Path) -> None:
    """Gives the checkpoint its name, and removes the others; at any moment one of them is there."""
    if final.exists():  # of the same step, before its evaluation
        final.replace(final.with_name(f"{final.name}-previous"))
    partial.replace(final)
    _flush(final.parent)
    for old in _named(final.parent):
        if old != final:
            shutil.rmtree(old)


def latest(run_dir: Path, model_config: dict[str, Any]) -> tuple[Path, dict[str, Any]]:
    """Finds and checks the last checkpoint, and changes nothing.

    Returns:
        Its folder and the description it was saved with.

    Raises:
        FileNotFoundError: there is none. ValueError: it is damaged, or of another model than `model_config` describes.
    """
    folder = last(run_dir)
    if folder is None:
        raise FileNotFoundError(
            f"run_dir: expected a checkpoint to resume from, got none in {run_dir / 'checkpoints'}. "
            "Start the run without --resume true, in an empty --run_dir."
        )
    manifest = _read_manifest(folder / _MANIFEST)
    unknown = {path.name for path in folder.iterdir()} - {_MANIFEST, *manifest["files"]}
    if unknown:
        raise ValueError(
            f"checkpoint: expected the files that {folder / _MANIFEST} lists, got {', '.join(sorted(unknown))} too. "
            f"{_REMEDY}"
        )
    for name, expected in manifest["files"].items():
        path = folder / name
        found = _size_and_crc(path) if path.is_file() else "no such file"
        if found != expected:
            raise ValueError(
                f"checkpoint: expected {path} with [size, crc] {expected}, got {found}: truncated or damaged. {_REMEDY}"
            )
    manifest["model"] = _completed(manifest["model"])
    check_same_model(manifest["model"], model_config, str(folder))
    return folder, manifest


def last(run_dir: Path) -> Path | None:
    """Folder of the last checkpoint; None where there is none."""
    return max(_named(run_dir / "checkpoints"), default=None)


def _read_manifest(path: Path) -> dict[str, Any]:
    try:
        manifest = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"checkpoint: expected a readable {path}, got {error!r}. {_REMEDY}") from None
    found = manifest if isinstance(manifest, dict) else {}
    missing = [name for name in _MANIFEST_KEYS if not isinstance(found.get(name), dict)]
    if missing:
        raise ValueError(
            f"checkpoint: expected {path} with {', '.join(_MANIFEST_KEYS)}, got no {missing[0]}. {_REMEDY}"
        )
    return found


def restore(accelerator: "Accelerator", folder: Path) -> None:
    """Brings the prepared model, optimizer, loss scale and random states to what `folder` holds.

    Files are read as tensors and plain values alone: accelerate unpickles with `weights_only`, which runs no code.

    Raises:
        ValueError: a file holds something else, or does not fit the model or the optimizer.
    """
    states = sorted(folder.glob("random_states_*.pkl"))
    if len(states) != accelerator.num_processes:
        logger.warning(
            "resume: %d processes go on with the run of %d: other random draws (dropout)",
            accelerator.num_processes,
            len(states),
        )
    try:
        if len(states) > accelerator.process_index:
            _check_random_states(folder / f"random_states_{accelerator.process_index}.pkl")
        accelerator.load_state(str(folder))
    except Exception as error:  # what somebody forged may fail in any way
        reason = " ".join(str(error).split())[:300]
        raise ValueError(
            f"checkpoint: expected {folder} to hold this run's state as tensors and plain values, got {reason}. "
            "No code in a file is run. Give the flags of the run that wrote it, or train anew in another --run_dir."
        ) from error


def _check_random_states(path: Path) -> None:
    """Raises for a file that accelerate would quietly go on without."""
    from accelerate.utils import load

    states = load(path)
    for name in ("random_state", "numpy_random_seed", "torch_manual_seed"):
        if name not in states:
            raise ValueError(f"{path.name} without {name}")


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
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    header = json.dumps({**description, "model": model.get_config()})
    with atomic_file(path) as partial:
        try:
            save_file(_separate(model.state_dict()), partial, metadata={"format": "pt", _METADATA_KEY: header})
        except SafetensorError as error:
            raise OSError(str(error)) from error


def _separate(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """As safetensors wants them: contiguous (channels_last weights are not), and none in the memory of another."""
    storages: set[int] = set()
    separate = {}
    for name, tensor in tensors.items():
        values = tensor.detach().contiguous()
        address = values.untyped_storage().data_ptr()
        separate[name] = values.clone() if address in storages else values  # tied weights
        storages.add(address)
    return separate


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
        weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    if model is None:
        model = _build(path, description["model"])
    else:
        check_same_model(description["model"], model.get_config(), str(path))
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:300]
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
    try:
        description = json.loads(text)
    except ValueError:
        description = None
    if not isinstance(description, dict) or not isinstance(description.get("model"), dict):
        raise ValueError(
            f"path: expected a description of the model in the file's metadata, got {weights_path(path)} with "
            f"{text[:80]!r}. {_REMEDY}"
        )
    return {"data": {}, "epoch": None, **description, "model": _completed(description["model"])}


def _completed(model_config: dict[str, Any]) -> dict[str, Any]:
    """A saved config, with what it says by being old."""
    return {**_ONCE_IMPLIED.get(model_config.get("name", ""), {}), **model_config}


def _named(folder: Path) -> list[Path]:
    return list(folder.glob("step-*"))


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
