"""Joint training: one backward of the sum of all exits' losses, every weight 1 (DSN, MSDNet, DFS)."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from dfs_engine.methods.method import Method


def exit_losses(logits: Sequence[Tensor], target: Tensor) -> Tensor:
    """Mean cross entropy of each exit.

    Args:
        logits: (N, num_classes) for each exit, shallow to deep.
        target: (N,) class indices.

    Returns:
        (num_exits,), in the order of `logits`.
    """
    return torch.stack([F.cross_entropy(exit_logits, target) for exit_logits in logits])


class Joint(Method):
    """``loss = sum_k cross_entropy(logits[k], target)``."""

    def forward(self, logits: Sequence[Tensor], target: Tensor, features: Sequence[Tensor] | None = None) -> Tensor:
        return exit_losses(logits, target).sum()
