"""PCGrad, "projecting conflicting gradients" (Yu et al., Gradient Surgery for Multi-Task Learning, NeurIPS 2020)."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dfs_engine.checks import check_choice
from dfs_engine.gradients import ExitGradients
from dfs_engine.methods.combining import CombiningMethod, check_shares
from dfs_engine.models import MultiExitModel

REDUCTIONS = ("sum", "mean", "port")


@dataclass(frozen=True, kw_only=True)
class PCGradConfig:
    """What becomes of the projected gradients (used with method pcgrad)."""

    reduction: str = "sum"
    """sum (the paper's), mean, or port: the mean for weights that every exit reaches and the sum for the others, as the
    public PyTorch port does, and with it the published multi-exit baseline."""
    include_heads: bool = False
    """Project the gradients of the exits' own classifiers too, as that baseline does."""

    def __post_init__(self) -> None:
        check_choice("pcgrad.reduction", self.reduction, REDUCTIONS)


class PCGrad(CombiningMethod):
    """Takes from each exit's gradient what points against another exit's (algorithm 1 of the paper).

    For each i: ``d_i = g_i``; for each j != i in a random order, where ``d_i . g_j < 0``:
    ``d_i = d_i - (d_i . g_j / ||g_j||^2) g_j``. The update is ``sum_i d_i``.

    The order is drawn from torch's global generator, which a run's seed sets and its checkpoints keep.
    """

    def __init__(self, config: PCGradConfig | None = None) -> None:
        self.config = config or PCGradConfig()
        super().__init__(self.config.include_heads)

    def weights(self, gramian: Tensor) -> Tensor:
        num_exits = len(gramian)
        orders = [torch.randperm(num_exits).tolist() for _ in range(num_exits)]
        weights = projected_weights(gramian, orders)
        return weights / num_exits if self.config.reduction == "mean" else weights

    def combine(self, gradients: ExitGradients) -> None:
        super().combine(gradients)
        if self.config.reduction != "port":
            return
        num_exits = len(gradients.rows)
        columns = zip(gradients.parameters, gradients.is_head, gradients.num_reaching(), strict=True)
        for parameter, is_head, num_reaching in columns:
            if parameter.grad is not None and num_reaching == num_exits and (self.include_heads or not is_head):
                parameter.grad /= num_exits


def projected_weights(gramian: Tensor, orders: Sequence[Sequence[int]]) -> Tensor:
    """PCGrad's update as a weighted sum of the gradients.

    Args:
        gramian: (K, K) float64 on the CPU.
        orders: for each i, the order in which to go through the others; i itself may be in it.

    Returns:
        (K,) float64.
    """
    total = torch.zeros_like(gramian[0])
    for index, order in enumerate(orders):
        coefficients = torch.zeros_like(total)
        coefficients[index] = 1
        for other in order:
            product = gramian[other] @ coefficients
            if other != index and product < 0:
                coefficients[other] -= product / gramian[other, other]
        total += coefficients
    return total


def create_pcgrad(model: MultiExitModel, config: PCGradConfig | None = None) -> PCGrad:
    """The method for `model`, whose surgery it has to make sense with."""
    check_shares("pcgrad", model)
    return PCGrad(config)
