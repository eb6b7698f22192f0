"""What the methods share that combine the exits' gradients by their inner products."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from dfs_engine.gradients import ExitGradients
from dfs_engine.methods.method import Method
from dfs_engine.models import MultiExitModel
from dfs_engine.nn import exit_loss


class PerExitMethod(Method):
    """Each exit's loss has a backward of its own, whose gradient `combine` gets."""

    combines = True
    refuses: Mapping[str, str] = {
        "compile": "a compiled backward computes all exits' gradients at once, and the method needs each exit's own",
        "fp16": "the method's own backwards would go round its loss scaling",
        "processes": "DistributedDataParallel averages the gradient of one loss, not each exit's own",
    }

    def forward(
        self, logits: Sequence[Tensor], target: Tensor, features: Sequence[Tensor] | None = None
    ) -> tuple[Tensor, ...]:
        """Each exit's mean loss."""
        return tuple(exit_loss(exit_logits, target) for exit_logits in logits)


class CombiningMethod(PerExitMethod):
    """The update is ``sum_k weights_k g_k``, with weights that depend on the Gramian ``G[i, j] = g_i . g_j`` alone.

    g_k is the gradient of exit k's loss by what the exits share: the blocks. An exit's classifier gets the plain
    gradient of its own loss.

    Args:
        include_heads: count the classifiers among what is combined: in the Gramian, and in what the weights are for.
    """

    def __init__(self, include_heads: bool = False) -> None:
        super().__init__()
        self.include_heads = include_heads

    def weights(self, gramian: Tensor) -> Tensor:
        """(K,) float64, of the gradients whose (K, K) float64 inner products these are, both on the CPU."""
        raise NotImplementedError

    def combine(self, gradients: ExitGradients) -> None:
        gramian = gradients.gramian(include_heads=self.include_heads)
        weights = self.weights(gramian) if gramian.isfinite().all() else unknown_weights(gramian)
        gradients.write(weights, weights if self.include_heads else None)


def unknown_weights(gramian: Tensor) -> Tensor:
    """NaN: what comes of gradients that are not finite, which the trainer then reports."""
    return torch.full((len(gramian),), float("nan"), dtype=gramian.dtype)


def check_shares(name: str, model: MultiExitModel) -> None:
    """That exits before the last train something that others do too.

    Raises:
        ValueError: a surgery that leaves each of them its classifier alone.
    """
    fork = model.fork
    if fork.variant != "dense" and fork.beta >= 1 and fork.exit_gradient == "own":
        raise ValueError(
            f"method: expected joint with beta=1, variant={fork.variant} and exit_gradient=own, got {name}, which "
            "balances the exits' gradients in what they share: with this surgery no exit but the last trains anything "
            "but its own classifier. Use beta < 1, exit_gradient=whole or variant=dense."
        )
