"""How a feature reaches its two readers, the deeper path and the exit, in each variant.

A reader gets a plain tensor where stock autograd does the routing (`dense`, `detach`), else a `Reading`: the live part,
which carries the gradient, beside what it may only look at. Layers are stock modules, so that all variants share one
state_dict.
"""

from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dfs_engine.backend import check_backend
from dfs_engine.names import check_choice
from dfs_engine.nn.channel_order import ChannelOrder
from dfs_engine.ops import _common, live_mean, partitioned_conv2d, partitioned_linear
from dfs_engine.partition import EXIT_GRADIENTS, ChannelSlice, Partition, check_beta, fork_gradient
from dfs_engine.reference import live_slice

VARIANTS = ("dense", "detach", "split", "dfs")


class SlicedReading(NamedTuple):
    """What a reader sees in the `dfs` variant: ops that compute the gradient of the live part alone.

    Attributes:
        live: channels [start, start + live width), with gradient. full: all channels, without.

    Layers are applied with their own weight, or with the one that is given in its place.
    """

    live: Tensor
    full: Tensor
    start: int
    reference: bool
    backend: str | None

    def conv2d(self, layer: nn.Conv2d, weight: Tensor | None = None) -> Tensor:
        geometry = (layer.stride, layer.padding, layer.dilation, layer.groups)
        return partitioned_conv2d(
            self.live,
            layer.weight if weight is None else weight,
            layer.bias,
            *geometry,  # type: ignore[arg-type]
            start=self.start,
            stop=self.start + self.live.size(1),
            reference=self.reference,
            full=self.full,
            backend=self.backend,
        )

    def linear(self, layer: nn.Linear, weight: Tensor | None = None) -> Tensor:
        return partitioned_linear(
            self.live,
            layer.weight if weight is None else weight,
            layer.bias,
            start=self.start,
            stop=self.start + self.live.size(-1),
            reference=self.reference,
            full=self.full,
            backend=self.backend,
        )

    def global_avg_pool(self) -> "SlicedReading":
        if self.live.dim() == 2:  # the producer has averaged it already
            return self
        live, full = live_mean(self.live, self.full, self.start)
        return self._replace(live=live, full=full)

    def map_channels(self, function: Callable[[Tensor], Tensor]) -> "SlicedReading":
        return self._replace(live=function(self.live), full=function(self.full))

    def add(self, branch: Tensor, dim: int) -> Tensor:
        return _Add.apply(self.live, self.full, branch, self.start, self.reference, dim)

    def multiply(self, factor: Tensor, dim: int) -> Tensor:
        if self.reference:
            return _Multiply.apply(self.live, self.full, factor, self.start, dim)
        columns = ChannelSlice(self.start, self.start + self.live.size(dim))
        return live_slice(self.live * columns.of(factor, dim), *columns, False, dim, self.full)

    def whole(self, dim: int) -> Tensor:
        stop = self.start + self.live.size(dim)
        if stop - self.start == self.full.size(dim):
            return self.live
        return live_slice(self.live, self.start, stop, self.reference, dim, self.full)


class TwoCallReading(NamedTuple):
    """What a reader sees in the `split` variant: the published VGG's two stock calls, on the live part and on the rest.

    Attributes:
        live: channels of the slice, with gradient. rest: the others, detached; None without referencing.
        columns: the slice, of num_channels in all.
    """

    live: Tensor
    rest: Tensor | None
    columns: ChannelSlice
    num_channels: int

    def conv2d(self, layer: nn.Conv2d, weight: Tensor | None = None) -> Tensor:
        if layer.groups != 1:
            return self._grouped_conv2d(layer)
        geometry = (layer.stride, layer.padding, layer.dilation)
        weight = layer.weight if weight is None else weight
        output = F.conv2d(self.live, self.columns.of(weight, 1), layer.bias, *geometry)  # type: ignore[arg-type]
        if self.rest is None:
            return output
        return output + F.conv2d(self.rest, _others(weight, self.columns), None, *geometry)  # type: ignore[arg-type]

    def _grouped_conv2d(self, layer: nn.Conv2d) -> Tensor:
        """Two calls where a group ends with the slice, as in a depthwise convolution; else one call on all channels."""
        per_group = layer.weight.size(1)
        border = self.columns.stop if self.columns.start == 0 else self.columns.start
        if self.rest is None or border % per_group != 0:
            return layer(self.whole(1))
        parts = (self.live, self.rest) if self.columns.start == 0 else (self.rest, self.live)
        groups = [part.size(1) // per_group for part in parts]
        rows = [count * (layer.out_channels // layer.groups) for count in groups]
        weights = layer.weight.split(rows)
        biases = (None, None) if layer.bias is None else layer.bias.split(rows)
        geometry = (layer.stride, layer.padding, layer.dilation)
        calls = zip(parts, weights, biases, groups, strict=True)
        return torch.cat([F.conv2d(*call[:3], *geometry, call[3]) for call in calls], 1)  # type: ignore[arg-type]

    def linear(self, layer: nn.Linear, weight: Tensor | None = None) -> Tensor:
        weight = layer.weight if weight is None else weight
        output = F.linear(self.live, self.columns.of(weight, 1), layer.bias)
        return output if self.rest is None else output + F.linear(self.rest, _others(weight, self.columns))

    def global_avg_pool(self) -> "TwoCallReading":
        return self.map_channels(lambda part: part.mean((2, 3)))

    def map_channels(self, function: Callable[[Tensor], Tensor]) -> "TwoCallReading":
        return self._replace(live=function(self.live), rest=None if self.rest is None else function(self.rest))

    def add(self, branch: Tensor, dim: int) -> Tensor:
        return self.whole(dim) + branch

    def multiply(self, factor: Tensor, dim: int) -> Tensor:
        return self.whole(dim) * factor

    def whole(self, dim: int) -> Tensor:
        rest = self.rest
        if rest is None:
            shape = list(self.live.shape)
            shape[dim] = self.num_channels - self.columns.width
            rest = self.live.new_zeros(shape)
        return torch.cat([self.live, rest] if self.columns.start == 0 else [rest, self.live], dim)


def two_call_reading(feature: Tensor, columns: ChannelSlice, reference: bool, dim: int) -> TwoCallReading:
    """`feature` for a reader of `columns`, a slice that starts at 0 or ends at the last channel."""
    num_channels, rest = feature.size(dim), None
    if reference:
        others = ChannelSlice(columns.stop, num_channels) if columns.start == 0 else ChannelSlice(0, columns.start)
        rest = others.of(feature, dim).detach()
    return TwoCallReading(columns.of(feature, dim), rest, columns, num_channels)


def _others(weight: Tensor, columns: ChannelSlice) -> Tensor:
    """The weight columns outside a slice that starts at 0 or ends at the last column."""
    return weight[:, columns.stop :] if columns.start == 0 else weight[:, : columns.start]


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


class ConcatReading(NamedTuple):
    """What a reader sees of a dense concatenation (see `nn.concat`): the channels lie in another order than a layer's.

    Attributes:
        stored: the channels as they lie. order: which ones of the layer's input they are.
    """

    stored: SlicedReading | TwoCallReading
    order: ChannelOrder

    def conv2d(self, layer: nn.Conv2d) -> Tensor:
        if layer.groups != 1:  # its weight has no column for each channel
            return layer(self.whole(1))
        return self.stored.conv2d(layer, self.order.columns_of(layer.weight))

    def linear(self, layer: nn.Linear) -> Tensor:
        return self.stored.linear(layer, self.order.columns_of(layer.weight))

    def global_avg_pool(self) -> "ConcatReading":
        return self._replace(stored=self.stored.global_avg_pool())

    def map_channels(self, function: Callable[[Tensor], Tensor]) -> "ConcatReading":
        return self._replace(stored=self.stored.map_channels(function))

    def add(self, branch: Tensor, dim: int) -> Tensor:
        return self.whole(dim) + branch

    def multiply(self, factor: Tensor, dim: int) -> Tensor:
        return self.whole(dim) * factor

    def whole(self, dim: int) -> Tensor:
        return self.order.restore(self.stored.whole(dim), dim)


Reading: TypeAlias = Tensor | SlicedReading | TwoCallReading | ConcatReading


def apply_layer(layer: nn.Conv2d | nn.Linear, input: Reading) -> Tensor:
    """The stock layer on whatever its reader got; padding_mode must be "zeros" and padding numeric for a sliced one."""
    if isinstance(input, Tensor):
        return layer(input)
    return input.conv2d(layer) if isinstance(layer, nn.Conv2d) else input.linear(layer)


def global_avg_pool(input: Reading) -> Reading:
    """(N, C, H, W) -> (N, C)."""
    return input.mean((2, 3)) if isinstance(input, Tensor) else input.global_avg_pool()


def map_channels(function: Callable[[Tensor], Tensor], input: Reading) -> Reading:
    """What a reader of `function(feature)` gets, for a function that treats every channel alone and keeps their axis.

    Without referencing, what it makes of zeros has to be zeros.
    """
    return function(input) if isinstance(input, Tensor) else input.map_channels(function)


def add(input: Reading, branch: Tensor, dim: int = -1) -> Tensor:
    """A residual sum, of which only the reading's own slice gets gradient; without referencing the rest adds zero.

    Args:
        input: what the layer read, C channels along `dim`.
        branch: whole, of the feature's shape.

    Returns:
        The feature's shape, in the dtype that stock addition promotes to.
    """
    return input + branch if isinstance(input, Tensor) else input.add(branch, dim)


def multiply(input: Reading, factor: Tensor, dim: int = -1) -> Tensor:
    """A product, e.g. with a gate, of which only the reading's own slice gets gradient; `factor` gets all of its own.

    Without referencing the rest reads as zero, and so does the product there.

    Args:
        input: what the layer read, C channels along `dim`.
        factor: of the feature's shape.

    Returns:
        The feature's shape, in the dtype that stock multiplication promotes to.
    """
    return input * factor if isinstance(input, Tensor) else input.multiply(factor, dim)


def read_like(tensor: Tensor, input: Reading) -> Reading:
    """A tensor that is not split, for the layer behind one that read `input`: in the `dfs` variant by the same ops."""
    if not isinstance(input, SlicedReading):
        return tensor
    return input._replace(live=tensor, full=tensor.detach(), start=0, reference=True)


def whole(input: Reading, dim: int = -1) -> Tensor:
    """All channels as one tensor, for a layer that cannot be cut in two: the published `cat` + `detach`."""
    return input if isinstance(input, Tensor) else input.whole(dim)


class Fork(nn.Module):
    """Sends a feature to the deeper path and to the exit (paper sections 3.2 and 3.3). Has no parameters.

    Args:
        beta: share of channels that the deeper path trains, in [0, 1].
        variant: "dense" (no split), "detach" (published cat + detach on stock autograd), "split" (two stock calls),
            "dfs" (this engine). All but "dense" compute the same gradients.
        reference: whether each reader looks at the other's part (True) or reads zero there (False).
        exit_gradient: "own": the exit trains f- only; "whole": all of f.
        dim: channel axis, 1 for images, -1 for tokens.
        backend: of the ops, in the dfs variant.
    """

    def __init__(
        self,
        beta: float = 0.5,
        variant: str = "dfs",
        *,
        reference: bool = True,
        exit_gradient: str = "own",
        dim: int = 1,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        self.beta = check_beta(beta)
        self.variant = check_choice("variant", variant, VARIANTS)
        self.exit_gradient = check_choice("exit_gradient", exit_gradient, EXIT_GRADIENTS)
        self.reference, self.dim, self.backend = reference, dim, check_backend(backend)

    def forward(self, feature: Tensor) -> tuple[Reading, Reading]:
        """Returns (what the deeper path reads, what the exit reads)."""
        if self.variant == "dense":
            return feature, feature
        if self.variant == "dfs":
            num_shared, exit_start = self.live_channels(feature.size(self.dim))
            full, shared, live = fork_gradient(feature, num_shared, exit_start, self.dim)
            return (
                SlicedReading(shared, full, 0, self.reference, self.backend),
                SlicedReading(live, full, exit_start, self.reference, self.backend),
            )
        parts = Partition(feature.size(self.dim), self.beta)
        exit_live = parts.exit_live(self.exit_gradient, self.reference)
        return self._read(feature, parts.shared), self._read(feature, exit_live)

    def whole(self, input: Tensor) -> Reading:
        """A tensor that is not split, for a reader of the `dfs` variant."""
        return SlicedReading(input, input.detach(), 0, True, self.backend)

    def live_channels(self, num_channels: int) -> tuple[int, int]:
        """(num_shared, exit_start): the deeper path trains [0, num_shared), the exit [exit_start, num_channels)."""
        parts = Partition(num_channels, self.beta)
        return parts.num_shared, parts.exit_live(self.exit_gradient, self.reference).start

    def _read(self, feature: Tensor, columns: ChannelSlice) -> Reading:
        if columns.width == feature.size(self.dim):
            return feature
        if self.variant == "detach" or columns.width == 0:
            return live_slice(feature, *columns, self.reference, self.dim)
        return two_call_reading(feature, columns, self.reference, self.dim)

    def extra_repr(self) -> str:
        return (
            f"beta={self.beta}, variant={self.variant}, reference={self.reference}, exit_gradient={self.exit_gradient}"
        )
