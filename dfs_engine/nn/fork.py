"""Where a feature goes to its two readers, the deeper path and the exit, in each variant."""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from dfs_engine.checks import check_choice
from dfs_engine.nn.apart import Leaves
from dfs_engine.nn.reading import Columns, Reading
from dfs_engine.partition import EXIT_GRADIENTS, ChannelSlice, Partition, check_beta, fork_gradient
from dfs_engine.reference import live_slice
from dfs_engine.runtime.backend import check_backend

VARIANTS = ("dense", "detach", "split", "dfs")
# Those whose readers get the live part beside the whole feature.
SLICED_VARIANTS = ("split", "dfs")


class Fork(nn.Module):
    """Sends a feature to the deeper path and to the exit (paper sections 3.2 and 3.3). Has no parameters.

    Args:
        beta: share of channels that the deeper path trains, in [0, 1].
        variant: "dense" (no split), "detach" (published cat + detach on stock autograd), "split" (two stock calls a
            layer), "dfs" (this engine). All but "dense" compute the same gradients.
        reference: whether each reader looks at the other's part (True) or reads zero there (False).
        exit_gradient: "own": the exit trains f- only; "whole": all of f.
        dim: channel axis, 1 for images, -1 for tokens.
        backend: of the ops, in the dfs variant.
    """

    leaves: Leaves | None = None
    """Where it is set, blocks that can do so make both parts of a feature apart (see `nn.apart`)."""

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
        if self.variant == "dense" or (self.reference and self._is_exported()):
            return (feature,), (feature,)
        if self.variant in SLICED_VARIANTS:
            num_shared, exit_start = self.live_channels(feature.size(self.dim))
            full, shared, live = fork_gradient(feature, num_shared, exit_start, self.dim)
            return (shared, full, self.columns(0)), (live, full, self.columns(exit_start))
        parts = Partition(feature.size(self.dim), self.beta)
        exit_live = parts.exit_live(self.exit_gradient, self.reference)
        return (self._detach(feature, parts.shared),), (self._detach(feature, exit_live),)

    @contextlib.contextmanager
    def apart(self) -> Iterator[Leaves]:
        """Within, forward passes make both parts of a feature apart; gives their leaves."""
        self.leaves = Leaves()
        try:
            yield self.leaves
        finally:
            self.leaves = None

    def _is_exported(self) -> bool:
        """Whether torch.export makes a graph, for inference: with referencing, a split changes gradients alone.

        Raises:
            RuntimeError: in training mode, since the graph would hold other gradients: it keeps no autograd.Function.
        """
        if not torch.compiler.is_exporting():
            return False
        if self.training and self.variant in SLICED_VARIANTS:
            raise RuntimeError(
                f"torch.export: expected a model in evaluation mode, got one of variant={self.variant!r} in training "
                "mode. Call model.eval() first; to export for training, use variant='detach'."
            )
        return not self.training

    def live_channels(self, num_channels: int) -> tuple[int, int]:
        """(num_shared, exit_start): the deeper path trains [0, num_shared), the exit [exit_start, num_channels)."""
        parts = Partition(num_channels, self.beta)
        return parts.num_shared, parts.exit_live(self.exit_gradient, self.reference).start

    def columns(self, start: int) -> Columns:
        """Of a live part that starts at this channel."""
        return Columns(start, self.reference, self.dim)

    def _detach(self, feature: Tensor, columns: ChannelSlice) -> Tensor:
        if columns.width == feature.size(self.dim):
            return feature
        return live_slice(feature, *columns, self.reference, self.dim)

    def extra_repr(self) -> str:
        return (
            f"beta={self.beta}, variant={self.variant}, reference={self.reference}, exit_gradient={self.exit_gradient}"
        )
