"""BYOT, "be your own teacher": the deepest exit teaches the others (Zhang et al., ICCV 2019; TPAMI 2021).

In the journal code's form, which the published DFS uses too: soft cross entropy without the factor T^2, and the L2
norm, not squared, of the difference of features over the whole batch. Which features, the family says:

- ResNet, as published: each exit's own last feature, which its linear layer reads. So this loss trains what the exit
  trains, of a split feature f- only.
- VGG, as published: each block's whole feature, pooled to 4x4 (`vgg7_64`) or 1x1 (`vgg16_64`) pixels, adapters without
  bias. Here f+ is trained too, as `exit_gradient="whole"` would.
- MSDNet, ViT, BERT, of which nothing is published: as ResNet. The published MSDNet hands out these features, but trains
  without distillation and has no adapters.
- `attach_exits`: each named module's output, averaged over its positions.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dfs_engine.checks import check_choice, check_numbers
from dfs_engine.methods.method import Method
from dfs_engine.models import MultiExitModel
from dfs_engine.models.multi_exit import FEATURES, Distillation


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
    fd_skip: bool = False
    """Leave the second deepest exit out of that distance, as BYOT's own code does, and the published DFS does not."""
    features: str | None = None
    """Compare exits (each exit's own last feature) or blocks (the features that are split). Default: the family's."""

    def __post_init__(self) -> None:
        check_numbers(self, "byot.", {"[0, 1]": ("alpha",), "> 0": ("temperature",), ">= 0": ("lam",)})
        if self.features is not None:
            check_choice("byot.features", self.features, FEATURES)


class BYOT(Method):
    """The deepest exit K teaches every other exit k its distribution and, through an adapter A_k, its feature.

    ``loss = CE(z_K) + sum_{k<K} (1 - alpha) CE(z_k) + alpha XE(softmax(z_K / T), z_k / T) + lam ||A_k(F_k) - F_K||``

    XE is the cross entropy with a soft target. z_K and F_K carry no gradient where they teach.

    Args:
        widths: numbers in each exit's F_k, shallow to deep (see `feature_widths`).
        config: the weights; None: the published ones.
        distillation: what F_k is; `config.features` goes before its `features`.
    """

    def __init__(
        self, widths: Sequence[int], config: ByotConfig | None = None, distillation: Distillation | None = None
    ) -> None:
        super().__init__()
        self.config = config or ByotConfig()
        self.distillation = distillation or Distillation()
        if self.config.lam > 0:
            self.needs_features = self.config.features or self.distillation.features
        *shallow, deepest = widths
        self.adapters = nn.ModuleList(
            nn.Linear(width, deepest, self.distillation.bias) for width in shallow if self.needs_features
        )
        if self.config.fd_skip and self.adapters:
            self.adapters[-1].requires_grad_(False)

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
            for distance in self.distances(features):
                loss = loss + config.lam * distance
        return loss

    def distances(self, features: Sequence[Tensor]) -> list[Tensor]:
        """How far each shallow exit's adapted feature is from the deepest one's, over the whole batch.

        Args:
            features: of the model, with `return_features=self.needs_features`.
        """
        *shallow, deepest = (_flat(feature, self.distillation.size) for feature in features)
        pairs = list(zip(self.adapters, shallow, strict=True))
        if self.config.fd_skip:
            del pairs[-1]
        gaps = [adapter(feature) - deepest.detach() for adapter, feature in pairs]
        return [gap.square().sum() if self.config.squared else torch.linalg.vector_norm(gap) for gap in gaps]


def _flat(feature: Tensor, size: int) -> Tensor:
    """(N, C, H, W), pooled to size x size, tokens (N, T, C), averaged, or (N, D), as it is: (N, D)."""
    if feature.dim() == 2:
        return feature
    if feature.dim() == 3:
        return feature.mean(1)
    if size == 1:
        return feature.mean((2, 3))
    height, width = feature.shape[2:]
    if height % size == width % size == 0:  # on a GPU the gradient of the other one is not deterministic
        return F.avg_pool2d(feature, (height // size, width // size)).flatten(1)
    return F.adaptive_avg_pool2d(feature, size).flatten(1)


@torch.no_grad()
def feature_widths(model: MultiExitModel, features: str | None = None) -> list[int]:
    """Numbers in what BYOT compares of each exit, from a run on one sample; `model` stays as it is.

    Args:
        features: "exits" or "blocks"; None: the family's.
    """
    probe = copy.deepcopy(model).eval()
    _, found = probe(model.example_input(), return_features=features or model.distillation.features)
    return [_flat(feature, model.distillation.size).size(1) for feature in found]


def create_byot(model: MultiExitModel, config: ByotConfig | None = None) -> BYOT:
    """The method for `model`, with its family's form of feature distillation."""
    if model.num_classes == 1:
        raise ValueError(
            "method: expected joint for a regression, got byot, which compares distributions over classes."
        )
    config = config or ByotConfig()
    return BYOT(feature_widths(model, config.features), config, model.distillation)
