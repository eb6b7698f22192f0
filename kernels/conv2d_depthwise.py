"""Gradients of a depthwise 2-D convolution: each output channel reads one input channel, and memory is what it costs.

Nothing here multiplies matrices, so tensor cores have no part in it and every dtype is multiplied in float32.
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from dfs_engine.kernels import config
from dfs_engine.kernels.config import Compilation
from dfs_engine.kernels.conv2d_splits import Strides, count_pixels, divide, sum_splits

_BLOCKS = {"BLOCK_M": 64, "BLOCK_N": 32}
# Each program of the weight gradient sums at least so many pixels; a part more costs its partial sums.
_PIXELS_PER_SPLIT = 1024
_MAX_SPLITS = 256


@triton.jit(
    do_not_specialize=["num_images", "height", "width", "out_height", "out_width", "padding_h", "padding_w"]
)  # fmt: skip
def _grad_input_kernel(
    grad_output, weight, grad_input,
    num_images, channels, multiplier, height, width, out_height, out_width, padding_h, padding_w,
    stride_gn, stride_go, stride_gh, stride_gw,
    stride_wo, stride_wh, stride_ww,
    stride_n, stride_c, stride_h, stride_w,
    KERNEL_H: tl.constexpr, KERNEL_W: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    DILATION_H: tl.constexpr, DILATION_W: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """A tile of input pixels x channels: the sum over taps and over the `multiplier` output channels of each."""
    pixel = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    channel = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    y, x, image = pixel // width % height, pixel % width, pixel // (width * height)
    is_pixel, is_channel = image < num_images, channel < channels
    accumulator = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for tap in range(KERNEL_H * KERNEL_W):
        tap_h, tap_w = tap // KERNEL_W, tap % KERNEL_W
        # Times the stride; only multiples of it are output pixels.
        far_y, far_x = y + padding_h - tap_h * DILATION_H, x + padding_w - tap_w * DILATION_W
        out_y, out_x = far_y // STRIDE_H, far_x // STRIDE_W
        meets = (far_y >= 0) & (far_x >= 0) & (out_y * STRIDE_H == far_y) & (out_x * STRIDE_W == far_x)
        meets = meets & (out_y < out_height) & (out_x < out_width) & is_pixel
        pixel_offset = image.to(tl.int64) * stride_gn + out_y.to(tl.int64) * stride_gh + out_x.to(tl.int64) * stride_gw
        for repeat in range(multiplier):
            out_channel = (channel * multiplier + repeat).to(tl.int64)
            grad = tl.load(
                grad_output + pixel_offset[:, None] + (out_channel * stride_go)[None, :],
                meets[:, None] & is_channel[None, :],
                0.0,
            )
            factor = tl.load(weight + out_channel * stride_wo + tap_h * stride_wh + tap_w * stride_ww, is_channel, 0.0)
            accumulator += grad.to(tl.float32) * factor.to(tl.float32)[None, :]
    pixel_offset = image.to(tl.int64) * stride_n + y.to(tl.int64) * stride_h + x.to(tl.int64) * stride_w
    target = grad_input + pixel_offset[:, None] + (channel.to(tl.int64) * stride_c)[None, :]
    tl.store(target, accumulator.to(grad_input.dtype.element_ty), is_pixel[:, None] & is_channel[None, :])


@triton.jit(
    do_not_specialize=[
        "num_pixels", "chunk", "out_height", "out_width", "factor_h", "digits_h", "factor_w", "digits_w",
        "height", "width", "padding_h", "padding_w", "stride_split", "stride_bias_split",
    ]
)  # fmt: skip
def _grad_weight_kernel(
    grad_output, input, grad_weight, grad_bias,
    num_pixels, chunk, out_height, out_width, factor_h, digits_h, factor_w, digits_w, height, width,
    out_channels, multiplier, padding_h, padding_w,
    stride_gn, stride_go, stride_gh, stride_gw,
    stride_n, stride_c, stride_h, stride_w,
    stride_split, stride_bias_split,
    KERNEL_H: tl.constexpr, KERNEL_W: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    DILATION_H: tl.constexpr, DILATION_W: tl.constexpr, BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One tap of a block of output channels, summed over `chunk` output pixels; the first tap's also sum the bias."""
    tap = tl.program_id(0) % (KERNEL_H * KERNEL_W)
    out_channel = tl.program_id(0) // (KERNEL_H * KERNEL_W) * BLOCK_N + tl.arange(0, BLOCK_N)
    split = tl.program_id(1)
    is_channel = out_channel < out_channels
    grad_tile = grad_output + (out_channel.to(tl.int64) * stride_go)[None, :]
    input_tile = input + ((out_channel // multiplier).to(tl.int64) * stride_c)[None, :]
    sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    bias = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    end = tl.minimum((split + 1) * chunk, num_pixels)
    for first in range(split * chunk, end, BLOCK_M):
        pixel = first + tl.arange(0, BLOCK_M)
        line = divide(pixel, factor_w, digits_w)
        image = divide(line, factor_h, digits_h)
        out_y, out_x = line - image * out_height, pixel - line * out_width
        y = out_y * STRIDE_H + tap // KERNEL_W * DILATION_H - padding_h
        x = out_x * STRIDE_W + tap % KERNEL_W * DILATION_W - padding_w
        inside = (pixel < end) & (y >= 0) & (y < height) & (x >= 0) & (x < width)
        grad_offset = image.to(tl.int64) * stride_gn + out_y.to(tl.int64) * stride_gh + out_x.to(tl.int64) * stride_gw
        input_offset = image.to(tl.int64) * stride_n + y.to(tl.int64) * stride_h + x.to(tl.int64) * stride_w
        # Of the pixels outside, the bias needs the gradient too.
        grad = tl.load(grad_tile + grad_offset[:, None], (pixel < end)[:, None] & is_channel[None, :], 0.0)
        value = tl.load(input_tile + input_offset[:, None], inside[:, None] & is_channel[None, :], 0.0)
        sums += grad.to(tl.float32) * value.to(tl.float32)
        if BIAS:
            bias += grad.to(tl.float32)
    # One channel each: all layouts of the weight are the same.
    target = grad_weight + split.to(tl.int64) * stride_split + out_channel * (KERNEL_H * KERNEL_W) + tap
    tl.store(target, tl.sum(sums, 0).to(grad_weight.dtype.element_ty), is_channel)
    if BIAS:
        target = grad_bias + split * stride_bias_split + out_channel
        num_written = tl.where(tap == 0, out_channels, 0)
        tl.store(target, tl.sum(bias, 0).to(grad_bias.dtype.element_ty), out_channel < num_written)


def depthwise_grad_input(
    grad_output: Tensor, weight: Tensor, grad_input: Tensor, padding: tuple[int, int], geometry: dict[str, int]
) -> None:
    """Writes every element of grad_input.

    Args:
        grad_output: (N, channels * multiplier, OH, OW), any strides.
        weight: (channels * multiplier, 1, kH, kW), any strides.
        grad_input: (N, channels, H, W), any strides.
        geometry: kernel size, stride and dilation as the kernels' constants.
    """
    num_images, channels, height, width = grad_input.shape
    multiplier = weight.size(0) // channels
    blocks = triton.cdiv(num_images * height * width, _BLOCKS["BLOCK_M"]), triton.cdiv(channels, _BLOCKS["BLOCK_N"])
    with torch.cuda.device_of(grad_output):
        _grad_input_kernel[blocks](
            grad_output, weight, grad_input,
            num_images, channels, multiplier, height, width, *grad_output.shape[2:], *padding,
            *grad_output.stride(), *weight[:, 0].stride(), *grad_input.stride(),
            **geometry, **_BLOCKS, **config.PLAIN,
        )  # fmt: skip


def depthwise_grad_weight(
    grad_output: Tensor,
    input: Tensor,
    grad_weight: Tensor,
    grad_bias: Tensor,
    padding: tuple[int, int],
    geometry: dict[str, int],
) -> None:
    """Writes every element of grad_weight and grad_bias. Sums are taken in a fixed order.

    Args:
        grad_output: (N, channels * multiplier, OH, OW), any strides.
        input: (N, channels, H, W), any strides.
        grad_weight: (channels * multiplier, 1, kH, kW), dense.
        grad_bias: (channels * multiplier,), or empty: not to be written.
        geometry: kernel size, stride and dilation as the kernels' constants.
    """
    num_images, out_channels, out_height, out_width = grad_output.shape
    split = min(max(num_images * out_height * out_width // _PIXELS_PER_SPLIT, 1), _MAX_SPLITS)
    blocks = triton.cdiv(out_channels, _BLOCKS["BLOCK_N"]) * grad_weight[0].numel()

    def write(grad_weight: Tensor, grad_bias: Tensor, strides: Strides) -> None:
        _grad_weight_kernel[blocks, split](
            grad_output, input, grad_weight, grad_bias,
            *count_pixels(grad_output, split, _BLOCKS["BLOCK_M"]), *input.shape[2:],
            out_channels, out_channels // input.size(1), *padding,
            *grad_output.stride(), *input.stride(), *strides,
            **geometry, **_BLOCKS, BIAS=grad_bias.numel() > 0, **config.PLAIN,
        )  # fmt: skip

    with torch.cuda.device_of(grad_output):
        sum_splits(grad_weight, grad_bias, split, write)


def compilations() -> Iterator[Compilation]:
    """Both kernels, on channels_last tensors; the weight gradient's parts in float32."""
    for dtype in config.TYPE_NAMES.values():
        constants = {
            "KERNEL_H": 3, "KERNEL_W": 3, "STRIDE_H": 2, "STRIDE_W": 2, "DILATION_H": 1, "DILATION_W": 1, "BIAS": True,
            **_BLOCKS, "stride_go": 1, "stride_c": 1, "stride_ww": 1,
        }  # fmt: skip
        types = dict.fromkeys(("grad_output", "weight", "input", "grad_input"), f"*{dtype}")
        types |= dict.fromkeys(("factor_h", "factor_w"), "i64")
        yield config.compilation(f"depthwise grad_input {dtype}", _grad_input_kernel, types, constants)
        for result in dict.fromkeys(("fp32", dtype)):
            types |= dict.fromkeys(("grad_weight", "grad_bias"), f"*{result}")
            name = f"depthwise grad_weight {dtype} {result}"
            yield config.compilation(name, _grad_weight_kernel, types, constants)
