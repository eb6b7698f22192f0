"""Which matrix product is the faster one on this machine: this project's or ATen's.

ATen's `linear` goes to MKL, which may run at a third of an AMD CPU's peak; on other CPUs it may win. So it is measured,
once per machine, in a few milliseconds, and the answer is kept in a file.
"""

import functools
import hashlib
import json
import logging
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from dfs_engine.machine import cpu_model

logger = logging.getLogger(__name__)

_VERSION = 1  # of the measurement below: another version asks again
_SHAPES = ((1024, 384, 384), (1576, 192, 576))  # rows, in_features, out_features
_ROUNDS = 7


def cache_dir() -> Path:
    """$DFS_CACHE_DIR, or dfs_engine under the user's cache folder."""
    chosen = os.environ.get("DFS_CACHE_DIR")
    if chosen:
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dfs_engine"


@functools.cache
def settle_linear() -> bool:
    """Sets the matrix product of the cpp backend's linear layers for this process; returns whether it is ours."""
    from dfs_engine import _C

    ratio = _remembered()
    if ratio is None:
        ratio = measure()
        _remember(ratio)
    # Within noise ATen's stays: it is the better tested one.
    wins = ratio > 1.05
    _C.set_own_gemm(wins)
    logger.info("linear: %s matrix product (measured %.2f x ATen's speed)", "own" if wins else "ATen's", ratio)
    return wins


def measure() -> float:
    """Speed of this project's product over ATen's: median time of forward, grad_input and grad_weight, interleaved."""
    from dfs_engine import _C

    ops = torch.ops.dfs_engine
    total = {True: 0.0, False: 0.0}
    previous = _C.set_own_gemm(False)
    try:
        for rows, inputs, outputs in _SHAPES:
            x, weight, grad = torch.ones(rows, inputs), torch.ones(outputs, inputs), torch.ones(rows, outputs)
            times: dict[bool, list[float]] = {True: [], False: []}
            for _ in range(_ROUNDS):
                for own in (True, False):
                    _C.set_own_gemm(own)
                    started = time.perf_counter()
                    ops.linear(x, weight, None)
                    ops.linear_grad_input(grad, weight, 0, inputs // 2)
                    ops.linear_grad_weight(grad, x, False)
                    times[own].append(time.perf_counter() - started)
            for own, values in times.items():
                total[own] += statistics.median(values[1:])
    finally:
        _C.set_own_gemm(previous)
    return total[False] / total[True]


def _key() -> dict[str, Any]:
    from dfs_engine import _C

    return {
        "version": _VERSION,
        "cpu": cpu_model(),
        "instruction_set": _C.instruction_set(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


def _file() -> Path:
    digest = hashlib.sha256(json.dumps(_key(), sort_keys=True).encode()).hexdigest()[:16]
    return cache_dir() / f"linear-{digest}.json"


def _remembered() -> float | None:
    try:
        saved = json.loads(_file().read_text())
    except (OSError, ValueError):  # none yet, or not written by us
        return None
    ratio = saved.get("speed_over_aten") if isinstance(saved, dict) and saved.get("key") == _key() else None
    return ratio if isinstance(ratio, float) else None


def _remember(ratio: float) -> None:
    """Written beside and renamed, so that no other process reads half of it."""
    path = _file()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
            json.dump({"key": _key(), "speed_over_aten": ratio}, file)
        os.replace(file.name, path)
    except OSError as error:
        logger.info("linear: the calibration could not be kept in %s (%s); it is measured again next time", path, error)
