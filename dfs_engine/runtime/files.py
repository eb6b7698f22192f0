"""Files that are whole or not there: written beside their place, flushed to the disk and renamed."""

import contextlib
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from dfs_engine.checks import one_line
from dfs_engine.runtime.extras import needs


class WriteError(OSError):
    """A file could not be written; the message names it and the room that the disk has left."""


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Gives a path beside `path` to write to; on success it replaces `path`, on an exception it is removed."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        yield partial
        flush(partial)
        partial.replace(path)
        flush(path.parent)
    except OSError as error:
        raise write_error(path, error) from error
    finally:
        partial.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Replaces `path` by `text` in one move."""
    with atomic_file(path) as partial:
        partial.write_text(text)


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Replaces a safetensors file in one move."""
    with needs("hub"):
        from safetensors import SafetensorError
        from safetensors.torch import save_file

    with atomic_file(path) as partial:
        try:
            save_file(_separate(tensors), partial, metadata={"format": "pt", **(metadata or {})})
        except SafetensorError as error:
            raise OSError(str(error)) from error


def _separate(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """As safetensors wants them: contiguous (channels_last weights are not), and none in the memory of another."""
    storages: set[int] = set()
    separate = {}
    for name, tensor in tensors.items():
        values = tensor.detach().contiguous()
        address = values.untyped_storage().data_ptr()
        separate[name] = values.clone() if address in storages else values  # tied weights
        storages.add(address)
    return separate


@contextlib.contextmanager
def open_tensors(path: Path, argument: str, remedy: str = "") -> Iterator[Any]:
    """A safetensors file, for reading.

    Raises:
        ValueError: it is damaged, or another kind of file; the message names the argument that gave it.
    """
    with needs("hub"):
        from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except SafetensorError as error:
        raise ValueError(f"{argument}: expected a whole safetensors file, got {path} ({error}).{remedy}") from None


def read_tensors(path: Path, argument: str) -> dict[str, Tensor]:
    """All tensors of a safetensors file; raises as `open_tensors`."""
    with open_tensors(path, argument) as file:
        return tensors_of(file)


def tensors_of(file: Any) -> dict[str, Tensor]:
    """All tensors of what `open_tensors` opened."""
    return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)


def write_error(path: Path, error: Exception) -> WriteError:
    """torch and safetensors write files by themselves, and do not say what the system said."""
    if isinstance(error, WriteError):
        return error
    free = shutil.disk_usage(path.parent if path.parent.is_dir() else path.parent.parent).free
    return WriteError(f"expected to write {path}, got {one_line(error)}; {free / 2**20:.1f} MiB of the disk are free.")


def flush(path: Path) -> None:
    """Waits until a file, or a folder's list of names, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
