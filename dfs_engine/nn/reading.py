"""What a layer reads of a feature: the positional arguments of its call, so that hooks and wrappers see tensors.

A reading is `(feature,)` where stock autograd does the routing (variants `dense` and `detach`) or nothing is split,
else `(live, full, columns)`: the part that carries the gradient, beside all channels, which may only be looked at.
"""

import logging
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from dfs_engine.nn.channel_order import ChannelOrder
from dfs_engine.ops import _common, live_mean
from dfs_engine.partition import ChannelSlice
from dfs_engine.reference import live_slice

logger = logging.getLogger(__name__)


class Columns(NamedTuple):
    """Which channels of a feature the live part is.

    Attributes:
        start: the live part's first channel.
        reference: whether the other channels are read (True) or read as zero.
        dim: the channel axis.
        order: which channels of the layer's input lie where (see `nn.concat`); None: as the layer numbers them.
    """

    start: int
    reference: bool = True
    dim: int = 1
    order: ChannelOrder | None = None


Reading: TypeAlias = tuple[Tensor] | tuple[Tensor, Tensor, Columns]

_said: set[str] = set()


def apply_layer(layer: nn.Module, reading: Reading) -> Any:
    """Calls a layer on what it reads.

    One that takes whole features only, a stock one or what a library has put around or in place of one of this engine,
    gets the `cat` + `detach` form: the same gradients.
    """
    if len(reading) == 1 or getattr(layer, "takes_slices", False):
        return layer(*reading)
    say_once(
        f"{type(layer).__module__}.{type(layer).__qualname__} takes whole features only, so it reads a split one as "
        "the detach variant does: the same gradients, nothing saved."
    )
    return layer(whole(reading))


def say_once(text: str) -> None:
    if text not in _said and not torch.compiler.is_compiling():
        _said.add(text)
        logger.warning(text)


def readings(made: tuple) -> list[Reading]:
    """The readings that a tuple holds one after the other, as blocks take and return them."""
    found: list[Reading] = []
    index = 0
    while index < len(made):
        width = 3 if index + 2 < len(made) and isinstance(made[index + 2], Columns) else 1
        found.append(made[index : index + width])
        index += width
    return found


def flat(parts: Iterable[Reading]) -> tuple:
    """The inverse of `readings`."""
    return tuple(item for part in parts for item in part)


def select_samples(made: tuple, rows: Tensor) -> tuple:
    """The readings in `made`, of the samples at `rows` alone; what is no tensor stays as it is.

    Args:
        made: readings one after the other, whose tensors have a row (dimension 0) for each sample.
        rows: int64 (n,).
    """
    return flat(_select(reading, rows) for reading in readings(made))


def _select(reading: Reading, rows: Tensor) -> Reading:
    if len(reading) == 1:
        return (select_rows(*reading, rows),)
    live, full, columns = reading
    full = select_rows(full, rows)
    return full.narrow(columns.dim, columns.start, live.size(columns.dim)), full, columns


def select_rows(value: Any, rows: Tensor) -> Any:
    """``value.index_select(0, rows)`` in the memory format of `value`, which that does not keep."""
    if not isinstance(value, Tensor):
        return value
    is_channels_last = value.dim() == 4 and not value.is_contiguous() and value.stride(1) == 1
    if is_channels_last:
        return value.movedim(1, -1).index_select(0, rows).movedim(-1, 1)
    return value.index_select(0, rows)


def global_avg_pool(reading: Reading) -> Reading:
    """(N, C, H, W) -> (N, C); averages that the feature's producer made pass as they are."""
    if reading[0].dim() == 2:
        return reading
    if len(reading) == 1:
        return (reading[0].mean((2, 3)),)
    live, full, columns = reading
    return *live_mean(live, full, columns.start), columns


def map_channels(function: Callable[[Tensor], Tensor], reading: Reading) -> Reading:
    """What a reader of `function(feature)` gets, for a function that treats every channel alone and keeps their axis.

    Without referencing, what it makes of zeros has to be zeros.
    """
    if len(reading) == 1:
        return (function(reading[0]),)
    live, full, columns = reading
    return function(live), function(full), columns


def add(reading: Reading, branch: Tensor) -> Tensor:
    """A residual sum, of which only the reading's own slice gets gradient; without referencing the rest adds zero.

    Args:
        reading: what the layer read, C channels.
        branch: whole, of the feature's shape.

    Returns:
        The feature's shape, in the dtype that stock addition promotes to.
    """
    if len(reading) == 1 or reading[2].order is not None:
        return whole(reading) + branch
    live, full, columns = reading
    return _Add.apply(live, full, branch, columns.start, columns.reference, columns.dim)


def multiply(reading: Reading, factor: Tensor) -> Tensor:
    """A product, e.g. with a gate, of which only the reading's own slice gets gradient; `factor` gets all of its own.

    Without referencing the rest reads as zero, and so does the product there.

    Args:
        reading: what the layer read, C channels.
        factor: of the feature's shape.

    Returns:
        The feature's shape, in the dtype that stock multiplication promotes to.
    """
    if len(reading) == 1 or reading[2].order is not None:
        return whole(reading) * factor
    live, full, (start, reference, dim, _) = reading
    if reference:
        return _Multiply.apply(live, full, factor, start, dim)
    columns = ChannelSlice(start, start + live.size(dim))
    return live_slice(live * columns.of(factor, dim), *columns, False, dim, full)


def whole(reading: Reading) -> Tensor:
    """All channels as one tensor, for what cannot be cut in two: the published `cat` + `detach`."""
    if len(reading) == 1:
        return reading[0]
    live, full, (start, reference, dim, order) = reading
    stop = start + live.size(dim)
    feature = live
    if stop - start < full.size(dim):
        feature = live_slice(live, start, stop, reference, dim, full)
    return feature if order is None else order.restore(feature, dim)


class _Add(torch.autograd.Function):
    """One write; the backward hands out views of what it gets."""

    @staticmethod
    def forward(ctx, live: Tensor, full: Tensor, branch: Tensor, start: int, reference: bool, dim: int) -> Tensor:
        ctx.columns, ctx.dim = ChannelSlice(start, start + live.size(dim)), dim
        ctx.dtypes = live.dtype, branch.dtype
        if reference:
            return full + branch
        output = branch.to(torch.promote_types(live.dtype, branch.dtype), copy=True)
        ctx.columns.of(output, dim).add_(live)
        return output

    @staticmethod
    def backward(ctx, grad_output: Tensor):
        needs_live, _, needs_branch, *_ = ctx.needs_input_grad
        live_dtype, branch_dtype = ctx.dtypes
        grad_live = ctx.columns.of(grad_output, ctx.dim).to(live_dtype) if needs_live else None
        return grad_live, None, grad_output.to(branch_dtype) if needs_branch else None, None, None, None


class _Multiply(torch.autograd.Function):
    """One product; the feature's gradient is computed on its slice alone."""

    @staticmethod
    def forward(ctx, live: Tensor, full: Tensor, factor: Tensor, start: int, dim: int) -> Tensor:
        ctx.columns, ctx.dim = ChannelSlice(start, start + live.size(dim)), dim
        ctx.save_for_backward(live, full, factor)
        return full * factor

    @staticmethod
    def backward(ctx, grad_output: Tensor):
        live, full, factor = ctx.saved_tensors
        columns, dim = ctx.columns, ctx.dim
        needs_live, _, needs_factor, *_ = ctx.needs_input_grad
        grad_live = grad_factor = None
        if needs_live:
            grad_live = (columns.of(grad_output, dim) * columns.of(factor, dim)).to(live.dtype)
        if needs_factor:
            # Differentiated again, the gradient depends on the live part.
            seen = live_slice(live, columns.start, columns.stop, True, dim, full) if _common.creating_graph() else full
            grad_factor = (grad_output * seen).to(factor.dtype)
        return grad_live, None, grad_factor, None, None
