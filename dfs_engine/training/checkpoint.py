"""Checkpoints: RUN/checkpoints/step-00000120/ continues the run exactly.

It holds weights, optimizer, loss scale and the random states of every process (accelerate's save_state), and
manifest.json. It is whole or not there: a crash leaves the one before it.
"""

import contextlib
import json
import logging
import shutil
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dfs_engine.checks import one_line
from dfs_engine.models.weights import REMEDY, check_same_model, completed
from dfs_engine.runtime.files import WriteError, flush, write_error, write_text

if TYPE_CHECKING:
    from accelerate import Accelerator

logger = logging.getLogger(__name__)

_MANIFEST = "manifest.json"
_PREVIOUS = "-previous"
_MANIFEST_KEYS = ("files", "model", "config", "progress")


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
    reasons = gather_object([None if error is None else str(write_error(path, error))])
    for reason in reasons:
        if reason is not None:
            raise WriteError(reason) from error


def _complete(partial: Path, description: dict[str, Any]) -> None:
    """Adds the manifest, which says that the files are all there and what is in them."""
    files = {path.name: _size_and_crc(path) for path in sorted(partial.iterdir())}
    for name in files:
        flush(partial / name)
    write_text(partial / _MANIFEST, json.dumps({**description, "files": files}, indent=1))


def _publish(partial: Path, final: Path) -> None:
    """Gives the checkpoint its name, and removes the others; at any moment one of them is there."""
    if final.exists():  # of the same step, before its evaluation
        final.replace(final.with_name(f"{final.name}{_PREVIOUS}"))
    partial.replace(final)
    flush(final.parent)
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
            f"{REMEDY}"
        )
    for name, expected in manifest["files"].items():
        path = folder / name
        found = _size_and_crc(path) if path.is_file() else "no such file"
        if found != expected:
            raise ValueError(
                f"checkpoint: expected {path} with [size, crc] {expected}, got {found}: truncated or damaged. {REMEDY}"
            )
    manifest["model"] = completed(manifest["model"])
    check_same_model(manifest["model"], model_config, str(folder))
    return folder, manifest


def last(run_dir: Path) -> Path | None:
    """Folder of the last checkpoint; None where there is none."""
    # Of one step, the one without "-previous": a process that was killed may have removed half of the other.
    named = _named(run_dir / "checkpoints")
    names = {path.name.removesuffix(_PREVIOUS): path for path in sorted(named, reverse=True)}
    return names[max(names)] if names else None


def _read_manifest(path: Path) -> dict[str, Any]:
    try:
        manifest = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"checkpoint: expected a readable {path}, got {error!r}. {REMEDY}") from None
    found = manifest if isinstance(manifest, dict) else {}
    missing = [name for name in _MANIFEST_KEYS if not isinstance(found.get(name), dict)]
    if missing:
        raise ValueError(f"checkpoint: expected {path} with {', '.join(_MANIFEST_KEYS)}, got no {missing[0]}. {REMEDY}")
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
        raise ValueError(
            f"checkpoint: expected {folder} to hold this run's state as tensors and plain values, got "
            f"{one_line(error, 300)}. No code in a file is run. Give the flags of the run that wrote it, or train anew "
            "in another --run_dir."
        ) from error


def _check_random_states(path: Path) -> None:
    """Raises for a file that accelerate would quietly go on without."""
    from accelerate.utils import load

    states = load(path)
    for name in ("random_state", "numpy_random_seed", "torch_manual_seed"):
        if name not in states:
            raise ValueError(f"{path.name} without {name}")


def _named(folder: Path) -> list[Path]:
    return list(folder.glob("step-*"))


def _size_and_crc(path: Path) -> list[int]:
    crc = 0
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            crc = zlib.crc32(chunk, crc)
    return [path.stat().st_size, crc]
