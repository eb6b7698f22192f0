"""The folder of one run: its name, whether it can be written, and that one run at a time writes to it."""

import contextlib
import os
import shlex
import socket
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from dfs_engine.models.weights import WEIGHTS_FILE
from dfs_engine.training import elastic

if TYPE_CHECKING:
    from accelerate import Accelerator

ENVIRONMENT_FILE = "environment.yaml"
_LOCK_FILE = ".lock"
_RESTART_PATIENCE = 60.0  # seconds; the data loader's workers look every 5 whether their process still lives


def default_path(data_name: str, model_config: dict[str, Any]) -> Path:
    """A new folder for a run that was given none; the same in every process."""
    from accelerate.utils import broadcast_object_list

    stamp = datetime.now().strftime("%Y%m%d-%H%M%S-%f")[:-3]
    names = [f"runs/{stamp}-{data_name}-{model_config['name']}-{model_config['variant']}"]
    return Path(broadcast_object_list(names)[0])


def check_usable(run_dir: Path, *, resume: bool) -> None:
    """Raises OSError, saying what to do, unless a run can begin in `run_dir`, or go on there. Makes no folder."""
    _check_writable(run_dir)
    # One of several processes tries the lock, or they would find each other's.
    if int(os.environ.get("RANK", 0)) == 0 and (run_dir / _LOCK_FILE).exists():
        with _lock(run_dir):  # BlockingIOError: a run is writing to it
            pass
    if not resume and not elastic.has_begun(run_dir):
        _check_free(run_dir)


def _check_writable(run_dir: Path) -> None:
    existing = run_dir
    while not existing.exists() and existing != existing.parent:
        existing = existing.parent
    if not existing.is_dir():
        raise NotADirectoryError(
            f"run_dir: expected a folder, got {run_dir}, where {existing} is a file. Give another --run_dir."
        )
    if not os.access(existing, os.W_OK | os.X_OK):
        raise PermissionError(
            f"run_dir: expected a folder that can be written, got {run_dir}, where {existing} cannot. "
            "Give another --run_dir."
        )


def _check_free(run_dir: Path) -> None:
    for name in ("checkpoints", "metrics.csv", WEIGHTS_FILE):
        if (run_dir / name).exists():
            raise FileExistsError(
                f"run_dir: expected a folder without a run, got {run_dir} with {name}. "
                "Add --resume true to go on with that run, or give another --run_dir."
            )


@contextlib.contextmanager
def locked(run_dir: Path, accelerator: "Accelerator") -> Iterator[None]:
    """Makes `run_dir` and keeps other runs out of it; the processes of one run hold one lock together.

    The system ends the lock with the process, however that dies.

    Raises:
        BlockingIOError: another run is writing to it. OSError: it cannot be made or written.
    """
    from accelerate.utils import broadcast_object_list

    with contextlib.ExitStack() as stack:
        refusals: list[OSError | None] = [None]
        if accelerator.is_main_process:
            try:
                run_dir.mkdir(parents=True, exist_ok=True)
                stack.enter_context(_lock(run_dir))
            except OSError as error:
                refusals = [error]
        (refusal,) = broadcast_object_list(refusals)
        if isinstance(refusal, BlockingIOError):
            raise refusal
        if refusal is not None:
            raise OSError(f"run_dir: expected a folder that can be written, got {run_dir} ({refusal}).") from refusal
        yield


@contextlib.contextmanager
def _lock(run_dir: Path) -> Iterator[None]:
    from filelock import FileLock, Timeout

    # Workers that a killed process left behind hold its lock until they notice.
    patience = _RESTART_PATIENCE if elastic.has_begun(run_dir) else 0
    try:
        lock = FileLock(run_dir / _LOCK_FILE).acquire(timeout=patience)
    except Timeout:
        raise BlockingIOError(
            f"run_dir: expected a folder that no run is writing to, got {run_dir}, which {_holder(run_dir)} writes to. "
            "Wait for it, stop it, or give another --run_dir."
        ) from None
    with lock:
        yield


def this_process() -> dict[str, Any]:
    """What `environment.yaml` keeps of the process that writes the folder."""
    return {"host": socket.gethostname(), "pid": os.getpid()}


def _holder(run_dir: Path) -> str:
    try:
        process = yaml.safe_load((run_dir / ENVIRONMENT_FILE).read_text())["process"]
        return f"process {process['pid']} on {process['host']}"
    except (OSError, yaml.YAMLError, KeyError, TypeError):
        return "another process"  # which has not written that file yet


def resume_command(run_dir: Path, num_processes: int) -> str:
    """The command that goes on with the run."""
    launcher = "dfs" if num_processes == 1 else f"torchrun --nproc_per_node {num_processes} -m dfs_engine"
    return f"{launcher} train --resume --run_dir {shlex.quote(str(run_dir))}"
