"""2-D convolution that trains through a slice of its input channels: docs/method.md, "What each backward may skip"."""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dfs_engine import reference as oracle
from dfs_engine.ops import _common, _two_calls
from dfs_engine.partition import ChannelSlice, dense_memory_format
from dfs_engine.runtime import backend as backends
from dfs_engine.runtime import choice
from dfs_engine.runtime.choice import Pair

NAME = "partitioned_conv2d"

_GEOMETRY = "SymInt[2] stride, SymInt[2] padding, SymInt[2] dilation, SymInt groups"


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


def _conv_flops(grad_output_shape, weight_shape, columns: int) -> int:
    num_images, out_channels, height, width = grad_output_shape
    return 2 * num_images * out_channels * height * width * columns * weight_shape[2] * weight_shape[3]


def _flops_forward(input_shape, weight_shape, *args, out_shape=None, **kwargs) -> int:
    return _conv_flops(out_shape, weight_shape, weight_shape[1])


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


_common.define(
    "conv2d",
    f"Tensor input, Tensor weight, Tensor? bias, {_GEOMETRY}",
    "Tensor",
    fake=F.conv2d,
    aten=F.conv2d,
    flops=_flops_forward,
)
_common.define(
    "conv2d_grad_input",
    "Tensor grad_output, Tensor weight, SymInt[4] input_size, "
    f"{_GEOMETRY}, SymInt start, SymInt stop, bool channels_last",
    "Tensor",
    fake=_fake_grad_input,
    aten=aten_grad_input,
    flops=_flops_grad_input,
)
_common.define(
    "conv2d_grad_weight",
    "Tensor grad_output, Tensor input, SymInt[4] weight_size, "
    f"{_GEOMETRY}, bool bias, bool channels_last=False, ScalarType? dtype=None",
    "(Tensor, Tensor)",
    fake=_fake_grad_weight,
    aten=aten_grad_weight,
    flops=_flops_grad_weight,
)


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
    """Forward on all channels; grad_input of the live part, [start, start + its width), only.

    Computes in the input's dtype, and takes the parameters as they are: so their gradients come in their own dtype.
    """

    @staticmethod
    def forward(
        ctx,
        live: Tensor,
        full: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        geometry: choice.Geometry,
        start: int,
        backend: str,
    ):
        ctx.geometry, ctx.start, ctx.stop, ctx.backend = geometry, start, start + live.size(1), backend
        ctx.input_size, ctx.channels_last = full.shape, dense_memory_format(full) is torch.channels_last
        ctx.save_for_backward(*((live, full) if ctx.needs_input_grad[2] else (None, None)), weight)
        weight, bias = weight.to(full.dtype), None if bias is None else bias.to(full.dtype)
        if full.size(1) == 0:
            # Stock convolutions refuse to read nothing, and of a sum of zeros not all of them make zero.
            output = full.new_zeros(_output_size(full, weight, geometry))
            return output if bias is None else output + bias.view(-1, 1, 1)
        if full.size(1) == 1:
            full, weight = _in_strides_of_nchw(full), _in_strides_of_nchw(weight)
        with _common.no_autocast(weight.device.type):
            return _common.run("conv2d", backend, full, weight, bias, *geometry)

    @staticmethod
    def backward(ctx, grad_output: Tensor):
        live, full, weight = ctx.saved_tensors
        needs_input, _, needs_weight, needs_bias, *_ = ctx.needs_input_grad
        backend = ctx.backend
        if _common.creating_graph():
            # Only stock operators can be differentiated again, and only the live slice may be differentiated through.
            backend = "aten"
            full = None if live is None else oracle.live_slice(live, ctx.start, ctx.stop, True, 1, full)
        grad_input = grad_weight = grad_bias = None
        with _common.no_autocast(weight.device.type):
            if needs_input:
                grad_input = _grad_input(ctx, backend, grad_output, weight.to(grad_output.dtype))
            if needs_weight and weight.size(1) > 0:
                # As the parameter is, dtype and layout, so that whoever accumulates gradients takes it without a copy.
                is_last = dense_memory_format(weight) is torch.channels_last
                options: Any = (*ctx.geometry, needs_bias, is_last, weight.dtype)
                grad_weight, grad_bias = _common.run(
                    "conv2d_grad_weight", backend, grad_output, full, weight.shape, *options
                )
            else:
                grad_weight = torch.zeros_like(weight) if needs_weight else None  # without elements
                grad_bias = grad_output.sum((0, 2, 3), dtype=weight.dtype) if needs_bias else None
        return grad_input, None, grad_weight, grad_bias if needs_bias else None, None, None, None


def _in_strides_of_nchw(one_channel: Tensor) -> Tensor:
    """Of a slice of one channel that lies in channels_last oneDNN computes some convolutions wrongly (torch 2.15)."""
    return one_channel.contiguous().squeeze(1).unsqueeze(1)


def _output_size(data: Tensor, weight: Tensor, geometry: choice.Geometry) -> torch.Size:
    """As stock computes or refuses it, whatever the number of channels."""
    image = torch.empty((data.size(0), 1, *data.shape[2:]), device="meta")
    kernel = torch.empty((weight.size(0), 1, *weight.shape[2:]), device="meta")
    return F.conv2d(image, kernel, None, *geometry[:3]).shape


def _grad_input(ctx, backend: str, grad_output: Tensor, weight: Tensor) -> Tensor:
    """grad_input of the slice, through the groups that the slice touches."""
    num_images, _, height, width = ctx.input_size
    stride, padding, dilation, groups = ctx.geometry
    start, stop = ctx.start, ctx.stop
    if start == stop:
        return grad_output.new_empty((num_images, 0, height, width))
    window = _window(start, stop, weight, groups)
    offset, end = window.channels
    if window.groups < groups:
        rows = slice(*window.rows)
        grad_output, weight = grad_output[:, rows], weight[rows]
    size = (num_images, end - offset, height, width)
    geometry = (stride, padding, dilation, window.groups)
    place = (start - offset, stop - offset, ctx.channels_last)
    return _common.run("conv2d_grad_input", backend, grad_output, weight, size, *geometry, *place)


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
        backend: "reference", "aten", or, of fp32, bf16 and fp16, "cpp", "triton"; or a kernel of "cpp" for those passes
            that have it: "cpp:winograd", "cpp:depthwise", "cpp:gemm", "cpp:aten". None or "auto" picks, of those
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
        RuntimeError: a requested backend that is not there, or that has no kernel for the dtype or the shape.
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
    num_live = stop - start
    chosen = choice.conv2d_backend(
        data, weight.shape, geometry, num_live, data.size(1) if reference else num_live, backend
    )
    if chosen == "reference":
        full = None if full is None else full.detach()
        return oracle.partitioned_conv2d(
            input, weight, bias, *geometry, start=start, stop=stop, reference=reference, full=full
        )
    if chosen == "aten" and full is None and num_live == data.size(1):
        return F.conv2d(input, weight, bias, *geometry)  # nothing to skip: ATen computes both gradients at once
    live, full = _common.live_and_full(input, full, start, stop, 1)
    if chosen == backends.SPLIT:
        return _two_calls.conv2d(live, full, weight, bias, geometry, ChannelSlice(start, stop), reference)
    if reference:
        return _PartitionedConv2d.apply(live, full, weight, bias, geometry, start, chosen)
    return _sliced_conv2d(live, weight, bias, geometry, start, stop, chosen)


def _sliced_conv2d(
    live: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    geometry: choice.Geometry,
    start: int,
    stop: int,
    backend: str,
) -> Tensor:
    """Without referencing: the convolution of the live channels alone, everything else reading as zero."""
    stride, padding, dilation, groups = geometry

    def conv2d(live: Tensor, weight: Tensor, bias: Tensor | None, groups: int) -> Tensor:
        inner = (stride, padding, dilation, groups)
        return _PartitionedConv2d.apply(live, live.detach(), weight, bias, inner, 0, backend)

    if start == stop:
        return conv2d(live, weight[:, :0], bias, 1)
    window = _window(start, stop, weight, groups)
    offset, end = window.channels
    first_row, last_row = window.rows
    rows = weight[first_row:last_row]
    if window.groups == 1:
        columns = rows[:, start - offset : stop - offset]
    else:
        # A slice that cuts into a group: the rest of that group reads as zero.
        columns, live = rows, F.pad(live, (0, 0, 0, 0, start - offset, end - stop))
    num_rows = weight.size(0)
    if first_row == 0 and last_row == num_rows:
        return conv2d(live, columns, bias, window.groups)
    output = conv2d(live, columns, None, window.groups)
    output = F.pad(output, (0, 0, 0, 0, first_row, num_rows - last_row))
    return output if bias is None else output + bias.view(-1, 1, 1).to(output.dtype)
