"""CAGrad, "conflict-averse gradient descent" (Liu et al., NeurIPS 2021)."""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from dfs_engine.checks import check_choice, check_numbers
from dfs_engine.methods.combining import CombiningMethod, check_shares
from dfs_engine.models import MultiExitModel

SCALES = ("mean", "sum")
RESCALES = (0, 1, 2)
# Of the barrier, relative to the gradients' mean square: the first and the last.
_FIRST_BARRIER, _LAST_BARRIER = 1.0, 1e-11
# The least smoothing of the norm, relative to the gradients' root mean square: it changes a norm of 1 by 5e-13.
_LEAST_NORM = 1e-6


@dataclass(frozen=True, kw_only=True)
class CAGradConfig:
    """How far the update goes from the mean gradient, and its scale (used with method cagrad)."""

    c: float = 0.4
    """Radius of the ball around the mean gradient, relative to its norm; 0 is the mean itself. The published
    multi-exit baseline has 0.5."""
    scale: str = "sum"
    """sum (times the number of exits, as the official code for supervised tasks does) or mean."""
    rescale: int = 1
    """0 (the paper's update), 1 (divided by 1 + c^2, as the official code does) or 2 (by 1 + c)."""
    include_heads: bool = False
    """Combine the gradients of the exits' own classifiers too, as the published multi-exit baseline does."""

    def __post_init__(self) -> None:
        check_numbers(self, "cagrad.", {">= 0": ("c",)})
        check_choice("cagrad.scale", self.scale, SCALES)
        if self.rescale not in RESCALES:
            raise ValueError(f"cagrad.rescale: expected 0, 1 or 2, got {self.rescale!r}.")


class CAGrad(CombiningMethod):
    """The direction near the mean gradient that serves the worst-served exit best (equations 3 to 5 of the paper).

    ``max_d min_k g_k . d`` subject to ``||d - g_0|| <= c ||g_0||``, with ``g_0 = mean_k g_k``. By duality
    ``d = g_0 + c ||g_0|| / ||g_w|| g_w``, where ``g_w = sum_k w_k g_k`` and w minimises
    ``g_w . g_0 + c ||g_0|| ||g_w||`` on the simplex.
    """

    def __init__(self, config: CAGradConfig | None = None) -> None:
        self.config = config or CAGradConfig()
        super().__init__(self.config.include_heads)

    def weights(self, gramian: Tensor) -> Tensor:
        c = self.config.c
        weights = torch.from_numpy(conflict_averse_weights(gramian.numpy(), c))
        if self.config.scale == "sum":
            weights = weights * len(gramian)
        return weights / (1.0, 1 + c**2, 1 + c)[self.config.rescale]


def conflict_averse_weights(gramian: np.ndarray, c: float) -> np.ndarray:
    """CAGrad's d as a weighted sum of the gradients: ``1 / K + c ||g_0|| / ||g_w|| w``.

    Args:
        gramian: (K, K) float64.

    Returns:
        (K,) float64. Where the gradients can cancel (g_w = 0), some d of the ball that none of them points against.
    """
    num_exits = len(gramian)
    mean = np.full(num_exits, 1 / num_exits)
    size = np.trace(gramian) / num_exits
    if size <= 0 or c == 0:
        return mean
    scaled = gramian / size
    radius = c * np.sqrt(max(mean @ scaled @ mean, 0))
    dual = simplex_weights(scaled, scaled @ mean, radius)
    return mean + radius / _norm(scaled, dual, _LEAST_NORM) * dual


def simplex_weights(gramian: np.ndarray, linear: np.ndarray, radius: float) -> np.ndarray:
    """The w that minimises ``linear . w + radius sqrt(w' gramian w)`` on the simplex.

    By Newton's method on the problem with a logarithmic barrier, which shrinks from round to round; so does a smoothing
    of the root at zero. On return the value is within about K * 1e-11 of the least one, or 1e-6 where that is at zero
    norm.

    Args:
        gramian: (K, K) float64, positive semidefinite, with a diagonal of mean 1.
        linear: (K,). radius: >= 0.
    """
    weights = np.full(len(linear), 1 / len(linear))
    barrier = _FIRST_BARRIER
    while barrier >= _LAST_BARRIER:
        problem = _Barrier(gramian, linear, radius, barrier)
        for _ in range(50):
            step, decrement = problem.newton_step(weights)
            if decrement <= 1e-6 * barrier:
                break
            weights = problem.move(weights, step)
            weights /= weights.sum()
        barrier /= 10
    return weights


class _Barrier(NamedTuple):
    """``linear . w + radius sqrt(w' gramian w + e^2) - barrier sum_k log w_k``, for w > 0 of sum 1."""

    gramian: np.ndarray
    linear: np.ndarray
    radius: float
    barrier: float

    def norm(self, weights: np.ndarray) -> float:
        return _norm(self.gramian, weights, max(self.barrier, _LEAST_NORM))

    def gradient(self, weights: np.ndarray) -> np.ndarray:
        slope = self.radius * (self.gramian @ weights) / self.norm(weights)
        return self.linear + slope - self.barrier / weights

    def newton_step(self, weights: np.ndarray) -> tuple[np.ndarray, float]:
        """Newton's step within the plane of sum 1, and its product with the negative gradient."""
        norm, product = self.norm(weights), self.gramian @ weights / self.norm(weights)
        hessian = self.radius / norm * (self.gramian - np.outer(product, product))
        # In units of the weights, or those at the edge would spoil the condition; and projected to the plane at once,
        # as the Hessian is zero along the weights themselves. What rounding makes negative is zero.
        plane = np.eye(len(weights)) - np.outer(weights, weights) / (weights @ weights)
        values, vectors = np.linalg.eigh(plane @ (hessian * np.outer(weights, weights)) @ plane)
        gradient = self.gradient(weights)
        along = vectors.T @ (plane @ (gradient * weights)) / (values.clip(min=0) + self.barrier)
        step = -weights * (plane @ (vectors @ along))
        return step, float(-gradient @ step)

    def move(self, weights: np.ndarray, step: np.ndarray) -> np.ndarray:
        """The weights after as much of the step as leaves them positive and does not go far past the least value.

        It looks at slopes, which say where that is to more digits than the values do.
        """
        towards_edge = step < 0
        length = min(1.0, 0.99 * float(np.min(-weights[towards_edge] / step[towards_edge], initial=np.inf)))
        slope = self.gradient(weights) @ step
        for _ in range(40):
            moved = weights + length * step
            if self.gradient(moved) @ step <= 0.5 * abs(slope):
                break
            length /= 2
        return moved


def _norm(gramian: np.ndarray, weights: np.ndarray, least: float) -> float:
    return float(np.sqrt(max(weights @ gramian @ weights, 0) + least**2))


def create_cagrad(model: MultiExitModel, config: CAGradConfig | None = None) -> CAGrad:
    """The method for `model`, whose surgery it has to make sense with."""
    check_shares("cagrad", model)
    return CAGrad(config)
