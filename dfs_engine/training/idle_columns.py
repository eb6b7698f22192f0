"""Weight columns that no exit trains, kept out of weight decay."""

from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from dfs_engine.models import MultiExitModel


def hold_idle_columns(optimizer: Optimizer, model: MultiExitModel) -> None:
    """Keeps the optimizer's steps from changing `model.idle_columns()`, which get no gradient: nor are they decayed.

    The published code has them as layers of their own, without gradients, which an optimizer passes over. Here they are
    part of a parameter whose gradient is zero there, which weight decay would shrink. Whatever the optimizer does with
    decay, they come out of its step as they went in; what it keeps of them for itself means nothing.

    Args:
        optimizer: of the model's parameters, and any others.
        model: asked once, now.
    """
    idle = list(model.idle_columns())
    if not idle:
        return
    kept: list[Tensor] = []

    @torch.no_grad()
    def keep(*_: Any) -> None:
        kept[:] = [columns.of(weight, 1).clone() for weight, columns in idle]

    @torch.no_grad()
    def put_back(*_: Any) -> None:
        for (weight, columns), values in zip(idle, kept, strict=True):
            columns.of(weight, 1).copy_(values)

    optimizer.register_step_pre_hook(keep)
    optimizer.register_step_post_hook(put_back)
