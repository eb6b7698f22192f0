"""Nash-MTL, multi-task learning as a bargaining game (Navon et al., ICML 2022)."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dfs_engine.checks import check_numbers
from dfs_engine.gradients import ExitGradients
from dfs_engine.methods.combining import CombiningMethod, check_shares, unknown_weights
from dfs_engine.models import MultiExitModel

# Over the gradients' root mean square norm: exits without a gradient, or whose gradients cancel, would get a weight
# without bound.
_MAX_WEIGHT = 1e3
# Added to the diagonal of the Gramian, relative to its mean, for the same exits.
_RIDGE = 1e-12


@dataclass(frozen=True, kw_only=True)
class NashMTLConfig:
    """Length of the update, and how often the game is played (used with method nash_mtl)."""

    max_norm: float = 1.0
    """The blocks' combined gradient is scaled down to this norm; it is sqrt(number of exits) before, so that at 1 every
    step has norm 1. 0 is off."""
    update_weights_every: int = 1
    """Steps between two bargains. In the others one backward of the losses with the last weights does."""

    def __post_init__(self) -> None:
        check_numbers(self, "nash_mtl.", {">= 0": ("max_norm",), ">= 1": ("update_weights_every",)})


class NashMTL(CombiningMethod):
    """The Nash bargaining solution: alpha > 0 with ``(G alpha)_k = 1 / alpha_k`` (claim 3.1 of the paper).

    The update of the blocks is ``sum_k alpha_k g_k``, scaled down to `max_norm`; the classifiers get
    ``alpha_k`` times the gradients of their losses, as in the official code. In exact arithmetic
    ``||sum_k alpha_k g_k||^2`` is the number of exits.

    Args:
        num_exits: of the model.

    Attributes:
        alpha: (num_exits,) float64 buffer, the last weights; ones before the first step.
        num_steps: () int64 buffer, steps taken.
    """

    alpha: Tensor
    num_steps: Tensor

    def __init__(self, num_exits: int, config: NashMTLConfig | None = None) -> None:
        super().__init__()
        self.config = config or NashMTLConfig()
        self.register_buffer("alpha", torch.ones(num_exits, dtype=torch.float64))
        self.register_buffer("num_steps", torch.zeros((), dtype=torch.int64))

    def forward(
        self, logits: Sequence[Tensor], target: Tensor, features: Sequence[Tensor] | None = None
    ) -> tuple[Tensor, ...]:
        """Each exit's mean loss in a step that bargains; in another their weighted sum, as one loss."""
        losses = super().forward(logits, target)
        if self._bargains():
            return losses
        stacked = torch.stack(losses)
        return ((self.alpha.to(stacked.dtype) * stacked).sum(),)

    def _bargains(self) -> bool:
        return self.num_steps.item() % self.config.update_weights_every == 0

    def combine(self, gradients: ExitGradients) -> None:
        gramian = gradients.gramian()
        if not gramian.isfinite().all():
            gradients.write(unknown_weights(gramian), unknown_weights(gramian))
            return
        if self._bargains():
            weights = self.weights(gramian)
            self.alpha.copy_(weights)
        else:
            weights = torch.ones(1, dtype=torch.float64)
        norm = (weights @ gramian @ weights).clamp(min=0).sqrt().item()
        max_norm = self.config.max_norm
        gradients.write(weights * (max_norm / norm if 0 < max_norm < norm else 1), weights)
        self.num_steps += 1

    def weights(self, gramian: Tensor) -> Tensor:
        return torch.from_numpy(bargaining_weights(gramian.numpy(), self.alpha.double().cpu().numpy()))


def bargaining_weights(gramian: np.ndarray, start: np.ndarray | None = None) -> np.ndarray:
    """The alpha > 0 with ``alpha * (gramian @ alpha) = 1``.

    It is where ``alpha' gramian alpha / 2 - sum log alpha`` is least, which Newton's method finds.

    Where that asks for weights over 1000 / (root mean square norm of the gradients), so much is added to the Gramian's
    diagonal as keeps the norm of alpha below sqrt(K) times that; the update then is shorter than sqrt(K).

    Args:
        gramian: (K, K) float64, positive semidefinite.
        start: (K,) > 0, where to begin. None: ones.

    Returns:
        (K,) float64. Ones if all gradients are zero.
    """
    num_exits = len(gramian)
    size = np.trace(gramian) / num_exits
    if size <= 0:
        return np.ones(num_exits)
    scaled, start = gramian / size, np.ones(num_exits) if start is None else start
    alpha = _solve(scaled + _RIDGE * np.eye(num_exits), start)
    if alpha.max() > _MAX_WEIGHT:
        alpha = _solve(scaled + _MAX_WEIGHT**-2 * np.eye(num_exits), start)
    return alpha / np.sqrt(size)


def _solve(gramian: np.ndarray, start: np.ndarray) -> np.ndarray:
    """Newton's method, damped as for self-concordant functions, which needs no line search."""
    alpha = start * np.sqrt(len(gramian) / (start @ gramian @ start))  # as long as the solution
    for _ in range(500):
        # In units of alpha, where the Hessian is at least 1.
        slope = alpha * (gramian @ alpha) - 1
        step = np.linalg.solve(gramian * np.outer(alpha, alpha) + np.eye(len(gramian)), slope)
        decrement = float(np.sqrt(max(step @ slope, 0)))
        alpha = alpha * (1 - step / (1 + decrement if decrement > 0.25 else 1))
        if decrement < 1e-12:
            break
    return alpha


def create_nash_mtl(model: MultiExitModel, config: NashMTLConfig | None = None) -> NashMTL:
    """The method for `model`, whose surgery it has to make sense with."""
    check_shares("nash_mtl", model)
    return NashMTL(model.num_exits, config)
