"""LayerNorm and linear that train through a slice of their input: docs/method.md, "Through a LayerNorm".

LayerNorm's backward needs sums over all channels, but they follow from the forward output, so that no matrix product is
wider than the slice. With z = LN(x) W^T + c, D = dL/dz, s the inverse deviation, S the slice:

    dL/dx[:, S] = s * ((D W[:, S]) * g[S] - m1 - x_hat[:, S] * m2)
    m1 = D (W g) / C,  m2 = sum_o D * (z - c - W b) / C
    A = D^T x_hat,  dW = A * g + (sum_n D) outer b,  dg = colsum(W * A),  db = W^T (sum_n D),  dc = sum_n D

z - c - W b has lost digits in the columns o where c or W b is far larger than it. That z was rounded costs the gradient
more than its own rounding where |c| + |W b| + |W_o * b| > sqrt(C) |W_o * g| (vector norms): these columns, of which
networks have few or none, are multiplied anew.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dfs_engine import reference as oracle
from dfs_engine.ops import _common, linear
from dfs_engine.runtime import choice

NAME = "partitioned_norm_linear"
# Of the two products, on a device that has no kernels of its own for what is around them: the CPU.
_DEFAULT = "cpp"


def _wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """In which statistics and sums are kept."""
    return torch.promote_types(dtype, torch.float32)


def _fake_row_sums(grad_output, output, input, mean, rstd, *parameters) -> tuple[Tensor, Tensor]:
    return torch.empty_like(mean), torch.empty_like(mean)


def _fake_grad_input(
    grad_output, output, input, mean, rstd, norm_weight, norm_bias, weight, bias, start: int, stop: int
) -> Tensor:
    return input.new_empty((*input.shape[:-1], stop - start))


def _fake_grad_weight(grad_output: Tensor, input: Tensor, mean: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    out_features = grad_output.size(-1)
    return mean.new_empty((out_features, input.size(-1))), mean.new_empty(out_features)


def _flops_grad_input(grad_output_shape, *args, out_shape=None, **kwargs) -> int:
    # Products of matrices, as the counter has them: the two matrix-vector products are left out.
    return 2 * linear._rows(grad_output_shape) * grad_output_shape[-1] * out_shape[-1]


def _flops_grad_weight(grad_output_shape, input_shape, *args, out_shape=None, **kwargs) -> int:
    return 2 * linear._rows(grad_output_shape) * grad_output_shape[-1] * input_shape[-1]


def _row_sums(
    grad_output: Tensor,
    output: Tensor,
    input: Tensor,
    mean: Tensor,
    rstd: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """`dfs_engine::norm_linear_row_sums`, an op because of what depends on values: m1 and m2, (..., 1) each."""
    dtype, num_channels = mean.dtype, input.size(-1)
    weight, wide_grad = weight.to(dtype), grad_output.to(dtype)
    scaled = weight if norm_weight is None else weight * norm_weight.to(dtype)
    products = output.to(dtype)
    if norm_bias is not None or bias is not None:
        shift, size = weight.new_zeros(weight.size(0)), weight.new_zeros(weight.size(0))
        if norm_bias is not None:
            shifted = weight * norm_bias.to(dtype)
            shift = shifted.sum(1)
            size = shift.abs() + shifted.norm(dim=1)
        if bias is not None:
            shift, size = shift + bias, size + bias.abs()
        products = products - shift
        lossy = _lossy_columns(size, num_channels**0.5 * scaled.norm(dim=1))
        if lossy.numel() > 0:
            normalized = (input.to(dtype) - mean) * rstd
            products.index_copy_(-1, lossy, normalized @ scaled[lossy].t())
    m1 = (wide_grad @ scaled.sum(1)).unsqueeze(-1) / num_channels
    return m1, (wide_grad * products).sum(-1, keepdim=True) / num_channels


def _lossy_columns(size: Tensor, bound: Tensor) -> Tensor:
    """Where `size` exceeds `bound`."""
    if size.is_cuda and torch.cuda.is_current_stream_capturing():
        return torch.arange(len(size), device=size.device)  # a graph cannot ask for values: all of them
    return (size > bound).nonzero().squeeze(1)


def _grad_input(
    product: Callable,
    grad_output: Tensor,
    output: Tensor,
    input: Tensor,
    mean: Tensor,
    rstd: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    start: int,
    stop: int,
) -> Tensor:
    """(..., stop - start), dtype of input; `product` computes grad_input of the linear."""
    m1, m2 = torch.ops.dfs_engine.norm_linear_row_sums(
        grad_output, output, input, mean, rstd, norm_weight, norm_bias, weight, bias
    )
    normalized = (input[..., start:stop] - mean) * rstd
    grad = product(grad_output, weight, start, stop).to(mean.dtype)
    if norm_weight is not None:
        grad = grad * norm_weight[start:stop]
    return (rstd * (grad - m1 - normalized * m2)).to(input.dtype)


def _grad_weight(
    product: Callable, grad_output: Tensor, input: Tensor, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor]:
    """A (out, in) and sum_n D (out,), in the dtype of `mean`; `product` computes grad_weight of the linear."""
    normalized = ((input - mean) * rstd).to(grad_output.dtype)
    grad, _ = product(grad_output, normalized, False, mean.dtype)
    return grad, _column_sum(grad_output, mean.dtype)


def _column_sum(grad_output: Tensor, dtype: torch.dtype) -> Tensor:
    return linear._matrix(grad_output).sum(0, dtype=dtype)


def aten_grad_input(*args: Any) -> Tensor:
    """The `aten` backend of `dfs_engine::norm_linear_grad_input`: (..., stop - start)."""
    return _grad_input(functools.partial(_common.run, "linear_grad_input", "aten"), *args)


def aten_grad_weight(*args: Any) -> tuple[Tensor, Tensor]:
    """The `aten` backend of `dfs_engine::norm_linear_grad_weight`: (out, in) and (out,), at least float32."""
    return _grad_weight(functools.partial(_common.run, "linear_grad_weight", "aten"), *args)


def _default_grad_input(*args: Any) -> Tensor:
    return _grad_input(functools.partial(_common.run, "linear_grad_input", _DEFAULT), *args)


def _default_grad_weight(*args: Any) -> tuple[Tensor, Tensor]:
    return _grad_weight(functools.partial(_common.run, "linear_grad_weight", _DEFAULT), *args)


_STATISTICS = "Tensor mean, Tensor rstd"
_PARAMETERS = "Tensor? norm_weight, Tensor? norm_bias, Tensor weight, Tensor? bias"
_common.define(
    "norm_linear_row_sums",
    f"Tensor grad_output, Tensor output, Tensor input, {_STATISTICS}, {_PARAMETERS}",
    "(Tensor m1, Tensor m2)",
    fake=_fake_row_sums,
)
_common.define(
    "norm_linear_grad_input",
    f"Tensor grad_output, Tensor output, Tensor input, {_STATISTICS}, {_PARAMETERS}, SymInt start, SymInt stop",
    "Tensor",
    fake=_fake_grad_input,
    aten=aten_grad_input,
    flops=_flops_grad_input,
)
_common.define(
    "norm_linear_grad_weight",
    f"Tensor grad_output, Tensor input, {_STATISTICS}",
    "(Tensor, Tensor)",
    fake=_fake_grad_weight,
    aten=aten_grad_weight,
    flops=_flops_grad_weight,
)
# Where a device has no kernel of its own for the last two, it still has the ones of the linear.
_common.LIBRARY.impl("norm_linear_row_sums", _row_sums, "CompositeExplicitAutograd")
_common.LIBRARY.impl("norm_linear_grad_input", _default_grad_input, "CompositeExplicitAutograd")
_common.LIBRARY.impl("norm_linear_grad_weight", _default_grad_weight, "CompositeExplicitAutograd")


class _PartitionedNormLinear(torch.autograd.Function):
    """Forward on all of `full`; grad_input on the live part, [start, start + its width), only."""

    @staticmethod
    def forward(
        ctx,
        live: Tensor,
        full: Tensor,
        norm_weight: Tensor | None,
        norm_bias: Tensor | None,
        weight: Tensor,
        bias: Tensor | None,
        eps: float,
        start: int,
        backend: str,
    ):
        ctx.eps, ctx.start, ctx.stop, ctx.backend = eps, start, start + live.size(-1), backend
        dtype = _wide_dtype(full.dtype)
        gain, shift = (None if parameter is None else parameter.to(dtype) for parameter in (norm_weight, norm_bias))
        with _common.no_autocast(weight.device.type):
            normalized, mean, rstd = torch.native_layer_norm(full.to(dtype), full.shape[-1:], gain, shift, eps)
            output = _common.run("linear", backend, normalized.to(weight.dtype), weight, bias)
        needs_input, _, needs_gain, _, needs_weight, *_ = ctx.needs_input_grad
        data = (live, full, mean, rstd) if needs_input or needs_gain or needs_weight else (None,) * 4
        ctx.save_for_backward(*data, output if needs_input else None, norm_weight, norm_bias, weight, bias)
        return output

    @staticmethod
    def backward(ctx, grad_output: Tensor):
        saved = ctx.saved_tensors  # once: activation checkpointing gives them no second time
        live, full, mean, rstd, output, norm_weight, norm_bias, weight, bias = saved
        needs_input, _, needs_gain, needs_shift, needs_weight, needs_bias, *_ = ctx.needs_input_grad
        if _common.creating_graph() and live is not None:
            return _differentiable_backward(ctx, saved, grad_output)
        backend = "aten" if _common.creating_graph() else ctx.backend
        grad_input = grad_gain = grad_shift = grad_weight = None
        sums: Any = None
        with _common.no_autocast(weight.device.type):
            if needs_input and full.size(-1) == 1:
                grad_input = torch.zeros_like(live)  # one channel normalises to a constant
            elif needs_input:
                given = (output, full, mean, rstd, norm_weight, norm_bias, weight, bias, ctx.start, ctx.stop)
                grad_input = _common.run("norm_linear_grad_input", backend, grad_output, *given)
            if needs_gain or needs_weight:
                product, sums = _common.run("norm_linear_grad_weight", backend, grad_output, full, mean, rstd)
                if needs_gain:
                    grad_gain = (weight * product).sum(0).to(norm_weight.dtype)
                if needs_weight:
                    grad_weight = product if norm_weight is None else product * norm_weight
                    grad_weight = grad_weight if norm_bias is None else torch.addr(grad_weight, sums, norm_bias)
                    grad_weight = grad_weight.to(weight.dtype)
            elif needs_shift or needs_bias:
                sums = _column_sum(grad_output, _wide_dtype(grad_output.dtype))
            if needs_shift:
                grad_shift = (weight.t().to(sums.dtype) @ sums).to(norm_bias.dtype)
        grad_bias = sums.to(bias.dtype) if needs_bias else None
        return grad_input, None, grad_gain, grad_shift, grad_weight, grad_bias, None, None, None


def _differentiable_backward(ctx, saved: tuple[Tensor, ...], grad_output: Tensor):
    """Only stock operators can be differentiated again."""
    live, full, *_, norm_weight, norm_bias, weight, bias = saved
    given = (live, full, norm_weight, norm_bias, weight, bias)
    # Views: a parameter may be a function of another one, whose gradient is not the one wanted here.
    views: list[Any] = [None if tensor is None else tensor.view_as(tensor) for tensor in given]
    wanted = [view for view, needs_grad in zip(views, ctx.needs_input_grad, strict=False) if needs_grad]
    with _common.no_autocast(weight.device.type):
        output = oracle.partitioned_norm_linear(
            views[0], *views[2:], eps=ctx.eps, start=ctx.start, stop=ctx.stop, full=views[1]
        )
    grads = iter(torch.autograd.grad(output, wanted, grad_output, create_graph=True))
    return *(next(grads) if needs_grad else None for needs_grad in ctx.needs_input_grad[: len(given)]), None, None, None


def partitioned_norm_linear(
    input: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    eps: float = 1e-5,
    start: int,
    stop: int,
    reference: bool = True,
    full: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """LayerNorm, then linear, whose backward computes grad_input only for channels [start, stop).

    Equivalent to: ``F.linear(F.layer_norm(y, (C,), norm_weight, norm_bias, eps), weight, bias)`` with
    ``y = torch.cat([x[..., :start].detach(), x[..., start:stop], x[..., stop:].detach()], -1)``

    Args:
        input: (..., C); or, with `full`, its live part (..., stop - start).
        norm_weight, norm_bias: (C,) or None, the normalisation's.
        weight: (out_features, C).
        bias: (out_features,).
        eps: added to the variance.
        start, stop: half-open channel range, 0 <= start <= stop <= C.
        reference: True: channels outside the slice are read, without gradient (the paper's feature referencing). False:
            they read as zero, and the normalisation still runs over all C channels.
        full: (..., C), the data of all channels; never receives gradient. Then grad_input is narrow,
            (..., stop - start), and nothing is zero-filled.
        backend: "reference", "aten", or, of fp32, bf16 and fp16, "cpp", "triton". None or "auto" picks, of those
            dtypes: as the linear on the CPU, where "cpp" is the linear's matrix products, the rest stock; on CUDA
            triton where the tuned table of the GPU says that it wins on this shape. Else aten.

    Returns:
        (..., out_features), dtype of weight. Under autocast the normalisation computes in float32 and the linear in
        autocast's dtype, as stock.

    Backward: grad_input is exactly 0 outside the slice, every element written; the parameters' gradients are full.
    Saves the input, two numbers a row and, if the input needs a gradient, the output: do not write into it.
    Cost of grad_input: 2 * rows * out_features * (stop - start) FLOPs instead of 2 * rows * out_features * C.

    Raises:
        ValueError: a slice out of range, shapes that do not match, tensors on several devices, an unknown backend.
        TypeError: integer, complex or mixed dtypes.
        RuntimeError: a requested backend that is not there, or that has no kernel for the dtype.
    """
    normed = {"input": input, "full": full, "norm_weight": norm_weight, "norm_bias": norm_bias}
    is_autocast = isinstance(weight, Tensor) and _common.is_autocast(weight.device.type)
    _common.check_tensors(NAME, same_dtype=not is_autocast, **normed, weight=weight, bias=bias)
    input, full, norm_weight, norm_bias = _common.autocast(*normed.values(), wide=True)  # type: ignore[assignment]
    weight, bias = _common.autocast(weight, bias)  # type: ignore[assignment]
    _check_shapes(input, full, norm_weight, norm_bias, weight, start, stop)

    data, num_live = input if full is None else full, stop - start
    chosen = choice.linear_backend(
        NAME, "norm_linear_grad_input", data, weight, weight.dtype, num_live, weight.size(1), backend
    )
    if chosen == "reference":
        affine = (norm_weight, norm_bias, weight, bias)
        with _common.no_autocast(weight.device.type):
            return oracle.partitioned_norm_linear(
                input, *affine, eps=eps, start=start, stop=stop, reference=reference, full=full
            )
    live, full = _common.live_and_full(input, full, start, stop, -1)
    if not reference:
        full = oracle.live_slice(full, start, stop, False, -1)
    return _PartitionedNormLinear.apply(live, full, norm_weight, norm_bias, weight, bias, eps, start, chosen)


def _check_shapes(
    input: Tensor,
    full: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    weight: Tensor,
    start: int,
    stop: int,
) -> None:
    data = input if full is None else full
    if weight.dim() != 2 or data.dim() < 1 or data.size(-1) != weight.size(1):
        raise ValueError(
            f"{NAME}: expected input (..., C) and weight (out_features, C), "
            f"got {'input' if full is None else 'full'} {tuple(data.shape)} and weight {tuple(weight.shape)}."
        )
    for name, parameter in (("norm_weight", norm_weight), ("norm_bias", norm_bias)):
        if parameter is not None and parameter.shape != (weight.size(1),):
            raise ValueError(f"{NAME}: expected {name} of shape ({weight.size(1)},), got {tuple(parameter.shape)}.")
    _common.check_slice(NAME, start, stop, weight.size(1), "C")
    if full is not None:
        _common.check_live(NAME, input, full, start, stop, -1)
