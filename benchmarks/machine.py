"""What the machine can do at most, as far as stock calls reach it: the roof over the measured points."""

import time
from collections.abc import Callable

import torch

_SECONDS = 1.0


def matmul_peak(dtype: torch.dtype, seconds: float = _SECONDS, size: int = 1536) -> float:
    """FLOP/s of the fastest stock product of two square matrices: the best of torch.mm and oneDNN's linear.

    On some CPUs the one, on others the other is near what the vector units can do. A kernel may still be faster: this
    is what stock PyTorch reaches, not a figure from a data sheet.
    """
    left, right = torch.ones(size, size, dtype=dtype), torch.ones(size, size, dtype=dtype)
    calls: list[Callable[[], object]] = [lambda: torch.mm(left, right)]
    if torch.backends.mkldnn.is_available() and (
        dtype == torch.float32 or (dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())
    ):
        calls.append(lambda: torch.ops.mkldnn._linear_pointwise(left, right, None, "none", [], ""))
    return max(2 * size**3 / _best(call, seconds) for call in calls)


def copy_bandwidth(seconds: float = _SECONDS, size: int = 2**26) -> float:
    """Bytes per second, read and written, of copying a tensor of `size` floats, larger than the caches."""
    source, target = torch.zeros(size), torch.zeros(size)
    return 2 * 4 * size / _best(lambda: target.copy_(source), seconds)


def _best(call: Callable[[], object], seconds: float) -> float:
    """The shortest of the calls that fit in `seconds`, after one that does not count."""
    call()
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        begin = time.perf_counter()
        call()
        best = min(best, time.perf_counter() - begin)
    return best
