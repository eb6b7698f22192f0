"""Sums over output pixels, cut into parts: how programs of a weight gradient share them, and the fixed-order total."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from dfs_engine.kernels.config import TYPE_NAMES, Compilation, NoConfigFits

# Pixels are counted in 32 bits; the last tile may stick out.
_MAX_PIXELS = 2**31 - 2**20
_BLOCK = 128
_OPTIONS = {"num_warps": 4, "num_stages": 2}
_TENSORS = ("grad_output", "weight", "input", "grad_input", "grad_weight", "grad_bias", "total")

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
def _sum_kernel(partial, total, num_splits, size, channels, taps, BLOCK: tl.constexpr):
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    source = partial + index
    result = tl.zeros((BLOCK,), tl.float32)
    for _ in range(num_splits):
        result += tl.load(source, index < size, 0.0)
        source += size
    column = index % (channels * taps)
    target = index - column + column % channels * taps + column // channels
    tl.store(total + target, result.to(total.dtype.element_ty), index < size)


def sum_splits(
    grad_output: Tensor, weight_size: Sequence[int], bias: bool, split: int, write: Write
) -> tuple[Tensor, Tensor]:
    """Allocates what `dfs_engine::conv2d_grad_weight` returns and has it written, through partial sums if several.

    Args:
        grad_output: gives dtype and device.
        weight_size: (out_channels, channels, kH, kW).
        bias: without it, grad_bias is empty and not written.
        split: number of parts. Of one, `write` writes the result; of several, float32 sums in the order of the columns:
            (split, out_channels, taps, channels) and (split, out_channels).
        write: launches the kernel that fills the (grad_weight, grad_bias) it is given, with strides for them.
    """
    out_channels, channels, kernel_h, kernel_w = weight_size
    taps = kernel_h * kernel_w
    grad_weight = grad_output.new_empty(weight_size)
    grad_bias = grad_output.new_empty(out_channels if bias else 0)
    if split == 1:
        write(grad_weight, grad_bias, (0, taps, 1, 0))
        return grad_weight, grad_bias
    partial_weight = grad_output.new_empty((split, grad_weight.numel()), dtype=torch.float32)
    partial_bias = grad_output.new_empty((split, grad_bias.numel()), dtype=torch.float32)
    write(partial_weight, partial_bias, (grad_weight.numel(), 1, channels, grad_bias.numel()))
    for partial, total, inner in ((partial_weight, grad_weight, (channels, taps)), (partial_bias, grad_bias, (1, 1))):
        if total.numel():
            grid = (triton.cdiv(total.numel(), _BLOCK),)
            _sum_kernel[grid](partial, total, split, total.numel(), *inner, _BLOCK, **_OPTIONS, enable_fp_fusion=True)
    return grad_weight, grad_bias


def compilation(
    name: str, kernel: Any, dtype: str, constants: dict[str, Any], num_warps: int, num_stages: int
) -> Compilation:
    """A kernel on channels_last tensors of `dtype`: channels adjacent, as in the result of one part."""
    adjacent = {"stride_go": 1, "stride_wc": 1, "stride_c": 1}
    constants = {**{key: 1 for key in adjacent if key in kernel.arg_names}, **constants}
    signature = {}
    for argument in kernel.arg_names:
        if argument in constants:
            signature[argument] = "constexpr"
        elif argument == "partial":
            signature[argument] = "*fp32"
        elif argument in _TENSORS:
            signature[argument] = f"*{dtype}"
        else:
            signature[argument] = "i64" if argument.startswith("factor") else "i32"
    return Compilation(name, kernel, signature, constants, num_warps, num_stages)


def compilations() -> Iterator[Compilation]:
    """The total, in every dtype."""
    for dtype in TYPE_NAMES.values():
        yield compilation(f"conv2d total of parts {dtype}", _sum_kernel, dtype, {"BLOCK": _BLOCK}, **_OPTIONS)
