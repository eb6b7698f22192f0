"""Which backend, and which of its kernels, serves a call: the one place that decides.

A backend is chosen when an op is called, by what does not change from batch to batch: dtype, layout, the weight, what a
calibration (`runtime.calibration`) or a tuned table (`kernels.config`) says. So torch.compile can trace the choice, and
puts no guards on sizes.

`cpp` has several kernels of some ops. Which one runs is decided for each pass, by all sizes, before the C++ op is
called with the kernel's name; that op does what it says or raises. Under torch.compile the traced op is the overload
without a name, which decides when it runs.

    aten        ATen's own convolution or product, with what this project does around it
    winograd    F(4x4, 3x3), csrc/winograd.cpp
    depthwise   one filter per channel, csrc/depthwise.cpp
    gemm        a matrix product, csrc/gemm.cpp
    onednn      oneDNN's matrix product where ATen would take another library's
"""

import contextlib
import functools
import os
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from dfs_engine.checks import is_transforming
from dfs_engine.kernels.config import convolution, prefers_triton
from dfs_engine.partition import dense_memory_format
from dfs_engine.runtime import backend as backends
from dfs_engine.runtime import calibration

Pair = tuple[int, int]
Geometry = tuple[Pair, Pair, Pair, int]

HALF = (torch.bfloat16, torch.float16)

# With fewer channels than this a convolution in bfloat16 is calibrated by itself.
_NARROW = 64
# Of longer sequences the attention weights are not kept.
_PLAIN_TOKENS = 512

_winograd: bool | None = {"0": False, "1": True}.get(os.environ.get("DFS_WINOGRAD", ""))


@contextlib.contextmanager
def use_winograd(enabled: bool | None) -> Iterator[None]:
    """The cpp backend's Winograd convolutions in the block, process-wide: wherever they apply, or nowhere.

    None, as it is unless DFS_WINOGRAD is set to 1 or 0: where they are faster than oneDNN's, which small images and few
    of them, or few channels, are not. They apply to float32, and to bfloat16 where a calibration of this machine found
    them faster than the CPU's own bfloat16 instructions.
    """
    global _winograd
    previous, _winograd = _winograd, enabled
    try:
        yield
    finally:
        _winograd = previous


def conv2d_backend(
    data: Tensor, weight_size: torch.Size, geometry: Geometry, num_live: int, num_read: int, request: str | None
) -> str:
    """Of `partitioned_conv2d` of `data`, whose gradient is wanted for `num_live` of its `num_read` channels.

    cpp where one of its kernels may be the faster one, and in half precision, which ATen emulates slowly where the CPU
    lacks it.
    """

    def wins(kernels: str) -> bool:
        if kernels == "triton":
            return _conv2d_triton_wins(data, weight_size, geometry, num_live, num_read)
        if data.dtype in HALF:
            return True
        if data.dtype == torch.float32 and _is_winograd(weight_size, *geometry):
            return True
        if dense_memory_format(data) is not torch.channels_last:
            return False  # rearranging the image first would cost what the other kernels gain
        return _is_depthwise(weight_size, geometry[3], data.dtype) or (
            data.dtype == torch.float32
            and _is_gemm(weight_size, geometry[0], geometry[3])
            and calibration.wins().conv_grad_weight
        )

    return backends.select("partitioned_conv2d", data.device, data.dtype, request, wins)


def _conv2d_triton_wins(
    data: Tensor, weight_size: torch.Size, geometry: Geometry, num_live: int, num_read: int
) -> bool:
    """Whether the tuned table of the tensors' GPU prefers both gradients' kernels here.

    The table has one group and channels_last alone: rearranging first costs what the kernels gain.
    """
    stride, padding, dilation, groups = geometry
    if groups != 1 or dense_memory_format(data) is not torch.channels_last:
        return False
    num_images, _, height, width = data.shape
    out_channels, _, *kernel = weight_size
    taps, key = kernel[0] * kernel[1], convolution(kernel, stride, dilation)
    out_height, out_width = (
        (size + 2 * pad - apart * (along - 1) - 1) // step + 1
        for size, pad, apart, along, step in zip((height, width), padding, dilation, kernel, stride, strict=True)
    )
    pixels, out_pixels = num_images * height * width, num_images * out_height * out_width
    sizes, dtype = ((pixels, num_live, out_channels * taps), (out_channels, num_read * taps, out_pixels)), data.dtype
    return prefers_triton("conv2d_grad_input", *sizes[0], dtype, key, device=data.device) and prefers_triton(
        "conv2d_grad_weight", *sizes[1], dtype, key, device=data.device
    )


def linear_backend(
    op: str,
    grad_input: str,
    data: Tensor,
    weight: Tensor,
    dtype: torch.dtype,
    num_live: int,
    num_read: int,
    request: str | None,
) -> str:
    """Of `partitioned_linear`, or of `partitioned_norm_linear`, whose products in `dtype` these are.

    `grad_input` names its op. cpp where a calibration found one of its products faster than ATen's, and in half
    precision, which ATen emulates slowly where the CPU lacks it.
    """

    def wins(kernels: str) -> bool:
        if kernels == "cpp":
            return dtype in HALF or (dtype == torch.float32 and calibration.wins().in_linear)
        rows, out_features = data.numel() // max(data.size(-1), 1), weight.size(0)
        return prefers_triton(grad_input, rows, num_live, out_features, dtype, device=weight.device) and prefers_triton(
            "linear_grad_weight", out_features, num_read, rows, dtype, device=weight.device
        )

    return backends.select(op, weight.device, dtype, request, wins)


def attention(query: Tensor, key: Tensor, value: Tensor) -> str:
    """The form of an attention of (N, heads, t, d) by (N, heads, T, d): "fused", PyTorch's kernels; "plain"; "float".

    On a CPU the backward of the fused kernel runs in bfloat16 at a fifth of what plain products reach, which keep the
    attention weights for it: worth it in training, for sequences that are not too long. Where the CPU has no bfloat16
    instructions, both forms take several times as long as the fused kernel in float32.

    Traced by torch.compile, which guards on T being that long or not.
    """
    if query.dtype != torch.bfloat16 or query.device.type != "cpu" or backends.unavailable_reason("cpp") is not None:
        return "fused"
    if _bfloat16_is_emulated:
        return "float"
    is_training = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (query, key, value))
    return "plain" if is_training and key.size(-2) <= _PLAIN_TOKENS else "fused"


def norm_act_backend(z: Tensor, residual: Tensor | None, pool: bool, request: str | None) -> str:
    """On CUDA as the tuned table says, which knows channels_last without a residual alone.

    On the CPU as measured: rearranging a dense NCHW input pays with a pool, or in float32 without a residual.
    """

    def wins(kernels: str) -> bool:
        is_channels_last = dense_memory_format(z) is torch.channels_last
        if kernels == "triton":
            num_rows, name = z.numel() // max(z.size(1), 1), norm_act_table(pool)
            known = is_channels_last and residual is None
            return known and prefers_triton(name, num_rows, z.size(1), 1, z.dtype, device=z.device)
        return not z.is_contiguous() or is_channels_last or pool or (z.dtype == torch.float32 and residual is None)

    return backends.select("norm_act", z.device, z.dtype, request, wins)


def norm_act_table(pool: bool) -> str:
    """What the tuned tables call forward and backward together; their sizes are (pixels, channels, 1)."""
    return "norm_act_pool" if pool else "norm_act"


def conv_act_backend(input: Tensor, request: str | None) -> str:
    """Of `conv_act`: cpp, but under torch.compile, which fuses by itself, and under torch.func's transforms."""
    if is_transforming() and backends.requested(request) is None:
        request = "reference"

    def wins(kernels: str) -> bool:
        return kernels == "cpp" and input.numel() > 0 and not torch.compiler.is_compiling()

    return backends.select("conv_act", input.device, input.dtype, request, wins)


def conv_act_kernel(input: Tensor, weight_size: torch.Size, geometry: Geometry, pool: bool) -> str:
    """Of `conv_act` by cpp: "winograd" or "onednn", with a weight brought into their order before, or "aten"."""
    _, padding, _, groups = geometry
    if _is_winograd(weight_size, *geometry) and _takes_winograd(input.dtype, min(weight_size[:2])):
        height, width = (size + 2 * pad - 2 for size, pad in zip(input.shape[2:], padding, strict=True))
        sizes = input.size(0), height, width
        is_large_enough = min(height, width) >= (2 if pool else 1)
        if is_large_enough and _winograd_pays(input.dtype, weight_size[1], weight_size[0], *sizes, is_fixed=True):
            return "winograd"
    return "onednn" if torch.backends.mkldnn.is_available() and groups == 1 else "aten"


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """In which oneDNN convolves images of `dtype` here, as csrc/common.cpp has it: half precision that the CPU lacks
    would be emulated, slowly."""
    return torch.float32 if _computes_in_float(dtype) else dtype


@functools.cache
def _computes_in_float(dtype: torch.dtype) -> bool:
    """Whether the cpp backend converts to float32, as csrc/common.cpp does: where the CPU lacks the instructions."""
    from dfs_engine import _C

    return dtype == torch.float32 or str(dtype).removeprefix("torch.") in _C.emulated_dtypes()


# Looked up at import, because torch.compile traces what reads it.
_bfloat16_is_emulated = backends.unavailable_reason("cpp") is None and _computes_in_float(torch.bfloat16)


def _is_winograd(weight_size: torch.Size, stride: Pair, padding: Pair, dilation: Pair, groups: int) -> bool:
    """With fewer channels the transforms cost more than the multiplications they save."""
    if groups != 1 or stride != (1, 1) or dilation != (1, 1) or _winograd is False:
        return False
    out_channels, in_channels, height, width = weight_size
    return height == width == 3 and out_channels >= 16 and in_channels >= 16 and max(padding) <= 2


def _is_depthwise(weight_size: torch.Size, groups: int, dtype: torch.dtype) -> bool:
    return 1 < groups == weight_size[0] and weight_size[1] == 1 and dtype in (torch.float32, torch.bfloat16)


def _is_gemm(weight_size: torch.Size, stride: Pair, groups: int) -> bool:
    """With few channels its panels would be mostly empty, and one tap reads too little to pay for packing. Where the
    stride is 1, oneDNN's kernel is the faster one."""
    return groups == 1 and stride != (1, 1) and min(weight_size[:2]) >= 16 and weight_size[2] * weight_size[3] > 1


def _gemm_pays(out_channels: int, in_channels: int, num_pixels: int) -> bool:
    """For a gradient of so many pixels.

    What is packed for every tap is multiplied once for each output channel. Measured with AVX-512 on 16 to 256 channels
    and 256 to 16,384 pixels.
    """
    return num_pixels <= 512 or (out_channels >= 64 and in_channels >= 32)


def _takes_winograd(dtype: torch.dtype, channels: int) -> bool:
    """Whether it may be the faster one in this dtype, of a convolution that reads and makes at least `channels`."""
    if dtype != torch.bfloat16 or _computes_in_float(dtype):
        return _computes_in_float(dtype)
    return calibration.wins().half_conv if channels >= _NARROW else calibration.wins().half_conv_narrow


def _winograd_pays(
    dtype: torch.dtype,
    in_channels: int,
    out_channels: int,
    num_images: int,
    height: int,
    width: int,
    is_fixed: bool = False,
) -> bool:
    """For outputs of so many images and pixels, by a weight that is transformed first or, `is_fixed`, was before.

    Measured over 2 to 32 pixels a side, 1 to 256 images, 16 to 512 channels: the speed of full tiles, many of them,
    over oneDNN's; by the part of the tiles that lies inside the image. The transform of the weights costs as much as
    some tiles. So does reading what was transformed before, and more where it is large: in a whole net no cache holds
    it from one call to the next (measured on VGG7 and ResNet18 as they are, 1 to 64 images).
    """
    if _winograd is not None:
        return _winograd
    speedup, weights, fewest = (2.1, 22, 16) if _computes_in_float(dtype) else (1.3, 30, 32)
    if in_channels * out_channels <= 256 or min(in_channels, out_channels) < fewest:
        return False
    tiles = num_images * -(-height // 4) * -(-width // 4)
    if is_fixed:
        tiles = max(tiles, 10 if 36 * in_channels * out_channels <= 1 << 21 else 14)
    else:
        tiles += weights
    return speedup * num_images * height * width > 16 * tiles


def _has_adjacent_channels(images: Tensor) -> bool:
    """channels_last, or a slice of the channels of such a tensor."""
    by_image, by_channel, by_row, by_column = images.stride()
    return by_channel == 1 and by_image >= by_row >= by_column >= images.size(1)


def _conv2d(
    input: Tensor, weight: Tensor, bias: object, stride: Pair, padding: Pair, dilation: Pair, groups: int
) -> str:
    size, dtype = weight.shape, input.dtype
    if groups == 1 and _is_winograd(size, stride, padding, dilation, groups) and _takes_winograd(dtype, min(size[:2])):
        num_images, _, height, width = input.shape
        sizes = num_images, height + 2 * padding[0] - 2, width + 2 * padding[1] - 2
        return "winograd" if _winograd_pays(dtype, size[1], size[0], *sizes) else "aten"
    return "depthwise" if _is_depthwise(size, groups, dtype) and _has_adjacent_channels(input) else "aten"


def _conv2d_grad_input(
    grad_output: Tensor,
    weight: Tensor,
    input_size: torch.Size,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    groups: int,
    start: int,
    stop: int,
    channels_last: bool,
) -> str:
    out_channels, dtype = weight.size(0), grad_output.dtype
    size = torch.Size((out_channels, stop - start, *weight.shape[2:])) if groups == 1 else weight.shape
    if groups == 1 and _is_winograd(size, stride, padding, dilation, groups) and _takes_winograd(dtype, min(size[:2])):
        num_images, _, height, width = input_size
        return "winograd" if _winograd_pays(dtype, out_channels, stop - start, num_images, height, width) else "aten"
    return "depthwise" if channels_last and _is_depthwise(size, groups, dtype) else "aten"


def _conv2d_grad_weight(
    grad_output: Tensor,
    input: Tensor,
    weight_size: torch.Size,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    groups: int,
    *_: object,
) -> str:
    dtype = grad_output.dtype
    if groups == 1:
        pays = _winograd or weight_size[0] * weight_size[1] > 256
        fewest = min(weight_size[:2])
        if pays and _is_winograd(weight_size, stride, padding, dilation, groups) and _takes_winograd(dtype, fewest):
            return "winograd"
        num_pixels = grad_output.numel() // max(weight_size[0], 1)
        is_gemm = (
            _computes_in_float(dtype)
            and _is_gemm(weight_size, stride, groups)
            and _gemm_pays(weight_size[0], weight_size[1], num_pixels)
            and calibration.wins().conv_grad_weight
        )
        return "gemm" if is_gemm else "aten"
    return "depthwise" if _is_depthwise(weight_size, groups, dtype) and _has_adjacent_channels(input) else "aten"


def _product(wins: calibration.Wins, rows: int, depth: int, columns: int, may_be_onednn: bool = True) -> str:
    """Of (rows, depth) by (depth, columns)."""
    # So many rows that what oneDNN does to the weights first, whatever their number, does not count. On one thread ATen
    # takes what csrc/linear.cpp gives it elsewhere.
    is_large = rows >= 1024 and min(depth, columns) >= 192
    if wins.onednn_linear and may_be_onednn and is_large and torch.get_num_threads() > 1:
        return "onednn"
    # Large enough to pay for packing.
    if wins.linear and min(rows, depth) >= 32 and columns >= 16 and rows * depth * columns >= 1 << 20:
        return "gemm"
    return "aten"


def _rows(tensor: Tensor) -> int:
    return tensor.numel() // max(tensor.size(-1), 1)


def _product_wins(dtype: torch.dtype) -> calibration.Wins | None:
    """None: whatever the sizes, ATen's is the product."""
    wins = calibration.wins() if _computes_in_float(dtype) else None
    return wins if wins is not None and wins.in_linear else None


def _linear(input: Tensor, weight: Tensor, bias: object) -> str:
    wins = _product_wins(input.dtype)
    return "aten" if wins is None else _product(wins, _rows(input), weight.size(1), weight.size(0))


def _linear_grad_input(grad_output: Tensor, weight: Tensor, start: int, stop: int) -> str:
    wins = _product_wins(grad_output.dtype)
    return "aten" if wins is None else _product(wins, _rows(grad_output), weight.size(0), stop - start)


def _linear_grad_weight(grad_output: Tensor, input: Tensor, *_: object) -> str:
    wins = _product_wins(grad_output.dtype)
    sizes = grad_output.size(-1), _rows(grad_output), input.size(-1)
    return "aten" if wins is None else _product(wins, *sizes, may_be_onednn=False)


# The cpp backend's kernel for a call, by the name of the op in torch.ops.dfs_engine, from its arguments.
KERNEL_OF: dict[str, Callable[..., str]] = {
    "conv2d": _conv2d,
    "conv2d_grad_input": _conv2d_grad_input,
    "conv2d_grad_weight": _conv2d_grad_weight,
    "linear": _linear,
    "linear_grad_input": _linear_grad_input,
    "linear_grad_weight": _linear_grad_weight,
}


def asked_kernel(op: str, backend: str) -> str | None:
    """What a backend like "cpp:winograd" asks for, if `dfs_engine::op` has it."""
    _, _, name = backend.partition(":")
    return name if name and any(name in passes.get(op, ()) for passes in backends.CPP_KERNELS.values()) else None
