"""Gradients of a 2-D convolution as implicit matrix products: nothing is unfolded, tiles are gathered in place.

Any strides; what does not have its channels side by side (channels_last) is copied first. float32, float16 and
bfloat16, accumulated in float32.
"""

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from dfs_engine.kernels import config
from dfs_engine.kernels.config import Compilation, Config, NoConfigFits
from dfs_engine.kernels.conv2d_depthwise import depthwise_grad_input, depthwise_grad_weight
from dfs_engine.kernels.conv2d_splits import Strides, check_pixels, count_pixels, divide, sum_splits

Pair = tuple[int, int]

_MAX_TAPS = 31  # one bit of an integer each, rows and columns apart

# Rows are pixels, mostly without end; columns are the slice's channels, often few. tf32 by three products keeps so many
# parts of the operands that a tile of 64 x 128 needs eight warps; so does one of 64 x 64 without tensor cores.
_IEEE = (Config(64, 64, 16, 8, 3), Config(32, 32, 16, 4, 3))
config.define(
    "conv2d_grad_input",
    half=(
        Config(128, 256, 32, 8, 4),
        Config(128, 128, 64, 8, 3),
        Config(128, 64, 64, 8, 3),
        Config(128, 32, 64, 4, 4),
        Config(64, 32, 64, 4, 4),
    ),
    tf32=(Config(128, 128, 32, 8, 3), Config(128, 64, 32, 8, 3), Config(64, 32, 32, 4, 3)),
    ieee=_IEEE,
)
config.define(
    "conv2d_grad_weight",
    tf32=(Config(128, 128, 32, 8, 3), Config(64, 128, 32, 8, 3), Config(64, 64, 32, 4, 3)),
    ieee=_IEEE,
)


@triton.jit
def _wide(value):
    return value.to(tl.int64)


@triton.jit
def _first_tap(
    residue, padding, KERNEL: tl.constexpr, STRIDE: tl.constexpr, DILATION: tl.constexpr, STEP: tl.constexpr
):
    """The smallest tap r with residue + padding - r * DILATION divisible by STRIDE, KERNEL where there is none.

    All such taps are STEP = STRIDE / gcd(STRIDE, DILATION) apart.
    """
    first = KERNEL
    for back in tl.static_range(STEP):
        tap = STEP - 1 - back
        first = tl.where((residue + padding - tap * DILATION) % STRIDE == 0, tap, first)
    return first


@triton.jit(do_not_specialize=["num_images", "height", "width", "out_height", "out_width", "padding_h", "padding_w"])
def _grad_input_kernel(
    grad_output, weight, grad_input,
    num_images, height, width, out_height, out_width,
    out_channels, channels, start, stop, padding_h, padding_w,  # channels of one group, slice of all
    stride_gn, stride_go, stride_gh, stride_gw,
    stride_wo, stride_wc, stride_wh, stride_ww,
    stride_n, stride_c, stride_h, stride_w,
    KERNEL_H: tl.constexpr, KERNEL_W: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    DILATION_H: tl.constexpr, DILATION_W: tl.constexpr, STEP_H: tl.constexpr, STEP_W: tl.constexpr,
    EVEN: tl.constexpr,  # whether BLOCK_K divides out_channels
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """A tile of input pixels x channels; the reduced axis runs over blocks of output channels, and taps in each.

    Pixels (y, x) that are equal modulo the stride meet the same taps, and among them y = residue + STRIDE * i meets
    output row i + base - j * shift at its j-th tap: each class is a convolution with stride 1 and its own few taps.
    """
    column_blocks = tl.cdiv(channels, BLOCK_N)
    pid = tl.program_id(0)
    # Column blocks, then classes of one place next to each other: they read the same part of grad_output.
    column_block = pid % column_blocks
    residue = pid // column_blocks % (STRIDE_H * STRIDE_W)
    tile = pid // (column_blocks * STRIDE_H * STRIDE_W)
    group = tl.program_id(1)
    residue_h, residue_w = residue // STRIDE_W, residue % STRIDE_W

    first_h = _first_tap(residue_h, padding_h, KERNEL_H, STRIDE_H, DILATION_H, STEP_H)
    first_w = _first_tap(residue_w, padding_w, KERNEL_W, STRIDE_W, DILATION_W, STEP_W)
    num_taps_w = tl.cdiv(tl.maximum(KERNEL_W - first_w, 0), STEP_W)
    num_taps = tl.cdiv(tl.maximum(KERNEL_H - first_h, 0), STEP_H) * num_taps_w
    SHIFT_H: tl.constexpr = DILATION_H * STEP_H // STRIDE_H
    SHIFT_W: tl.constexpr = DILATION_W * STEP_W // STRIDE_W

    rows, columns = tl.cdiv(height, STRIDE_H), tl.cdiv(width, STRIDE_W)
    pixel = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    i, j = pixel // columns % rows, pixel % columns
    image = pixel // (rows * columns)
    # The output pixel of the first tap; exact where there is one.
    out_y = i + (residue_h + padding_h - first_h * DILATION_H) // STRIDE_H
    out_x = j + (residue_w + padding_w - first_w * DILATION_W) // STRIDE_W
    pixel_offset = _wide(image) * stride_gn + _wide(out_y) * stride_gh + _wide(out_x) * stride_gw
    # Which rows and columns of taps meet the image, one bit each: found once, as the inner loop has no time to compare.
    rows_met, columns_met = tl.zeros((BLOCK_M,), tl.int32), tl.zeros((BLOCK_M,), tl.int32)
    for bit in tl.static_range(KERNEL_H):
        rows_met |= ((out_y >= bit * SHIFT_H) & (out_y < out_height + bit * SHIFT_H)).to(tl.int32) << bit
    for bit in tl.static_range(KERNEL_W):
        columns_met |= ((out_x >= bit * SHIFT_W) & (out_x < out_width + bit * SHIFT_W)).to(tl.int32) << bit
    rows_met = tl.where(image < num_images, rows_met, 0)
    inner = tl.arange(0, BLOCK_K)
    inner_offset = _wide(group * out_channels + inner)
    column = column_block * BLOCK_N + tl.arange(0, BLOCK_N)
    grad_tile = grad_output + pixel_offset[:, None] + (inner_offset * stride_go)[None, :]
    weight_tile = weight + (inner_offset * stride_wo)[:, None] + (_wide(column) * stride_wc)[None, :]

    accumulator = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    # A class without taps makes no step, but its divisions may be computed ahead of the loop.
    divisor, divisor_w = tl.maximum(num_taps, 1), tl.maximum(num_taps_w, 1)
    for step in range(tl.cdiv(out_channels, BLOCK_K) * num_taps):
        done, tap = step // divisor * BLOCK_K, step % divisor
        tap_h, tap_w = tap // divisor_w, tap % divisor_w
        grad_mask = ((rows_met >> tap_h) & (columns_met >> tap_w) & 1 != 0)[:, None]
        weight_mask = (column < channels)[None, :]
        if not EVEN:
            grad_mask &= (inner < out_channels - done)[None, :]
            weight_mask &= (inner < out_channels - done)[:, None]
        up, left = tap_h * SHIFT_H, tap_w * SHIFT_W
        down, right = first_h + tap_h * STEP_H, first_w + tap_w * STEP_W
        grad_shift = _wide(done) * stride_go - _wide(up) * stride_gh - _wide(left) * stride_gw
        weight_shift = _wide(done) * stride_wo + _wide(down) * stride_wh + _wide(right) * stride_ww
        a = tl.load(grad_tile + grad_shift, grad_mask, 0.0)
        b = tl.load(weight_tile + weight_shift, weight_mask, 0.0)
        accumulator = tl.dot(a, b, accumulator, input_precision=PRECISION)

    y, x = residue_h + STRIDE_H * i, residue_w + STRIDE_W * j
    channel = group * channels + column
    pixel_offset = _wide(image) * stride_n + _wide(y) * stride_h + _wide(x) * stride_w
    target = grad_input + pixel_offset[:, None] + (_wide(channel - start) * stride_c)[None, :]
    is_pixel = (image < num_images) & (y < height) & (x < width)
    is_channel = (column < channels) & (channel >= start) & (channel < stop)
    tl.store(target, accumulator.to(grad_input.dtype.element_ty), is_pixel[:, None] & is_channel[None, :])


@triton.jit
def _sum_products(
    grad_tile, input_tile, is_row, is_column, shift_y, shift_x, start, end,
    out_height, out_width, factor_h, digits_h, factor_w, digits_w, height, width,
    stride_gn, stride_gh, stride_gw, stride_n, stride_h, stride_w,
    STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr, BIAS: tl.constexpr, WIDE: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Over output pixels [start, end): the tile's products, and with BIAS its rows of grad_output."""
    accumulator = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    bias = tl.zeros((BLOCK_M,), tl.float32)
    for first in range(start, end, BLOCK_K):
        pixel = first + tl.arange(0, BLOCK_K)
        line = divide(pixel, factor_w, digits_w)
        image = divide(line, factor_h, digits_h)
        out_y, out_x = line - image * out_height, pixel - line * out_width
        y, x = out_y * STRIDE_H, out_x * STRIDE_W
        # Seen as unsigned, what lies before the image lies far behind it.
        inside_h = (y[:, None] + shift_y[None, :]).to(tl.uint32) < height.to(tl.uint32)
        inside_w = (x[:, None] + shift_x[None, :]).to(tl.uint32) < width.to(tl.uint32)
        if WIDE:
            image, out_y, out_x, y, x = _wide(image), _wide(out_y), _wide(out_x), _wide(y), _wide(x)
        grad_offset = image * stride_gn + out_y * stride_gh + out_x * stride_gw
        input_offset = image * stride_n + y * stride_h + x * stride_w
        is_pixel = (pixel < end)[:, None]
        a = tl.load(grad_tile + grad_offset[:, None], is_pixel & is_row[None, :], 0.0)
        b = tl.load(input_tile + input_offset[:, None], is_pixel & inside_h & inside_w & is_column[None, :], 0.0)
        accumulator = tl.dot(tl.trans(a), b, accumulator, input_precision=PRECISION)
        if BIAS:
            bias += tl.sum(a.to(tl.float32), 0)
    return accumulator, bias


@triton.jit(
    do_not_specialize=[
        "num_pixels", "chunk", "out_height", "out_width", "factor_h", "digits_h", "factor_w", "digits_w",
        "height", "width", "padding_h", "padding_w", "stride_bias_split",
    ]
)  # fmt: skip
def _grad_weight_kernel(
    grad_output, input, grad_weight, grad_bias,
    num_pixels, chunk, out_height, out_width, factor_h, digits_h, factor_w, digits_w, height, width,
    out_channels, channels, padding_h, padding_w,  # channels of one group
    stride_gn, stride_go, stride_gh, stride_gw,
    stride_n, stride_c, stride_h, stride_w,
    stride_split, stride_bias_split,
    KERNEL_H: tl.constexpr, KERNEL_W: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    DILATION_H: tl.constexpr, DILATION_W: tl.constexpr, BIAS: tl.constexpr,
    WIDE: tl.constexpr,  # whether an offset may need 64 bits
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """A tile of output channels x (tap, channel), summed over `chunk` output pixels: one of `num_programs(1)` parts.

    Neighbouring columns are neighbouring channels of one tap, or of the next, so that few channels waste nothing: the
    order of a channels_last weight.
    """
    num_columns = KERNEL_H * KERNEL_W * channels
    column_blocks = tl.cdiv(num_columns, BLOCK_N)
    pid = tl.program_id(0)
    split, group = tl.program_id(1), tl.program_id(2)
    column = pid % column_blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    row = pid // column_blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    is_row, is_column = row < out_channels, column < num_columns
    tap, channel = column // channels, column % channels
    shift_y = tap // KERNEL_W * DILATION_H - padding_h
    shift_x = tap % KERNEL_W * DILATION_W - padding_w
    out_channel = _wide(group * out_channels + row)
    column_offset = _wide(group * channels + channel) * stride_c + _wide(shift_y) * stride_h + _wide(shift_x) * stride_w
    grad_tile = grad_output + (out_channel * stride_go)[None, :]
    input_tile = input + column_offset[None, :]
    start, end = split * chunk, tl.minimum((split + 1) * chunk, num_pixels)
    # All blocks of columns read grad_output; the first one adds it up, in a loop of its own: a condition inside would
    # keep the others from multiplying straight out of shared memory.
    if BIAS and pid % column_blocks == 0:
        accumulator, bias = _sum_products(
            grad_tile, input_tile, is_row, is_column, shift_y, shift_x, start, end,
            out_height, out_width, factor_h, digits_h, factor_w, digits_w, height, width,
            stride_gn, stride_gh, stride_gw, stride_n, stride_h, stride_w,
            STRIDE_H, STRIDE_W, True, WIDE, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
        tl.store(grad_bias + split * stride_bias_split + out_channel, bias.to(grad_bias.dtype.element_ty), is_row)
    else:
        accumulator, _ = _sum_products(
            grad_tile, input_tile, is_row, is_column, shift_y, shift_x, start, end,
            out_height, out_width, factor_h, digits_h, factor_w, digits_w, height, width,
            stride_gn, stride_gh, stride_gw, stride_n, stride_h, stride_w,
            STRIDE_H, STRIDE_W, False, WIDE, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
    target = grad_weight + _wide(split) * stride_split + (out_channel * num_columns)[:, None] + column[None, :]
    tl.store(target, accumulator.to(grad_weight.dtype.element_ty), is_row[:, None] & is_column[None, :])


def _geometry(weight_size: Sequence[int], stride: Pair, dilation: Pair) -> dict[str, int]:
    """The constants of both kernels that the geometry gives."""
    names = "KERNEL_H", "KERNEL_W", "STRIDE_H", "STRIDE_W", "DILATION_H", "DILATION_W"
    return dict(zip(names, (*weight_size[2:], *stride, *dilation), strict=True))


def _steps(stride: Pair, dilation: Pair) -> dict[str, int]:
    steps = [along // math.gcd(along, apart) for along, apart in zip(stride, dilation, strict=True)]
    return {"STEP_H": steps[0], "STEP_W": steps[1]}


def _last_offset(tensor: Tensor) -> int:
    return sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))


def _strides(tensor: Tensor) -> list[int]:
    """With 0, which is aligned to everything, where there is nothing to step over."""
    return [stride if size > 1 else 0 for size, stride in zip(tensor.shape, tensor.stride(), strict=True)]


def _adjacent(tensor: Tensor) -> Tensor:
    """Channels side by side: a copy if they are not, as gathering them one by one for every tap would cost more."""
    is_adjacent = tensor.stride(1) == 1 or tensor.size(1) == 1
    return tensor if is_adjacent else tensor.contiguous(memory_format=torch.channels_last)


def _candidates(op: str, m: int, n: int, k: int, geometry: dict[str, int], *operands: Tensor) -> tuple[Config, ...]:
    """Of operands that have to be loaded one element at a time, a large tile needs more registers than there are."""

    def is_wide(tensor: Tensor) -> bool:
        rows, channels, *columns = _strides(tensor)
        return channels == 1 and all(step % config.ALIGNMENT == 0 for step in (rows, *columns, tensor.data_ptr()))

    sizes = list(geometry.values())
    configs = config.candidates(op, m, n, k, operands[0].dtype, config.convolution(sizes[:2], sizes[2:4], sizes[4:]))
    return configs if all(map(is_wide, operands)) else configs[-1:]


def _options(chosen: Config) -> dict[str, Any]:
    return {"num_warps": chosen.num_warps, "num_stages": chosen.num_stages, "enable_fp_fusion": True}


def _blocks(chosen: Config) -> dict[str, int]:
    return {"BLOCK_M": chosen.block_m, "BLOCK_N": chosen.block_n, "BLOCK_K": chosen.block_k}


def conv2d_grad_input(
    grad_output: Tensor,
    weight: Tensor,
    input_size: Sequence[int],
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    groups: int,
    start: int,
    stop: int,
    channels_last: bool,
) -> Tensor:
    """The Triton kernel of `dfs_engine::conv2d_grad_input`: the input's gradient in channels [start, stop) alone.

    Args:
        grad_output: (N, out_channels, OH, OW), any strides.
        weight: (out_channels, in_channels / groups, kH, kW), any strides; only the slice's columns are read.
        input_size: (N, in_channels, H, W).
        channels_last: the result's layout.

    Returns:
        (N, stop - start, H, W), dtype of grad_output; every element is written.

    Raises:
        NoConfigFits: too large for the GPU, too many pixels, or a kernel of more than 31 rows or columns.
    """
    op = "conv2d_grad_input"
    num_images, in_channels, height, width = input_size
    grad_input = torch.empty(
        (num_images, stop - start, height, width),
        dtype=grad_output.dtype,
        device=grad_output.device,
        memory_format=torch.channels_last if channels_last else torch.contiguous_format,
    )
    if grad_input.numel() == 0:
        return grad_input
    num_pixels = num_images * height * width
    check_pixels(op, num_pixels)
    geometry, num_live = _geometry(weight.shape, stride, dilation), stop - start
    grad_output = _adjacent(grad_output)
    if groups == in_channels > 1:
        multiplier = weight.size(0) // in_channels
        rows = slice(start * multiplier, stop * multiplier)
        depthwise_grad_input(grad_output[:, rows], weight[rows], grad_input, padding, geometry)
        return grad_input
    if groups == 1:
        first, last = config.aligned(start, stop)  # read; only the slice is stored
        weight, start, stop = weight[:, first:last], start - first, stop - first
    weight = _adjacent(weight)
    out_channels, channels = weight.size(0) // groups, weight.size(1)
    if max(weight.shape[2:]) > _MAX_TAPS:
        raise NoConfigFits(f"{op}: a kernel of {tuple(weight.shape[2:])} has more rows or columns than {_MAX_TAPS}.")
    num_taps = weight.size(2) * weight.size(3)
    pixels_of_class = num_images * triton.cdiv(height, stride[0]) * triton.cdiv(width, stride[1])

    def run(chosen: Config) -> None:
        tiles = triton.cdiv(pixels_of_class, chosen.block_m) * stride[0] * stride[1]
        _grad_input_kernel[tiles * triton.cdiv(channels, chosen.block_n), groups](
            grad_output, weight, grad_input,
            num_images, height, width, *grad_output.shape[2:], out_channels, channels, start, stop, *padding,
            *_strides(grad_output), *_strides(weight), *_strides(grad_input),
            **geometry, **_steps(stride, dilation), **_blocks(chosen), EVEN=out_channels % chosen.block_k == 0,
            PRECISION=config.precision(op), **_options(chosen),
        )  # fmt: skip

    with torch.cuda.device_of(grad_output):
        configs = _candidates(op, num_pixels, num_live, out_channels * num_taps, geometry, grad_output, weight)
        config.launch(op, configs, run)
    return grad_input


def conv2d_grad_weight(
    grad_output: Tensor,
    input: Tensor,
    weight_size: Sequence[int],
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    groups: int,
    bias: bool,
    channels_last: bool = False,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """The Triton kernel of `dfs_engine::conv2d_grad_weight`: both parameters' gradients in one pass over grad_output.

    Args:
        grad_output: (N, out_channels, OH, OW), any strides.
        input: (N, in_channels, H, W), any strides.
        weight_size: (out_channels, in_channels / groups, kH, kW).
        channels_last: layout of grad_weight.
        dtype: of the results, to which the float32 sums are rounded; None: grad_output's.

    Returns:
        grad_weight, dense, of weight_size; grad_bias (out_channels,), empty without `bias`. Sums are taken in an order
        that shapes and configuration fix.

    Raises:
        NoConfigFits: too large for the GPU, or too many pixels.
    """
    op = "conv2d_grad_weight"
    num_images, _, out_height, out_width = grad_output.shape
    num_pixels = num_images * out_height * out_width
    num_columns = weight_size[1] * weight_size[2] * weight_size[3]
    options: Any = {"dtype": dtype or grad_output.dtype, "device": grad_output.device}
    layout = torch.channels_last if channels_last else torch.contiguous_format
    grad_weight = torch.empty(tuple(weight_size), memory_format=layout, **options)
    grad_bias = torch.empty(weight_size[0] if bias else 0, **options)
    if num_pixels == 0 or grad_weight.numel() == 0:
        return grad_weight.zero_(), grad_bias.zero_()
    check_pixels(op, num_pixels)
    geometry = _geometry(weight_size, stride, dilation)
    grad_output, input = _adjacent(grad_output), _adjacent(input)
    if groups == input.size(1) > 1:
        depthwise_grad_weight(grad_output, input, grad_weight, grad_bias, padding, geometry)
        return grad_weight, grad_bias
    out_channels = weight_size[0] // groups
    # The kernel goes to a pixel before the padding takes it back.
    beyond = sum(along * step for along, step in zip(padding, input.stride()[2:], strict=True))
    wide = max(_last_offset(grad_output), _last_offset(input) + beyond) >= 2**31

    def run(chosen: Config) -> None:
        def write(grad_weight: Tensor, grad_bias: Tensor, strides: Strides) -> None:
            blocks = triton.cdiv(out_channels, chosen.block_m) * triton.cdiv(num_columns, chosen.block_n)
            _grad_weight_kernel[blocks, chosen.split, groups](
                grad_output, input, grad_weight, grad_bias,
                *count_pixels(grad_output, chosen.split, chosen.block_k), *input.shape[2:],
                out_channels, weight_size[1], *padding, *_strides(grad_output), *_strides(input), *strides,
                **geometry, **_blocks(chosen), BIAS=bias, WIDE=wide, PRECISION=config.precision(op), **_options(chosen),
            )  # fmt: skip

        sum_splits(grad_weight, grad_bias, chosen.split, write)

    with torch.cuda.device_of(grad_output):
        configs = _candidates(op, out_channels, num_columns, num_pixels, geometry, grad_output, input)
        config.launch(op, configs, run)
    return grad_weight, grad_bias


def compilations() -> Iterator[Compilation]:
    """Every configuration on the commonest geometries and channels_last images."""
    for op, kernel in (("conv2d_grad_input", _grad_input_kernel), ("conv2d_grad_weight", _grad_weight_kernel)):
        for dtype, precision, chosen in config.variants(op):
            # What a weight gradient writes: partial sums, or a parameter's gradient in float32; or one in its dtype.
            results = [*dict.fromkeys(("fp32", dtype))] if kernel is _grad_weight_kernel else [dtype]
            for (size, stride), result in itertools.product(((3, 1), (3, 2), (1, 1)), results):
                pair, rare = (stride, stride), size == 1  # which stands for all that is rare
                constants = {
                    **_geometry((0, 0, size, size), pair, (1, 1)), **_steps(pair, (1, 1)), **_blocks(chosen),
                    **dict.fromkeys(("stride_go", "stride_wc", "stride_c"), 1),
                    "EVEN": not rare, "BIAS": rare, "WIDE": rare, "PRECISION": precision,
                }  # fmt: skip
                types = dict.fromkeys(("grad_output", "weight", "input"), f"*{dtype}")
                types |= dict.fromkeys(("grad_input", "grad_weight", "grad_bias"), f"*{result}")
                types |= dict.fromkeys(("factor_h", "factor_w"), "i64")
                name = f"{op} {dtype} {precision} {result} {size}x{size}/{stride}"
                yield config.compilation(name, kernel, types, constants, chosen)
