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

# From part to part of grad_weight and of grad_bias, in elements.
Strides = tuple[int, int]
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
    """Has what `dfs_engine::conv2d_grad_weight` returns written: by way of float32 sums if there are several parts.

    So is a contiguous weight of several taps: to write it in its own order, a few bytes here and there, would take a
    large tile more registers than there are.

    Args:
        grad_weight: (out_channels, channels, kH, kW), dense, contiguous or channels_last.
        grad_bias: (out_channels,), or empty: not to be written.
        split: number of parts.
        write: launches the kernel that fills the (grad_weight, grad_bias) it is given, with strides from part to part:
            (split, out_channels, taps, channels) and (split, out_channels), split only if not written straight.
    """
    if split == 1 and grad_weight.is_contiguous(memory_format=torch.channels_last):
        write(grad_weight, grad_bias, (0, 0))
        return
    partial_weight, partial_bias = (
        total.new_empty((split, total.numel()), dtype=torch.float32) for total in (grad_weight, grad_bias)
    )
    write(partial_weight, partial_bias, (grad_weight.numel(), grad_bias.numel()))
    _, channels, kernel_h, kernel_w = grad_weight.shape
    order = (channels * kernel_h * kernel_w, channels, grad_weight.stride(1), grad_weight.stride(3))
    for partial, total, inner in ((partial_weight, grad_weight, order), (partial_bias, grad_bias, (1, 1, 1, 1))):
        if total.numel():
            grid = (triton.cdiv(total.numel(), _SUM["BLOCK"]),)
            _sum_kernel[grid](partial, total, split, total.numel(), *inner, **_SUM)


def compilations() -> Iterator[Compilation]:
    """The total in every dtype: of weights in both layouts, of one tap, and of a bias."""
    last, contiguous = "stride_wc", "stride_tap"
    ones = {"channels_last": [last], "contiguous": [contiguous], "1x1": [last, contiguous]}
    ones["bias"] = ["columns", "channels", last, contiguous]
    for dtype, (total, unit) in itertools.product(config.TYPE_NAMES.values(), ones.items()):
        types, constants = {"partial": "*fp32", "total": f"*{dtype}"}, {**_SUM, **dict.fromkeys(unit, 1)}
        yield config.compilation(f"conv2d total of parts {dtype} {total}", _sum_kernel, types, constants)
