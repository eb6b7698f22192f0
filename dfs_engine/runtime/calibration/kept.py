"""The answers that were measured on this machine, kept in a file for the processes that follow."""

import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from dfs_engine.runtime.calibration import answers, measure, table
from dfs_engine.runtime.calibration.answers import Answer, Question
from dfs_engine.runtime.machine import cpu_model


def cache_dir() -> Path:
    """$DFS_CACHE_DIR, or dfs_engine under the user's cache folder."""
    chosen = os.environ.get("DFS_CACHE_DIR")
    if chosen:
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dfs_engine"


def _key() -> dict[str, Any]:
    """What the answers hold for. Other words of the table are another key: they are newer than what was kept."""
    from dfs_engine import _C

    machine = table.this_machine()
    return {
        "version": measure.VERSION,
        "cpu": cpu_model(),
        "machine": machine and list(machine),
        "instructions": _C.instruction_set(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "table": answers.to_rows(table.known(machine)),
    }


def file() -> Path:
    """Where they are."""
    digest = hashlib.sha256(json.dumps(_key(), sort_keys=True).encode()).hexdigest()[:16]
    return cache_dir() / f"kernels-{digest}.json"


def read() -> dict[Question, Answer]:
    """What is kept; nothing where the file is not there, or not as written here."""
    try:
        saved = json.loads(file().read_text())
    except (OSError, ValueError):
        return {}
    if not isinstance(saved, dict) or saved.get("key") != _key():
        return {}
    return answers.from_rows(saved.get("answers"))


def write(kept: Mapping[Question, Answer]) -> None:
    """Keeps these and no others. Written beside and renamed, so that no other process reads half of it.

    Raises:
        OSError: the folder cannot be written.
    """
    path = file()
    if not kept:
        path.unlink(missing_ok=True)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, beside = tempfile.mkstemp(dir=path.parent)
    try:
        with os.fdopen(descriptor, "w") as out:
            json.dump({"key": _key(), "answers": answers.to_rows(kept)}, out, indent=1)
        os.replace(beside, path)
    except OSError:
        os.unlink(beside)
        raise
