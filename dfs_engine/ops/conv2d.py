"""2-D convolution that trains through a slice of its input channels: docs/method.md, "What each backward may skip"."""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from dfs_engine import reference as oracle
from dfs_engine.kernels.config import convolution, prefers_triton
from dfs_engine.ops import _common, _two_calls
from dfs_engine.partition import ChannelSlice, dense_memory_format
from dfs_engine.runtime import backend as backends
from dfs_engine.runtime import calibration

NAME = "partitioned_conv2d"
Pair = tuple[int, int]

_GEOMETRY = "SymInt[2] stride, SymInt[2] padding, SymInt[2] dilation, SymInt groups"
_common.LIBRARY.define(f"conv2d(Tensor input, Tensor weight, Tensor? bias, {_GEOMETRY}) -> Tensor")
_common.LIBRARY.define(
    "conv2d_grad_input(Tensor grad_output, Tensor weight, SymInt[4] input_size, "
    f"{_GEOMETRY}, SymInt start, SymInt stop, bool channels_last) -> Tensor"
)
_common.LIBRARY.define(
    "conv2d_grad_weight(Tensor grad_output, Tensor input, SymInt[4] weight_size, "
    f"{_GEOMETRY}, bool bias, bool channels_last=False, ScalarType? dtype=None) -> (Tensor, Tensor)"
)


def _fake_grad_input(
    grad_output, weight, input_size, stride, padding, dilation, groups, start, stop, channels_last
) -> Tensor:
    num_images, _, height, width = input_size
    shape = (num_images, stop - start, height, width)
    return torch.empty(
        shape, dtype=grad_output.dtype, device=grad_output.device, memory_format=_memory_format(channels_last)
    )


def _fake_grad_weight(
    grad_output, input, weight_size, stride, padding, dilation, groups, bias, channels_last=False, dtype=None
) -> tuple[Tensor, Tensor]:
    options = {"dtype": dtype or grad_output.dtype, "device": grad_output.device}
    grad_weight = torch.empty(weight_size, **options, memory_format=_memory_format(channels_last))
    return grad_weight, torch.empty(weight_size[0] if bias else 0, **options)


_common.register_fake("conv2d", F.conv2d)
_common.register_fake("conv2d_grad_input", _fake_grad_input)
_common.register_fake("conv2d_grad_weight", _fake_grad_weight)


def _conv_flops(grad_output_shape, weight_shape, columns: int) -> int:
    num_images, out_channels, height, width = grad_output_shape
    return 2 * num_images * out_channels * height * width * columns * weight_shape[2] * weight_shape[3]


@register_flop_formula(torch.ops.dfs_engine.conv2d)
def _flops_forward(input_shape, weight_shape, *args, out_shape=None, **kwargs) -> int:
    return _conv_flops(out_shape, weight_shape, weight_shape[1])


@register_flop_formula(torch.ops.dfs_engine.conv2d_grad_input)
def _flops_grad_input(
    grad_output_shape,
    weight_shape,
    input_size,
    stride,
    padding,
    dilation,
    groups,
    start,
    stop,
    *args,
    out_shape=None,
    **kwargs,
) -> int:
    return _conv_flops(grad_output_shape, weight_shape, stop - start if groups == 1 else weight_shape[1])


@register_flop_formula(torch.ops.dfs_engine.conv2d_grad_weight)
def _flops_grad_weight(grad_output_shape, input_shape, weight_size, *args, out_shape=None, **kwargs) -> int:
    return _conv_flops(grad_output_shape, weight_size, weight_size[1])


def _memory_format(channels_last: bool) -> torch.memory_format:
    return torch.channels_last if channels_last else torch.contiguous_format


def aten_grad_input(
    grad_output: Tensor,
    weight: Tensor,
    input_size: list[int],
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    groups: int,
    start: int,
    stop: int,
    channels_last: bool,
) -> Tensor:
    """The `aten` backend of `dfs_engine::conv2d_grad_input`: (N, stop - start, H, W)."""
    num_images, in_channels, height, width = input_size
    # Several groups: all channels of the groups at hand, then the slice. One group: exactly the slice.
    first, last = (start, stop) if groups == 1 else (0, in_channels)
    # Only shape and layout of the input matter here; a narrowed one would be copied to be made dense.
    template = torch.empty(
        (num_images, last - first, height, width),
        dtype=grad_output.dtype,
        device=grad_output.device,
        memory_format=_memory_format(channels_last),
    )
    columns = weight[:, first:last] if groups == 1 else weight
    mask = [True, False, False]
    grad_input, _, _ = torch.ops.aten.convolution_backward(
        grad_output, template, columns, None, stride, padding, dilation, False, [0, 0], groups, mask
    )
    return grad_input if groups == 1 else grad_input.narrow(1, start, stop - start)


def aten_grad_weight(
    grad_output: Tensor,
    input: Tensor,
    weight_size: list[int],
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    groups: int,
    bias: bool,
    channels_last: bool = False,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """The `aten` backend of `dfs_engine::conv2d_grad_weight`: weight_size and (out,), which is empty without `bias`.

    Of `dtype`, or grad_output's; the convolution rounds to the latter first.
    """
    if groups == 1 and weight_size[1] < 8 and weight_size[2] * weight_size[3] == 1 and max(stride) > 1:
        # In channels_last, oneDNN on AVX2 writes past its workspace here (uxlfoundation/oneDNN#6035).
        grad_output, input = grad_output.contiguous(), input.contiguous()
    layout, dtype = _memory_format(channels_last), dtype or grad_output.dtype
    template = torch.empty(weight_size, dtype=grad_output.dtype, device=grad_output.device, memory_format=layout)
    mask = [False, True, False]
    _, grad_weight, _ = torch.ops.aten.convolution_backward(
        grad_output, input, template, None, stride, padding, dilation, False, [0, 0], groups, mask
    )
    grad_weight = grad_weight.to(dtype=dtype, memory_format=layout).contiguous(memory_format=layout)
    # Asked for by the mask, the bias gradient alone would cost a whole weight gradient on the CPU.
    return grad_weight, grad_output.sum((0, 2, 3), dtype=dtype) if bias else grad_output.new_empty(0, dtype=dtype)


class _Window(NamedTuple):
    """The groups that a non-empty channel slice touches: input channels [channels), output channels [rows)."""

    groups: int
    channels: tuple[int, int]
    rows: tuple[int, int]


def _window(start: int, stop: int, weight: Tensor, groups: int) -> _Window:
    per_group, out_per_group = weight.size(1), weight.size(0) // groups
    first = start // per_group
    last = -(-stop // per_group)
    return _Window(last - first, (first * per_group, last * per_group), (first * out_per_group, last * out_per_group))


class _PartitionedConv2d(torch.autograd.Function):
    """Forward on all channels; grad_input on [start, stop) only.

    Computes in the input's dtype, and takes the parameters as they are: so their gradients come in their own dtype.
    """

    @staticmethod
    def forward(
        ctx,
        input: Tensor,
        full: Tensor | None,
        weight: Tensor,
        bias: Tensor | None,
        geometry: tuple[Pair, Pair, Pair, int],
        start: int,
        stop: int,
        kernels: str,
    ):
        data = input if full is None else full
        ctx.geometry, ctx.start, ctx.stop, ctx.kernels = geometry, start, stop, kernels
        ctx.is_plain, ctx.input_size = full is None, data.shape
        ctx.channels_last = dense_memory_format(data) is torch.channels_last
        keeps_input = ctx.needs_input_grad[2]
        ctx.save_for_backward(input if keeps_input else None, full if keeps_input else None, weight)
        weight, bias = weight.to(data.dtype), None if bias is None else bias.to(data.dtype)
        if data.size(1) == 0:
            # Stock convolutions refuse to read nothing, and of a sum of zeros not all of them make zero.
            output = data.new_zeros(_output_size(data, weight, geometry))
            return output if bias is None else output + bias.view(-1, 1, 1)
        compute = F.conv2d if kernels == "aten" else torch.ops.dfs_engine.conv2d
        with _common.no_autocast(weight.device.type):
            return compute(data, weight, bias, *geometry)

    @staticmethod
    def backward(ctx, grad_output: Tensor):
        input, full, weight = ctx.saved_tensors
        needs_input, _, needs_weight, needs_bias, *_ = ctx.needs_input_grad
        kernels = ctx.kernels
        data = input if full is None else full
        if _common.creating_graph():
            # Only stock operators can be differentiated again, and only the live slice may be differentiated through.
            kernels = "aten"
            data = None if input is None else oracle.live_slice(input, ctx.start, ctx.stop, True, 1, full)
        is_aten = kernels == "aten"
        grad_input = grad_weight = grad_bias = None
        with _common.no_autocast(weight.device.type):
            if needs_input:
                compute = aten_grad_input if is_aten else torch.ops.dfs_engine.conv2d_grad_input
                grad_input = _grad_input(compute, ctx, grad_output, weight.to(grad_output.dtype))
            if needs_weight and weight.size(1) > 0:
                reduce = aten_grad_weight if is_aten else torch.ops.dfs_engine.conv2d_grad_weight
                # As the parameter is, dtype and layout, so that whoever accumulates gradients takes it without a copy.
                is_last = dense_memory_format(weight) is torch.channels_last
                options: Any = (*ctx.geometry, needs_bias, is_last, weight.dtype)
                grad_weight, grad_bias = reduce(grad_output, data, weight.shape, *options)
            else:
                grad_weight = torch.zeros_like(weight) if needs_weight else None  # without elements
                grad_bias = grad_output.sum((0, 2, 3), dtype=weight.dtype) if needs_bias else None
        return grad_input, None, grad_weight, grad_bias if needs_bias else None, None, None, None, None


def _output_size(data: Tensor, weight: Tensor, geometry: tuple[Pair, Pair, Pair, int]) -> torch.Size:
    """As stock computes or refuses it, whatever the number of channels."""
    image = torch.empty((data.size(0), 1, *data.shape[2:]), device="meta")
    kernel = torch.empty((weight.size(0), 1, *weight.shape[2:]), device="meta")
    return F.conv2d(image, kernel, None, *geometry[:3]).shape


def _grad_input(compute, ctx, grad_output: Tensor, weight: Tensor) -> Tensor:
    """grad_input of the slice, through the groups that the slice touches; full-size in the plain form."""
    num_images, in_channels, height, width = ctx.input_size
    stride, padding, dilation, groups = ctx.geometry
    start, stop = ctx.start, ctx.stop
    if start == stop:
        grad_input = grad_output.new_empty((num_images, 0, height, width))
    else:
        window = _window(start, stop, weight, groups)
        offset, end = window.channels
        first_row, last_row = window.rows
        if window.groups < groups:
            grad_output, weight = grad_output[:, first_row:last_row], weight[first_row:last_row]
        size = (num_images, end - offset, height, width)
        geometry = (stride, padding, dilation, window.groups)
        grad_input = compute(grad_output, weight, size, *geometry, start - offset, stop - offset, ctx.channels_last)
    if not ctx.is_plain or stop - start == in_channels:
        return grad_input
    return F.pad(grad_input, (0, 0, 0, 0, start, in_channels - stop))


def _triton_wins(
    data: Tensor, weight_shape: torch.Size, geometry: tuple[Pair, Pair, Pair, int], num_live: int, num_read: int
) -> bool:
    """Whether the tuned table of the tensors' GPU prefers both gradients' kernels here.

    The table has one group and channels_last alone: rearranging first costs what the kernels gain.
    """
    stride, padding, dilation, groups = geometry
    if groups != 1 or dense_memory_format(data) is not torch.channels_last:
        return False
    num_images, _, height, width = data.shape
    out_channels, _, *kernel = weight_shape
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


def _own_grad_weight_wins(data: Tensor, weight: Tensor, groups: int) -> bool:
    """Whether csrc/gemm.cpp takes the weight gradient, and a calibration of this machine found it the faster one.

    In channels_last alone: rearranging the image first costs what it gains.
    """
    out_channels, in_channels, *kernel = weight.shape
    applies = data.dtype == torch.float32 and groups == 1 and min(out_channels, in_channels) >= 16 and kernel != [1, 1]
    return applies and dense_memory_format(data) is torch.channels_last and calibration.settle().conv_grad_weight


def _depthwise_applies(data: Tensor, weight_shape: torch.Size, groups: int) -> bool:
    """Whether csrc/depthwise.cpp takes the convolution: one filter per channel, channels_last."""
    out_channels, per_group, *_ = weight_shape
    is_depthwise = per_group == 1 and out_channels == groups > 1
    return is_depthwise and data.dtype == torch.float32 and dense_memory_format(data) is torch.channels_last


def winograd_applies(
    weight_shape: torch.Size, stride: Pair, padding: Pair, dilation: Pair, groups: int, dtype: torch.dtype
) -> bool:
    """Whether csrc/winograd.cpp takes the forward: what the cpp backend has of its own in float32.

    As that file decides; known here too, because a choice that torch.compile traces cannot ask C++.
    """
    out_channels, in_channels, *kernel = weight_shape
    is_plain = stride == (1, 1) and dilation == (1, 1) and groups == 1 and max(padding) <= 2
    return dtype == torch.float32 and kernel == [3, 3] and is_plain and min(out_channels, in_channels) >= 16


def _pair(name: str, value: int | tuple[int, int]) -> Pair:
    pair = (value, value) if isinstance(value, int) else tuple(value)
    if len(pair) != 2 or not all(isinstance(v, int) for v in pair):
        raise ValueError(f"{NAME}: expected an integer or two, got {name}={value!r}.")
    return pair


def partitioned_conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Pair = 1,
    padding: int | Pair = 0,
    dilation: int | Pair = 1,
    groups: int = 1,
    *,
    start: int,
    stop: int,
    reference: bool = True,
    full: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """2-D convolution whose backward computes grad_input only for channels [start, stop).

    Equivalent to: ``F.conv2d(y, weight, bias, ...)`` with
    ``y = torch.cat([x[:, :start].detach(), x[:, start:stop], x[:, stop:].detach()], 1)``

    Args:
        input: (N, in_channels, H, W), or unbatched (in_channels, H, W); or, with `full`, its live part of stop - start
            channels.
        weight: (out_channels, in_channels / groups, kH, kW).
        bias: (out_channels,).
        stride, padding, dilation, groups: as `F.conv2d`, padding in pixels.
        start, stop: half-open channel range, 0 <= start <= stop <= in_channels.
        reference: True: channels outside the slice are read, without gradient (the paper's feature referencing). False:
            they read as zero, so forward, grad_input and grad_weight all shrink to the slice.
        full: (N, in_channels, H, W), the data of all channels; never receives gradient. Then grad_input is narrow,
            (N, stop - start, H, W), and nothing is zero-filled.
        backend: "reference", "aten", or, of fp32, bf16 and fp16, "cpp", "triton". None or "auto" picks, of those
            dtypes: on the CPU cpp where Winograd's algorithm applies (3x3, stride 1, float32), for depthwise
            convolutions in channels_last, where a calibration of this machine found its weight gradient faster than
            ATen's, and in half precision; on CUDA triton where the tuned table of the GPU says that it wins on this
            shape. Else aten.

    Returns:
        (N, out_channels, H', W'), dtype of input (of autocast, where that is on).

    Backward: grad_input is exactly 0 outside the slice, every element written; grad_weight and grad_bias are full
    (columns outside the slice exactly 0 with reference=False). Saves input only if weight needs a gradient.
    Cost of grad_input: (stop - start) / in_channels of the stock one's.

    Raises:
        ValueError: a slice out of range, shapes that do not match, tensors on several devices, an unknown backend.
        TypeError: integer, complex or mixed dtypes.
        RuntimeError: a requested backend that is not there, or that has no kernel for the dtype.
    """
    input, full = _common.autocast(input, full)  # type: ignore[assignment]
    _common.check_tensors(NAME, input=input, full=full, weight=weight, bias=bias)
    data = input if full is None else full
    if data.dim() == 3:
        output = partitioned_conv2d(
            input.unsqueeze(0),
            weight,
            bias,
            stride,
            padding,
            dilation,
            groups,
            start=start,
            stop=stop,
            reference=reference,
            full=None if full is None else full.unsqueeze(0),
            backend=backend,
        )
        return output.squeeze(0)
    geometry = (_pair("stride", stride), _pair("padding", padding), _pair("dilation", dilation), groups)
    if data.dim() != 4 or weight.dim() != 4 or data.size(1) != weight.size(1) * groups:
        raise ValueError(
            f"{NAME}: expected input (N, in_channels, H, W) and weight (out_channels, in_channels / groups, kH, kW), "
            f"got {'input' if full is None else 'full'} {tuple(data.shape)}, weight {tuple(weight.shape)}, "
            f"groups={groups}."
        )
    _common.check_slice(NAME, start, stop, data.size(1), "in_channels")
    if full is not None:
        _common.check_live(NAME, input, full, start, stop, 1)
        full = full.detach()

    def wins(kernels: str) -> bool:
        if kernels == "cpp":
            # Half precision: ATen emulates it slowly where the CPU lacks it.
            own = data.dtype in _common.HALF or winograd_applies(weight.shape, *geometry, data.dtype)
            own = own or _depthwise_applies(data, weight.shape, groups)
            return own or _own_grad_weight_wins(data, weight, groups)
        num_live = stop - start
        return _triton_wins(data, weight.shape, geometry, num_live, data.size(1) if reference else num_live)

    kernels = backends.select(NAME, data.device, data.dtype, backend, wins)
    if kernels == "cpp":
        calibration.settle()
    if kernels == "reference":
        return oracle.partitioned_conv2d(
            input, weight, bias, *geometry, start=start, stop=stop, reference=reference, full=full
        )
    if kernels == backends.SPLIT:
        live, columns = input if full is not None else input.narrow(1, start, stop - start), ChannelSlice(start, stop)
        return _two_calls.conv2d(live, data, weight, bias, geometry, columns, reference)
    if kernels == "aten" and full is None and stop - start == data.size(1):
        return F.conv2d(input, weight, bias, *geometry)  # nothing to skip: ATen computes both gradients at once
    if reference:
        return _PartitionedConv2d.apply(input, full, weight, bias, geometry, start, stop, kernels)
    live = input.narrow(1, start, stop - start) if full is None else input
    return _sliced_conv2d(live, weight, bias, geometry, start, stop, kernels)


def _sliced_conv2d(
    live: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    geometry: tuple[Pair, Pair, Pair, int],
    start: int,
    stop: int,
    kernels: str,
) -> Tensor:
    """Without referencing: the convolution of the live channels alone, everything else reading as zero."""
    stride, padding, dilation, groups = geometry
    if start == stop:
        plain = (stride, padding, dilation, 1)
        return _PartitionedConv2d.apply(live, None, weight[:, :0], bias, plain, 0, 0, kernels)
    window = _window(start, stop, weight, groups)
    offset, end = window.channels
    first_row, last_row = window.rows
    rows = weight[first_row:last_row]
    if window.groups == 1:
        columns = rows[:, start - offset : stop - offset]
    else:
        # A slice that cuts into a group: the rest of that group reads as zero.
        columns, live = rows, F.pad(live, (0, 0, 0, 0, start - offset, end - stop))
    inner = (stride, padding, dilation, window.groups)
    num_rows = weight.size(0)
    if first_row == 0 and last_row == num_rows:
        return _PartitionedConv2d.apply(live, None, columns, bias, inner, 0, live.size(1), kernels)
    output = _PartitionedConv2d.apply(live, None, columns, None, inner, 0, live.size(1), kernels)
    output = F.pad(output, (0, 0, 0, 0, first_row, num_rows - last_row))
    return output if bias is None else output + bias.view(-1, 1, 1).to(output.dtype)
