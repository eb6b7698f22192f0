"""What the machine can do at most, as far as stock calls reach it: the roof over the measured points."""

import functools
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F

_SECONDS = 1.0
_SIZE = 1536
_COPIED = 2**26


class Gauge(NamedTuple):
    """A stock call near what the machine can do, and the FLOPs or bytes of it."""

    call: Callable[[], object]
    units: int


def product_gauges(dtype: torch.dtype, device: str = "cpu", size: int = _SIZE) -> dict[str, Gauge]:
    """Products of two square matrices of `size`, and a convolution of about as much work.

    On some CPUs the one, on others the other is near what the vector units can do. A kernel may still be faster: this
    is what stock PyTorch reaches, not a figure from a data sheet.
    """
    left, right = (torch.ones(size, size, dtype=dtype, device=device) for _ in range(2))
    found = {"mm": Gauge(functools.partial(torch.mm, left, right), 2 * size**3)}
    if torch.device(device).type == "cpu" and _onednn_takes(dtype):
        linear = functools.partial(torch.ops.mkldnn._linear_pointwise, left, right, None, "none", [], "")
        found["linear"] = Gauge(linear, 2 * size**3)
    image, weight = (
        torch.ones(shape, dtype=dtype, device=device).contiguous(memory_format=torch.channels_last)
        for shape in ((size // 32, 128, 16, 16), (128, 128, 3, 3))
    )
    flops = 2 * image.numel() * 128 * 9
    return found | {"conv2d": Gauge(functools.partial(F.conv2d, image, weight, padding=1), flops)}


def _onednn_takes(dtype: torch.dtype) -> bool:
    if not torch.backends.mkldnn.is_available():
        return False
    return dtype == torch.float32 or (dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())


def copy_gauge(device: str = "cpu", size: int = _COPIED) -> Gauge:
    """A copy of so many floats, more than the caches hold; its bytes are those read and those written."""
    source = torch.zeros(size, device=device)
    target = torch.empty_like(source)
    return Gauge(lambda: target.copy_(source), 2 * source.numel() * source.element_size())


def matmul_peak(dtype: torch.dtype, seconds: float = _SECONDS, size: int = _SIZE) -> float:
    """FLOP/s of the fastest of `product_gauges`."""
    return max(gauge.units / _best(gauge.call, seconds) for gauge in product_gauges(dtype, size=size).values())


def copy_bandwidth(seconds: float = _SECONDS, size: int = _COPIED) -> float:
    """Bytes per second, read and written, of `copy_gauge`."""
    gauge = copy_gauge(size=size)
    return gauge.units / _best(gauge.call, seconds)


def _best(call: Callable[[], object], seconds: float) -> float:
    """The shortest of the calls that fit in `seconds`, after one that does not count."""
    call()
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        begin = time.perf_counter()
        call()
        best = min(best, time.perf_counter() - begin)
    return best
