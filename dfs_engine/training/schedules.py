"""The learning rate as a function of the step alone, so that a resumed run needs no state for it."""

import math
from bisect import bisect_right
from dataclasses import dataclass

from torch.optim import Optimizer

from dfs_engine.training.config import OptimConfig


@dataclass(frozen=True)
class Schedule:
    """Learning rate of every optimizer step, counted from 0."""

    config: OptimConfig
    steps_per_epoch: int
    """Of one pass over the data."""
    epochs: int
    num_phases: int = 1
    """Passes over the data in an epoch, which all have the same rates."""

    def __call__(self, step: int) -> float:
        """The learning rate of `step`. Warm-up is linear and reaches lr with its last step."""
        config = self.config
        step = step // (self.steps_per_epoch * self.num_phases) * self.steps_per_epoch + step % self.steps_per_epoch
        warmup_steps = round(config.warmup_epochs * self.steps_per_epoch)
        if step < warmup_steps:
            return config.lr * (step + 1) / warmup_steps
        if config.schedule == "multistep":
            return config.lr * config.gamma ** bisect_right(config.milestones, step // self.steps_per_epoch)
        progress = (step - warmup_steps) / (self.epochs * self.steps_per_epoch - warmup_steps)
        progress = min(progress, 1.0)
        left = 1 - progress if config.schedule == "linear" else (1 + math.cos(math.pi * progress)) / 2
        return config.lr * left

    def apply(self, optimizer: Optimizer, step: int) -> None:
        """Sets the learning rate of `step`."""
        for group in optimizer.param_groups:
            group["lr"] = self(step)
