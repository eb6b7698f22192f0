"""Which channels of a feature the deeper path trains, and which the exit (paper section 3.2, feature partitioning).

The only place that turns `beta` into channels.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from dfs_engine.checks import check_choice, check_no_transform

EXIT_GRADIENTS = ("own", "whole")


class ChannelSlice(NamedTuple):
    """Half-open channel range [start, stop)."""

    start: int
    stop: int

    @property
    def width(self) -> int:
        return self.stop - self.start

    def of(self, tensor: Tensor, dim: int) -> Tensor:
        """The slice of `tensor` along `dim`, as a view."""
        return tensor.narrow(dim, self.start, self.width)


def check_beta(beta: float) -> float:
    """Returns `beta` as a float.

    Raises:
        TypeError: not a number. ValueError: NaN or outside [0, 1].
    """
    if isinstance(beta, bool) or not isinstance(beta, (int, float)):
        raise TypeError(f"beta: expected a number in [0, 1], got {beta!r} of type {type(beta).__name__}.")
    if math.isnan(beta) or not 0 <= beta <= 1:
        raise ValueError(
            f"beta: expected a number in [0, 1], got {beta}. It is the share of channels that deeper exits train."
        )
    return float(beta)


class Partition:
    """The two parts of a feature with `num_channels` channels: f+ = [0, k) and f- = [k, C), k = round(beta * C).

    `round` is Python's, half to even, as in the published code.
    """

    def __init__(self, num_channels: int, beta: float) -> None:
        self.num_channels = num_channels
        self.beta = check_beta(beta)
        self.num_shared = round(self.beta * num_channels)

    @property
    def shared(self) -> ChannelSlice:
        """f+, trained by the deeper path."""
        return ChannelSlice(0, self.num_shared)

    @property
    def exit(self) -> ChannelSlice:
        """f-, trained by the exit."""
        return ChannelSlice(self.num_shared, self.num_channels)

    def exit_live(self, exit_gradient: str = "own", reference: bool = True) -> ChannelSlice:
        """The channels that the exit's gradient trains.

        `"whole"` is the published routing of MSDNet and ViT: the exit trains all of f, except at beta = 1 where it
        trains nothing, and except without referencing, where it sees only f-.
        """
        check_choice("exit_gradient", exit_gradient, EXIT_GRADIENTS)
        whole = exit_gradient == "whole" and reference and self.beta < 1
        return ChannelSlice(0, self.num_channels) if whole else self.exit


class PartitionedFeature(NamedTuple):
    """A feature on its way to two readers. A NamedTuple, so that torch.compile, autocast and DDP take it as it is.

    Attributes:
        full: all C channels, without gradient: what both readers may look at.
        shared: f+ = channels [0, k), with the deeper path's gradient.
        exit: the channels that the exit trains ([k, C), or all with `exit_gradient="whole"`), with the exit's gradient.
    """

    full: Tensor
    shared: Tensor
    exit: Tensor


def dense_memory_format(tensor: Tensor) -> torch.memory_format:
    """channels_last if the tensor is dense in that order and in no other, else contiguous."""
    is_channels_last = tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if is_channels_last and not tensor.is_contiguous() else torch.contiguous_format


def expect_absent_gradients(ctx) -> None:
    """In a Function's forward: its backward gets None, not zeros of full size, for outputs that nothing differentiates.

    torch.compile leaves such zeros out by itself, and cannot trace the call.
    """
    if not torch.compiler.is_compiling():
        ctx.set_materialize_grads(False)


class _Partition(torch.autograd.Function):
    """Hands out views; the backward joins the two gradients in one write, without zero-filling."""

    @staticmethod
    def forward(ctx, feature: Tensor, num_shared: int, exit_start: int, dim: int) -> tuple[Tensor, Tensor, Tensor]:
        ctx.dim, ctx.num_shared, ctx.exit_start = dim, num_shared, exit_start
        # As a dense tensor in the feature's order of strides: it may itself be a slice of channels.
        ctx.shape, ctx.memory_format = feature.shape, dense_memory_format(torch.empty_like(feature, device="meta"))
        # Aliases, because a Function may not return its input and a view of it side by side.
        full = feature.detach()
        ctx.mark_non_differentiable(full)
        expect_absent_gradients(ctx)
        num_channels = feature.size(dim)
        return full, feature.narrow(dim, 0, num_shared), feature.narrow(dim, exit_start, num_channels - exit_start)

    @staticmethod
    def backward(ctx, _, grad_shared: Tensor | None, grad_exit: Tensor | None):
        dim, num_shared = ctx.dim, ctx.num_shared
        num_own, num_both = ctx.shape[dim] - num_shared, num_shared - ctx.exit_start
        given = grad_exit if grad_shared is None else grad_shared
        if given is None:
            return None, None, None, None
        grad = torch.empty(ctx.shape, dtype=given.dtype, device=given.device, memory_format=ctx.memory_format)
        if grad_shared is None:
            grad.narrow(dim, 0, num_shared).zero_()
        else:
            grad.narrow(dim, 0, num_shared).copy_(grad_shared)
        if grad_exit is None:
            grad.narrow(dim, num_shared, num_own).zero_()
            return grad, None, None, None
        if num_both > 0:
            # exit_gradient="whole": the two overlap, and are added there only.
            grad.narrow(dim, ctx.exit_start, num_both).add_(grad_exit.narrow(dim, 0, num_both))
        grad.narrow(dim, num_shared, num_own).copy_(grad_exit.narrow(dim, num_both, num_own))
        return grad, None, None, None


def partition(
    feature: Tensor, beta: float, *, dim: int = 1, exit_gradient: str = "own", reference: bool = True
) -> PartitionedFeature:
    """Splits the gradient of a feature between the deeper path and the exit; its values stay whole.

    Equivalent to: ``PartitionedFeature(f.detach(), f[:, :k], f[:, k:])`` with ``k = round(beta * f.size(1))``

    Args:
        feature: any shape, C channels along `dim`.
        beta: share of channels that the deeper path trains, in [0, 1].
        dim: 1 for images (N, C, H, W), -1 for tokens (N, T, C).
        exit_gradient: "own": the exit trains f- only; "whole": the exit trains all of f.
        reference: whether the readers look at each other's part; decides only what "whole" means (see
            `Partition.exit_live`).
    """
    parts = Partition(feature.size(dim), beta)
    return fork_gradient(feature, parts.num_shared, parts.exit_live(exit_gradient, reference).start, dim)


def fork_gradient(feature: Tensor, num_shared: int, exit_start: int, dim: int = 1) -> PartitionedFeature:
    """`partition` by channel numbers: the deeper path trains [0, num_shared), the exit [exit_start, C)."""
    check_no_transform("partition")
    return PartitionedFeature(*_Partition.apply(feature, num_shared, exit_start, dim))
