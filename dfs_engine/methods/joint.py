"""Joint training: one backward of the sum of all exits' losses, every weight 1 (DSN, MSDNet, DFS)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from dfs_engine.methods.method import Method
from dfs_engine.nn import exit_loss


def exit_losses(logits: Sequence[Tensor], target: Tensor) -> Tensor:
    """Mean loss of each exit.

    Args:
        logits: (N, num_classes) for each exit, shallow to deep.
        target: (N,) class indices, or numbers (see `dfs_engine.nn.exit_loss`).

    Returns:
        (num_exits,), in the order of `logits`.
    """
    return torch.stack([exit_loss(exit_logits, target) for exit_logits in logits])


class Joint(Method):
    """``loss = sum_k exit_loss(logits[k], target)``."""

    def forward(self, logits: Sequence[Tensor], target: Tensor, features: Sequence[Tensor] | None = None) -> Tensor:
        return exit_losses(logits, target).sum()
