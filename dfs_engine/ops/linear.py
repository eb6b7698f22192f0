"""Linear layer that trains through a slice of its input features: docs/method.md, "What each backward may skip"."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from dfs_engine import reference as oracle
from dfs_engine.ops import _common, _two_calls
from dfs_engine.partition import ChannelSlice
from dfs_engine.runtime import backend as backends
from dfs_engine.runtime import choice

NAME = "partitioned_linear"


def _fake_grad_input(grad_output: Tensor, weight: Tensor, start: int, stop: int) -> Tensor:
    return grad_output.new_empty((*grad_output.shape[:-1], stop - start))


def _fake_grad_weight(
    grad_output: Tensor, input: Tensor, bias: bool, dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    out_features = grad_output.size(-1)
    sizes = (out_features, input.size(-1)), (out_features if bias else 0,)
    return grad_output.new_empty(sizes[0], dtype=dtype), grad_output.new_empty(sizes[1], dtype=dtype)


def _rows(shape) -> int:
    return math.prod(shape[:-1])


def _flops_forward(input_shape, weight_shape, *args, out_shape=None, **kwargs) -> int:
    return 2 * _rows(input_shape) * weight_shape[0] * weight_shape[1]


def _flops_grad_input(grad_output_shape, weight_shape, start, stop, *args, out_shape=None, **kwargs) -> int:
    return 2 * _rows(grad_output_shape) * weight_shape[0] * (stop - start)


def _flops_grad_weight(grad_output_shape, input_shape, *args, out_shape=None, **kwargs) -> int:
    return 2 * _rows(grad_output_shape) * grad_output_shape[-1] * input_shape[-1]


def _matrix(tensor: Tensor) -> Tensor:
    """(..., features) as (rows, features); one row for a vector, none for an empty batch."""
    return tensor.reshape(_rows(tensor.shape), tensor.size(-1))


def aten_grad_input(grad_output: Tensor, weight: Tensor, start: int, stop: int) -> Tensor:
    """The `aten` backend of `dfs_engine::linear_grad_input`: (..., stop - start)."""
    return grad_output @ weight[:, start:stop]


def aten_grad_weight(
    grad_output: Tensor, input: Tensor, bias: bool, dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """The `aten` backend of `dfs_engine::linear_grad_weight`: (out, in) and (out,), the latter empty without `bias`.

    Of `dtype`, or grad_output's; the matrix product rounds to the latter first.
    """
    rows, dtype = _matrix(grad_output), dtype or grad_output.dtype
    return (rows.t() @ _matrix(input)).to(dtype), rows.sum(0, dtype=dtype) if bias else rows.new_empty(0, dtype=dtype)


_common.define(
    "linear",
    "Tensor input, Tensor weight, Tensor? bias",
    "Tensor",
    fake=F.linear,
    aten=F.linear,
    flops=_flops_forward,
)
_common.define(
    "linear_grad_input",
    "Tensor grad_output, Tensor weight, SymInt start, SymInt stop",
    "Tensor",
    fake=_fake_grad_input,
    aten=aten_grad_input,
    flops=_flops_grad_input,
)
_common.define(
    "linear_grad_weight",
    "Tensor grad_output, Tensor input, bool bias, ScalarType? dtype=None",
    "(Tensor, Tensor)",
    fake=_fake_grad_weight,
    aten=aten_grad_weight,
    flops=_flops_grad_weight,
)


class _PartitionedLinear(torch.autograd.Function):
    """Forward on all features; grad_input of the live part, [start, start + its width), only.

    Computes in the input's dtype, and takes the parameters as they are: so their gradients come in their own dtype.
    """

    @staticmethod
    def forward(ctx, live: Tensor, full: Tensor, weight: Tensor, bias: Tensor | None, start: int, backend: str):
        ctx.start, ctx.stop, ctx.backend = start, start + live.size(-1), backend
        ctx.save_for_backward(*((live, full) if ctx.needs_input_grad[2] else (None, None)), weight)
        weight, bias = weight.to(full.dtype), None if bias is None else bias.to(full.dtype)
        if full.size(-1) == 0:
            # Of a sum without terms not every stock kernel makes zero.
            output = full.new_zeros((*full.shape[:-1], weight.size(0)))
            return output if bias is None else output + bias
        with _common.no_autocast(weight.device.type):
            return _common.run("linear", backend, full, weight, bias)

    @staticmethod
    def backward(ctx, grad_output: Tensor):
        live, full, weight = ctx.saved_tensors
        start, stop = ctx.start, ctx.stop
        needs_input, _, needs_weight, needs_bias, *_ = ctx.needs_input_grad
        backend = ctx.backend
        if _common.creating_graph():
            # Only stock operators can be differentiated again, and only the live slice may be differentiated through.
            backend = "aten"
            full = None if live is None else oracle.live_slice(live, start, stop, True, -1, full)
        grad_input = grad_weight = grad_bias = None
        with _common.no_autocast(weight.device.type):
            if needs_input:
                columns = weight.to(grad_output.dtype)
                grad_input = _common.run("linear_grad_input", backend, grad_output, columns, start, stop)
            if needs_weight:
                options = (needs_bias, weight.dtype)
                grad_weight, grad_bias = _common.run("linear_grad_weight", backend, grad_output, full, *options)
            elif needs_bias:
                grad_bias = _matrix(grad_output).sum(0, dtype=weight.dtype)
        return grad_input, None, grad_weight, grad_bias if needs_bias else None, None, None


def partitioned_linear(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    start: int,
    stop: int,
    reference: bool = True,
    full: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Linear layer whose backward computes grad_input only for features [start, stop).

    Equivalent to: ``F.linear(y, weight, bias)`` with
    ``y = torch.cat([x[..., :start].detach(), x[..., start:stop], x[..., stop:].detach()], -1)``

    Args:
        input: (..., in_features); or, with `full`, its live part (..., stop - start).
        weight: (out_features, in_features).
        bias: (out_features,).
        start, stop: half-open feature range, 0 <= start <= stop <= in_features.
        reference: True: features outside the slice are read, without gradient (the paper's feature referencing). False:
            they read as zero, so forward, grad_input and grad_weight all shrink to the slice.
        full: (..., in_features), the data of all features; never receives gradient. Then grad_input is narrow,
            (..., stop - start), and nothing is zero-filled.
        backend: "reference", "aten", or, of fp32, bf16 and fp16, "cpp", "triton"; or a kernel of "cpp" for those passes
            that have it: "cpp:onednn", "cpp:gemm", "cpp:aten". None or "auto" picks, of those dtypes: on the CPU cpp
            where a calibration of this machine found its matrix product faster than ATen's, and in half precision; on
            CUDA triton where the tuned table of the GPU says that it wins on this shape. Else aten.

    Returns:
        (..., out_features), dtype of input (of autocast, where that is on).

    Backward: grad_input is exactly 0 outside the slice, every element written; grad_weight and grad_bias are full
    (columns outside the slice exactly 0 with reference=False). Saves input only if weight needs a gradient.
    Cost of grad_input: 2 * rows * out_features * (stop - start) FLOPs instead of 2 * rows * out_features * in_features.

    Raises:
        ValueError: a slice out of range, shapes that do not match, tensors on several devices, an unknown backend.
        TypeError: integer, complex or mixed dtypes.
        RuntimeError: a requested backend that is not there, or that has no kernel for the dtype.
    """
    input, full = _common.autocast(input, full)  # type: ignore[assignment]
    _common.check_tensors(NAME, input=input, full=full, weight=weight, bias=bias)
    data = input if full is None else full
    if weight.dim() != 2 or data.dim() < 1 or data.size(-1) != weight.size(1):
        raise ValueError(
            f"{NAME}: expected input (..., in_features) and weight (out_features, in_features), "
            f"got {'input' if full is None else 'full'} {tuple(data.shape)} and weight {tuple(weight.shape)}."
        )
    _common.check_slice(NAME, start, stop, weight.size(1), "in_features")
    if full is not None:
        _common.check_live(NAME, input, full, start, stop, -1)
    num_live = stop - start
    num_read = weight.size(1) if reference else num_live
    chosen = choice.linear_backend(NAME, "linear_grad_input", data, weight, data.dtype, num_live, num_read, backend)
    if chosen == "reference":
        full = None if full is None else full.detach()
        return oracle.partitioned_linear(input, weight, bias, start=start, stop=stop, reference=reference, full=full)
    if chosen == "aten" and full is None and num_live == weight.size(1) > 0:
        return F.linear(input, weight, bias)  # nothing to skip: autograd's own backward costs less
    live, full = _common.live_and_full(input, full, start, stop, -1)
    if chosen == backends.SPLIT:
        return _two_calls.linear(live, full, weight, bias, ChannelSlice(start, stop), reference)
    if not reference:
        return _PartitionedLinear.apply(live, live.detach(), weight[:, start:stop], bias, 0, chosen)
    return _PartitionedLinear.apply(live, full, weight, bias, start, chosen)
