"""Which kernels are the faster ones on this machine: this project's or ATen's.

ATen's `linear` goes to MKL, which may run at a third of an AMD CPU's peak, and oneDNN's weight gradient of a strided
convolution at a third of one's with AVX2; on other CPUs both may win. A bfloat16 convolution by Winograd's algorithm
in float beats oneDNN's where bfloat16 instructions do twice as much as float ones, and loses where they do sixteen
times as much. So it is measured, once per machine, in a fraction of a second, and the answer is kept in a file.
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

_VERSION = 4  # of the measurement below: another version asks again
_ROWS_INPUTS_OUTPUTS = ((1024, 384, 384), (1576, 192, 576))
# images, channels, pixels a side; large images and small ones, of which either may be the worse case
_STRIDED = ((32, 64, 32), (32, 256, 8))
# Large enough that the transformation of the weights, which is the same for any batch, does not decide.
_HALF = ((16, 64, 32), (32, 128, 16))
_ROUNDS = 7


class Speedups(NamedTuple):
    """How many times faster than ATen's this project's kernels are."""

    linear: float
    conv_grad_weight: float
    half_conv: float


class Wins(NamedTuple):
    """Where they are the faster ones.

    Attributes:
        linear: the matrix product in linear layers.
        conv_grad_weight: the same in the weight gradient of convolutions without Winograd.
        half_conv: Winograd on bfloat16 images; without meaning where the CPU has no bfloat16 instructions.
    """

    linear: bool
    conv_grad_weight: bool
    half_conv: bool


def cache_dir() -> Path:
    """$DFS_CACHE_DIR, or dfs_engine under the user's cache folder."""
    chosen = os.environ.get("DFS_CACHE_DIR")
    if chosen:
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dfs_engine"


def settle() -> Wins:
    """Sets the kernels of the cpp backend for this process; returns which are ours.

    While torch.compile traces, which cannot measure: all, because the kernels look at what is set when they run.
    """
    return Wins(True, True, True) if torch.compiler.is_compiling() else _settle()


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
    _C.set_half_winograd(wins.half_conv)
    for name, ratio in ratios._asdict().items():
        chosen = "own" if getattr(wins, name) else "ATen's"
        logger.info("%s: %s kernels (measured %.2f x ATen's speed)", name, chosen, ratio)
    return wins


def measure() -> Speedups:
    """Speed of this project's kernels over ATen's: sums of median times, interleaved."""
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
    strided: list[Callable[[], object]] = []
    half: list[Callable[[], object]] = []
    for num_images, channels, size in _STRIDED:
        x, grad = _images(num_images, channels, size), _images(num_images, 2 * channels, size // 2)
        shape, geometry = (2 * channels, channels, 3, 3), ((2, 2), (1, 1), (1, 1), 1)
        strided.append(functools.partial(ops.conv2d_grad_weight, grad, x, shape, *geometry, False))
    for num_images, channels, size in _HALF:
        x = _images(num_images, channels, size).bfloat16()
        weight, geometry = torch.ones(channels, channels, 3, 3, dtype=torch.bfloat16), ((1, 1), (1, 1), (1, 1), 1)
        half += [
            functools.partial(ops.conv2d, x, weight, None, *geometry),
            functools.partial(ops.conv2d_grad_input, x, weight, x.shape, *geometry, 0, channels // 2, True),
            functools.partial(ops.conv2d_grad_weight, x, x, weight.shape, *geometry, False),
        ]
    return Speedups(
        linear=_speedup(_C.set_own_gemm, linear),
        # The worst, because one answer serves all sizes, and none may lose.
        conv_grad_weight=min(_speedup(_C.set_own_grad_weight, [call]) for call in strided),
        half_conv=_speedup(_C.set_half_winograd, half),
    )


def _images(num_images: int, channels: int, size: int) -> torch.Tensor:
    return torch.ones(num_images, channels, size, size).contiguous(memory_format=torch.channels_last)


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
    return cache_dir() / f"kernels-{digest}.json"


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
