"""Meta-GF (Sun et al., Meta-GF: Training Dynamic-Depth Neural Networks Harmoniously, ECCV 2022)."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dfs_engine.checks import check_choice, check_numbers
from dfs_engine.methods.combining import check_shares
from dfs_engine.methods.fusing import FusingMethod
from dfs_engine.methods.learned import Learned, Tensors
from dfs_engine.methods.method import Input, Step
from dfs_engine.models import MultiExitModel

GRANULARITIES = ("tensor", "channel")
# r of the published MSDNet and ResNet with 7 exits.
_PUBLISHED_AUX = (1.0, 1.0, 0.6, 0.6, 0.75, 0.9, 1.0)


@dataclass(frozen=True, kw_only=True)
class MetaGFConfig:
    """How exits are trained apart and fused (used with method meta_gf)."""

    aux: float = 0.1
    """Weight of the other exits' losses in an exit's pass."""
    aux_weights: tuple[float, ...] = ()
    """The other exits' weights among themselves, shallow to deep. Default: with 7 exits the published 1, 1, .6, .6,
    .75, .9, 1, else 1."""
    meta_lr: float = 0.1
    """Learning rate of the fusion's Adam; a tenth of it from half of the epochs on."""
    ema_old: float = 0.9
    """Share that the fusion weights keep of what they were before the epoch. The published VGG has 0.1."""
    granularity: str = "tensor"
    """A fusion weight for each exit and weight tensor (the sigmoid of a number that starts at 1), or, as the published
    VGG, each exit and output channel (the exponential of one that starts at 5 for the last exit, 1 for others)."""
    temperature: float = 1.0
    """What that exponential multiplies the number by; the published value is not known."""
    scale_by_tau: bool = False
    """Multiply an exit's loss in its own pass by its weight in the fusion's loss, as the published SDN nets do."""
    leak_momentum: bool = False
    """An exit's pass goes on with the momentum of the pass before, as in the published code, instead of with none."""
    freeze_v_after_first_epoch: bool = False
    """Learn the fusion weights in the first epoch only, which is what the published MSDNet and ResNet scripts come to:
    from then on their optimizer has hold of tensors that nothing reads."""

    def __post_init__(self) -> None:
        ranges = {">= 0": ("aux", "meta_lr", "temperature"), "[0, 1]": ("ema_old",)}
        check_numbers(self, "meta_gf.", ranges)
        check_choice("meta_gf.granularity", self.granularity, GRANULARITIES)


class MetaGF(FusingMethod):
    """Exits are trained apart for a pass each; ``sum_k s(v_k) theta_k / sum_k s(v_k)`` is fused of every weight tensor.

    k runs over the exits that reach a tensor; one that a single exit reaches is that exit's. v is learned in the last
    pass, by ``sum_{k<K} tau_k l_k + l_K`` of the fused net, on the training data as in the published code, with
    ``tau_k = min(m_k, .01 + m_k epoch / epochs)``. m_k rises evenly to .9, which for 7 exits are the published numbers.
    Then ``v = (1 - ema_old) v + ema_old v_before``.

    Args:
        model: to be trained by this method.
    """

    def __init__(self, model: MultiExitModel, config: MetaGFConfig | None = None) -> None:
        self.config = config or MetaGFConfig()
        super().__init__(
            model,
            aux=self.config.aux,
            aux_weights=aux_weights(self.config.aux_weights, model.num_exits),
            leak_momentum=self.config.leak_momentum,
        )
        self.meta_lr = self.config.meta_lr
        self._tau = [1.0] * model.num_exits
        self.shared = [name for name in self.names if len(self.reaching[name]) > 1]
        self.fusion = Learned([self._first(model.get_parameter(name), self.reaching[name]) for name in self.shared])
        self.before = Tensors(list(self.fusion.values))

    def _first(self, parameter: Tensor, exits: Sequence[int]) -> Tensor:
        """v at the start: (exits, 1), or (exits, channels)."""
        if self.config.granularity == "tensor":
            return parameter.new_ones(len(exits), 1)
        first = parameter.new_ones(len(exits), parameter.size(0))
        first[[index for index, exit in enumerate(exits) if exit == self.num_exits - 1]] = 5
        return first

    def forward(self, logits: Sequence[Tensor], target: Tensor, features: Sequence[Tensor] | None = None) -> Tensor:
        loss = super().forward(logits, target)
        return loss * self._tau[self.exit] if self.config.scale_by_tau else loss

    def train_exit(self, step: Step, input: Input, target: Tensor) -> Tensor:
        self._tau = loss_weights(self.num_exits, step.epoch, step.epochs)
        return super().train_exit(step, input, target)

    def fused(self, learned: Sequence[Tensor]) -> dict[str, Tensor]:
        own = [self.own_of(exit) for exit in range(self.num_exits)]
        fused = {name: own[self.reaching[name][0]][name] for name in self.names if len(self.reaching[name]) == 1}
        for name, v in zip(self.shared, learned, strict=True):
            values = torch.stack([own[exit][name] for exit in self.reaching[name]])
            weights = v.sigmoid() if self.config.granularity == "tensor" else (self.config.temperature * v).exp()
            weights = weights / weights.sum(0)
            fused[name] = (weights.view(*weights.shape, *[1] * (values.dim() - 2)) * values).sum(0)
        return fused

    def fusion_loss(self, step: Step, losses: Sequence[Tensor]) -> Tensor:
        weights = loss_weights(self.num_exits, step.epoch, step.epochs)
        return torch.stack([weight * loss for weight, loss in zip(weights, losses, strict=True)]).sum()

    def is_learning(self, step: Step) -> bool:
        return step.epoch == 0 or not self.config.freeze_v_after_first_epoch

    def fusion_lr(self, step: Step) -> float:
        return self.meta_lr * (0.1 if step.epoch >= step.epochs / 2 else 1)

    def begin_phase(self, step: Step) -> None:
        super().begin_phase(step)
        if step.phase == self.num_exits:
            self.before.copy_(list(self.fusion.values))

    def end_phase(self, step: Step) -> None:
        super().end_phase(step)
        if step.phase == self.num_exits:
            for v, before in zip(self.fusion.values, self.before, strict=True):
                v.lerp_(before, self.config.ema_old)


def aux_weights(given: Sequence[float], num_exits: int) -> tuple[float, ...]:
    """r of an exit's pass, of each exit."""
    if given and len(given) != num_exits:
        raise ValueError(
            f"meta_gf.aux_weights: expected {num_exits} numbers, one for each exit, got {list(given)}. "
            "Leave it out for its default."
        )
    if given:
        return tuple(given)
    return _PUBLISHED_AUX if num_exits == len(_PUBLISHED_AUX) else (1.0,) * num_exits


def loss_weights(num_exits: int, epoch: int, epochs: int) -> list[float]:
    """tau of each exit in the loss that the fusion is learned by; 1 of the last one."""
    most = [0.9 * (index + 1) / (num_exits - 1) for index in range(num_exits - 1)]
    return [*(min(m, 0.01 + m * epoch / epochs) for m in most), 1.0]


def create_meta_gf(model: MultiExitModel, config: MetaGFConfig | None = None) -> MetaGF:
    """The method for `model`, whose surgery it has to make sense with."""
    check_shares("meta_gf", model)
    return MetaGF(model, config)
