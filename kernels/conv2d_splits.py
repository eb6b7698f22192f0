"""Sums over output pixels, cut into parts: how programs of a weight gradient share them, and the fixed-order total."""

import itertools
from collections.abc import Callable, Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from dfs_engine.kernels import config
from dfs_engine.kernels.config import Compilation, NoConfigFits

# Pixels are counted in 32 bits; the last tile may stick out.
_MAX_PIXELS = 2**31 - 2**20
# Of the kernel that adds up parts: numbers of a program, and its launch.
_SUM = {"BLOCK": 128, **config.PLAIN}

# A weight gradient's layouts, and which of its strides is 1 then.
LAYOUTS = {"channels_last": "stride_wc", "contiguous": "stride_tap"}
# Element strides of grad_weight's parts, channels and taps, and of grad_bias's parts.
Strides = tuple[int, int, int, int]
Write = Callable[[Tensor, Tensor, Strides], None]


def check_pixels(op: str, num_pixels: int) -> None:
    """Raises NoConfigFits where there are too many pixels to count in 32 bits."""
    if num_pixels > _MAX_PIXELS:
        raise NoConfigFits(f"{op}: {num_pixels} pixels are more than the kernels count to, {_MAX_PIXELS}.")


def count_pixels(grad_output: Tensor, split: int, block: int) -> tuple[int, ...]:
    """What a kernel needs to know to find its pixels, in the order of the kernels' arguments.

    Returns:
        num_pixels, chunk (of each part, a multiple of block), out_height, out_width, and what divides by the last two.
    """
    num_images, _, height, width = grad_output.shape
    num_pixels = num_images * height * width
    chunk = triton.cdiv(triton.cdiv(num_pixels, split), block) * block
    return num_pixels, chunk, height, width, *_reciprocal(height), *_reciprocal(width)


def _reciprocal(divisor: int) -> tuple[int, int]:
    """(factor, digits) with n // divisor == 2 * n * factor >> 32 + digits for 0 <= n < 2**31; factor < 2**32.

    Granlund and Montgomery, "Division by invariant integers using multiplication", 1994.
    """
    digits = (divisor - 1).bit_length()
    return -(-(1 << 31 + digits) // divisor), digits


@triton.jit
def divide(dividend, factor, digits):
    """Division by what `_reciprocal` knows: GPUs have no instruction for it, and an inner loop no time for the many."""
    high = tl.umulhi(dividend.to(tl.uint32) * 2, factor.to(tl.uint32))
    return (high >> digits.to(tl.uint32)).to(tl.int32)


@triton.jit
def _sum_kernel(partial, total, num_splits, size, columns, channels, stride_wc, stride_tap, BLOCK: tl.constexpr):
    """From parts in the order (row, tap, channel) to a total of dense rows, whose columns are `stride`s apart."""
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    source = partial + index
    result = tl.zeros((BLOCK,), tl.float32)
    for _ in range(num_splits):
        result += tl.load(source, index < size, 0.0)
        source += size
    column = index % columns
    target = index - column + column % channels * stride_wc + column // channels * stride_tap
    tl.store(total + target, result.to(total.dtype.element_ty), index < size)


def sum_splits(grad_weight: Tensor, grad_bias: Tensor, split: int, write: Write) -> None:
    """Has what `dfs_engine::conv2d_grad_weight` returns written, through partial sums if there are several.

    Args:
        grad_weight: (out_channels, channels, kH, kW), dense, contiguous or channels_last.
        grad_bias: (out_channels,), or empty: not to be written.
        split: number of parts. Of one, `write` writes the result; of several, float32 sums in the order of the columns:
            (split, out_channels, taps, channels) and (split, out_channels).
        write: launches the kernel that fills the (grad_weight, grad_bias) it is given, with strides for them.
    """
    _, stride_wc, _, stride_tap = grad_weight.stride()
    if split == 1:
        write(grad_weight, grad_bias, (0, stride_wc, stride_tap, 0))
        return
    out_channels, channels = grad_weight.shape[:2]
    partial_weight, partial_bias = (
        total.new_empty((split, total.numel()), dtype=torch.float32) for total in (grad_weight, grad_bias)
    )
    write(partial_weight, partial_bias, (grad_weight.numel(), 1, channels, grad_bias.numel()))
    columns = (grad_weight.numel() // out_channels, channels, stride_wc, stride_tap)
    for partial, total, order in ((partial_weight, grad_weight, columns), (partial_bias, grad_bias, (1, 1, 1, 1))):
        if total.numel():
            grid = (triton.cdiv(total.numel(), _SUM["BLOCK"]),)
            _sum_kernel[grid](partial, total, split, total.numel(), *order, **_SUM)


def compilations() -> Iterator[Compilation]:
    """The total in every dtype: of a weight in both layouts, and of a bias."""
    unit = {layout: [stride] for layout, stride in LAYOUTS.items()}
    unit["bias"] = ["columns", "channels", *LAYOUTS.values()]
    for dtype, (total, ones) in itertools.product(config.TYPE_NAMES.values(), unit.items()):
        types, constants = {"partial": "*fp32", "total": f"*{dtype}"}, {**_SUM, **dict.fromkeys(ones, 1)}
        yield config.compilation(f"conv2d total of parts {dtype} {total}", _sum_kernel, types, constants)
