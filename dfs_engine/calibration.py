"""Which matrix product is the faster one on this machine: this project's or ATen's.

ATen's `linear` goes to MKL, which may run at a third of an AMD CPU's peak, and oneDNN's weight gradient of a strided
convolution at a third of one's with AVX2; on other CPUs both may win. So it is measured, once per machine,
in a fraction of a second, and the answer is kept in a file.
"""

import functools
import hashlib
import json
import logging
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from dfs_engine.machine import cpu_model

logger = logging.getLogger(__name__)

_VERSION = 2  # of the measurement below: another version asks again
_ROWS_INPUTS_OUTPUTS = ((1024, 384, 384), (1576, 192, 576))
_CHANNELS_PIXELS = ((64, 16), (128, 8))
_ROUNDS = 7


class Speedups(NamedTuple):
    """How many times faster than ATen's this project's matrix product is."""

    linear: float
    conv_grad_weight: float


class Wins(NamedTuple):
    """Where it is the faster one: in linear layers, in the weight gradient of convolutions without Winograd."""

    linear: bool
    conv_grad_weight: bool


def cache_dir() -> Path:
    """$DFS_CACHE_DIR, or dfs_engine under the user's cache folder."""
    chosen = os.environ.get("DFS_CACHE_DIR")
    if chosen:
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dfs_engine"


def settle() -> Wins:
    """Sets the matrix products of the cpp backend for this process; returns which are ours.

    While torch.compile traces, which cannot measure: all, because the kernels look at what is set when they run.
    """
    return Wins(True, True) if torch.compiler.is_compiling() else _settle()


@functools.cache
def _settle() -> Wins:
    from dfs_engine import _C

    ratios = _remembered()
    if ratios is None:
        ratios = measure()
        _remember(ratios)
    # Within noise ATen's stays: it is the better tested one.
    wins = Wins(*(ratio > 1.05 for ratio in ratios))
    _C.set_own_gemm(wins.linear)
    _C.set_own_grad_weight(wins.conv_grad_weight)
    for name, ratio in ratios._asdict().items():
        chosen = "own" if getattr(wins, name) else "ATen's"
        logger.info("%s: %s matrix product (measured %.2f x ATen's speed)", name, chosen, ratio)
    return wins


def measure() -> Speedups:
    """Speed of this project's product over ATen's: sums of median times, interleaved."""
    from dfs_engine import _C

    ops = torch.ops.dfs_engine
    linear: list[Callable[[], object]] = []
    for rows, inputs, outputs in _ROWS_INPUTS_OUTPUTS:
        x, weight, grad = torch.ones(rows, inputs), torch.ones(outputs, inputs), torch.ones(rows, outputs)
        linear += [
            functools.partial(ops.linear, x, weight, None),
            functools.partial(ops.linear_grad_input, grad, weight, 0, inputs // 2),
            functools.partial(ops.linear_grad_weight, grad, x, False),
        ]
    conv: list[Callable[[], object]] = []
    for channels, size in _CHANNELS_PIXELS:
        x = torch.ones(16, channels, size, size).contiguous(memory_format=torch.channels_last)
        grad = torch.ones(16, 2 * channels, size // 2, size // 2).contiguous(memory_format=torch.channels_last)
        geometry = ((2, 2), (1, 1), (1, 1), 1)
        conv.append(
            functools.partial(ops.conv2d_grad_weight, grad, x, (2 * channels, channels, 3, 3), *geometry, False)
        )
    return Speedups(_speedup(_C.set_own_gemm, linear), _speedup(_C.set_own_grad_weight, conv))


def _speedup(switch: Callable[[bool], bool], calls: list[Callable[[], object]]) -> float:
    total = {True: 0.0, False: 0.0}
    previous = switch(False)
    try:
        for call in calls:
            times: dict[bool, list[float]] = {True: [], False: []}
            for _ in range(_ROUNDS):
                for own, values in times.items():
                    switch(own)
                    started = time.perf_counter()
                    call()
                    values.append(time.perf_counter() - started)
            for own, values in times.items():
                total[own] += statistics.median(values[1:])
    finally:
        switch(previous)
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
    return cache_dir() / f"matrix-product-{digest}.json"


def _remembered() -> Speedups | None:
    try:
        saved = json.loads(_file().read_text())
    except (OSError, ValueError):  # none yet, or not written by us
        return None
    if not isinstance(saved, dict) or saved.get("key") != _key():
        return None
    ratios = saved.get("speed_over_aten")
    if not isinstance(ratios, dict) or ratios.keys() != set(Speedups._fields):
        return None
    return Speedups(**ratios) if all(isinstance(ratio, float) for ratio in ratios.values()) else None


def _remember(ratios: Speedups) -> None:
    """Written beside and renamed, so that no other process reads half of it."""
    path = _file()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
            json.dump({"key": _key(), "speed_over_aten": ratios._asdict()}, file)
        os.replace(file.name, path)
    except OSError as error:
        logger.info("calibration: it could not be kept in %s (%s); it is measured again next time", path, error)
