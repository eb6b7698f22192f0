"""BYOT, "be your own teacher": the deepest exit teaches the others (Zhang et al., ICCV 2019; TPAMI 2021).

In the journal code's form, which the published DFS uses too: soft cross entropy without the factor T^2, and the L2
norm, not squared, of the difference of pooled features over the whole batch.
"""

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dfs_engine.methods.method import Method
from dfs_engine.models import MultiExitModel


@dataclass(frozen=True, kw_only=True)
class ByotConfig:
    """Weights of BYOT's loss (used with method byot)."""

    alpha: float = 0.3
    """Share of the distillation in a shallow exit's loss; the labels have the rest."""
    temperature: float = 3.0
    """Softens both distributions that distillation compares."""
    t2: bool = False
    """Multiply the distillation by temperature squared."""
    lam: float = 0.03
    """Weight of the distance between features; 0 needs no adapters."""
    squared: bool = False
    """Square that distance."""

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"byot.alpha: expected a number in [0, 1], got {self.alpha}.")
        if not (math.isfinite(self.temperature) and self.temperature > 0):
            raise ValueError(f"byot.temperature: expected a number > 0, got {self.temperature}.")
        if not (math.isfinite(self.lam) and self.lam >= 0):
            raise ValueError(f"byot.lam: expected a number >= 0, got {self.lam}.")


class BYOT(Method):
    """The deepest exit K teaches every other exit k its distribution and, through an adapter A_k, its feature.

    ``loss = CE(z_K) + sum_{k<K} (1 - alpha) CE(z_k) + alpha XE(softmax(z_K / T), z_k / T) + lam ||A_k(F_k) - F_K||``

    XE is the cross entropy with a soft target. z_K and F_K carry no gradient where they teach. F_k is the feature
    averaged over its positions.

    Args:
        widths: channels of each exit's feature, shallow to deep.
        config: the weights; None: the published ones.
    """

    def __init__(self, widths: Sequence[int], config: ByotConfig | None = None) -> None:
        super().__init__()
        self.config = config or ByotConfig()
        self.needs_features = self.config.lam > 0
        *shallow, deepest = widths
        self.adapters = nn.ModuleList(nn.Linear(width, deepest) for width in shallow if self.needs_features)

    def forward(self, logits: Sequence[Tensor], target: Tensor, features: Sequence[Tensor] | None = None) -> Tensor:
        config = self.config
        *shallow, deepest = logits
        taught = (deepest.detach() / config.temperature).softmax(1)
        soft_weight = config.alpha * (config.temperature**2 if config.t2 else 1)
        loss = F.cross_entropy(deepest, target)
        for student in shallow:
            loss = loss + (1 - config.alpha) * F.cross_entropy(student, target)
            loss = loss + soft_weight * F.cross_entropy(student / config.temperature, taught)
        if self.needs_features:
            assert features is not None
            loss = loss + config.lam * self._feature_distance(features)
        return loss

    def _feature_distance(self, features: Sequence[Tensor]) -> Tensor:
        *shallow, deepest = (_pooled(feature) for feature in features)
        gaps = [adapter(feature) - deepest.detach() for adapter, feature in zip(self.adapters, shallow, strict=True)]
        distances = [gap.square().sum() if self.config.squared else torch.linalg.vector_norm(gap) for gap in gaps]
        return torch.stack(distances).sum()


def _pooled(feature: Tensor) -> Tensor:
    """The mean over pixels (N, C, H, W) or tokens (N, T, C): (N, C), as which a feature may come already."""
    if feature.dim() == 2:
        return feature
    return feature.mean((2, 3)) if feature.dim() == 4 else feature.mean(1)


@torch.no_grad()
def feature_widths(model: MultiExitModel) -> list[int]:
    """Channels of each exit's feature, from a run on one sample; `model` stays as it is."""
    probe = copy.deepcopy(model).eval()
    _, features = probe(model.example_input(), return_features=True)
    return [_pooled(feature).size(1) for feature in features]
