"""Which kernels are the faster ones on this machine: this project's or ATen's.

ATen's `linear` goes to MKL, which may run at a third of an AMD CPU's peak; oneDNN's product, which ATen does not use
there, may be faster, and so may this project's own. oneDNN's weight gradient of a strided convolution may run at a
third of the peak of a CPU with AVX2. A bfloat16 convolution by Winograd's algorithm
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

_VERSION = 5  # of the measurement below: another version asks again
_ROWS_INPUTS_OUTPUTS = ((1024, 384, 384), (1576, 192, 576))
_MANY_ROWS = ((1576, 192, 768), (2048, 384, 1536))  # as oneDNN's product takes them
# images, channels, pixels a side; large images and small ones, of which either may be the worse case
_STRIDED = ((32, 64, 32), (32, 256, 8))
# Large enough that the transformation of the weights, which is the same for any batch, does not decide.
_HALF = ((16, 64, 32), (32, 128, 16))
_ROUNDS = 7


class Speedups(NamedTuple):
    """How many times faster than ATen's the kernels are; `onednn_linear`: than the faster of ATen's and ours."""

    linear: float
    onednn_linear: float
    conv_grad_weight: float
    half_conv: float


class Wins(NamedTuple):
    """Where they are the faster ones.

    Attributes:
        linear: the matrix product in linear layers.
        onednn_linear: oneDNN's product instead, in forward and grad_input of linear layers with many rows.
        conv_grad_weight: the same in the weight gradient of convolutions without Winograd.
        half_conv: Winograd on bfloat16 images; without meaning where the CPU has no bfloat16 instructions.
    """

    linear: bool
    onednn_linear: bool
    conv_grad_weight: bool
    half_conv: bool

    @property
    def in_linear(self) -> bool:
        """Whether linear layers run anything but ATen's product."""
        return self.linear or self.onednn_linear


def cache_dir() -> Path:
    """$DFS_CACHE_DIR, or dfs_engine under the user's cache folder."""
    chosen = os.environ.get("DFS_CACHE_DIR")
    if chosen:
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dfs_engine"


def settle() -> Wins:
    """Sets the kernels of the cpp backend for this process; returns which are ours.

    Where nothing can be measured, while torch.compile traces or tensors are fake: all, because the kernels look at what
    is set when they run. Hence a model settles when it is made.
    """
    if torch.compiler.is_compiling():
        return Wins(True, True, True, True)
    if not _settle.cache_info().currsize and type(torch.empty(0, device="cpu")) is not torch.Tensor:
        return Wins(True, True, True, True)
    return _settle()


@functools.cache
def _settle() -> Wins:
    from dfs_engine import _C

    ratios = _remembered()
    level = logging.INFO if ratios is None else logging.DEBUG  # news once
    if ratios is None:
        with torch.device("cpu"):  # whatever the caller's default is
            ratios = measure()
        _remember(ratios)
    wins = Wins(*map(_is_clear, ratios))
    _C.set_own_gemm(wins.linear)
    _C.set_onednn_linear(wins.onednn_linear)
    _C.set_own_grad_weight(wins.conv_grad_weight)
    _C.set_half_winograd(wins.half_conv)
    for name, ratio in ratios._asdict().items():
        state = "on" if getattr(wins, name) else "off"
        logger.log(level, "%s: %s, %.2f x the speed of what it replaces", name, state, ratio)
    return wins


def _is_clear(ratio: float) -> bool:
    """Within noise ATen's kernels stay: they are the better tested ones."""
    return ratio > 1.05


def measure() -> Speedups:
    """Speed of this project's kernels over ATen's: sums of median times, interleaved."""
    from dfs_engine import _C

    ops = torch.ops.dfs_engine
    linear: list[Callable[[], object]] = []
    many_rows: list[Callable[[], object]] = []
    for shape in (*_ROWS_INPUTS_OUTPUTS, *_MANY_ROWS):
        rows, inputs, outputs = shape
        x, weight, grad = torch.ones(rows, inputs), torch.ones(outputs, inputs), torch.ones(rows, outputs)
        forward = functools.partial(ops.linear, x, weight, None)
        if shape in _MANY_ROWS:
            many_rows += [forward, functools.partial(ops.linear_grad_input, grad, weight, 0, inputs)]
        else:
            linear += [
                forward,
                functools.partial(ops.linear_grad_input, grad, weight, 0, inputs // 2),
                functools.partial(ops.linear_grad_weight, grad, x, False),
            ]
    strided: list[Callable[[], object]] = []
    half: list[Callable[[], object]] = []
    for num_images, channels, size in _STRIDED:
        x, grad = _images(num_images, channels, size), _images(num_images, 2 * channels, size // 2)
        weight_size, geometry = (2 * channels, channels, 3, 3), ((2, 2), (1, 1), (1, 1), 1)
        strided.append(functools.partial(ops.conv2d_grad_weight, grad, x, weight_size, *geometry, False))
    for num_images, channels, size in _HALF:
        x = _images(num_images, channels, size).bfloat16()
        weight, geometry = torch.ones(channels, channels, 3, 3, dtype=torch.bfloat16), ((1, 1), (1, 1), (1, 1), 1)
        half += [
            functools.partial(ops.conv2d, x, weight, None, *geometry),
            functools.partial(ops.conv2d_grad_input, x, weight, x.shape, *geometry, 0, channels // 2, True),
            functools.partial(ops.conv2d_grad_weight, x, x, weight.shape, *geometry, False),
        ]
    own_linear = _speedup(_C.set_own_gemm, linear)
    before = _C.set_own_gemm(_is_clear(own_linear))
    try:
        onednn_linear = _speedup(_C.set_onednn_linear, many_rows)
    finally:
        _C.set_own_gemm(before)
    return Speedups(
        linear=own_linear,
        onednn_linear=onednn_linear,
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
