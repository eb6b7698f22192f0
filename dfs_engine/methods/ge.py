"""GE, gradient equilibrium (Li et al., Improved Techniques for Training Adaptive Deep Networks, ICCV 2019).

Counting exits i from 0 to K - 1: behind block i the feature x becomes ``z = R(x, 1 / (K - i))``, which the exit reads;
the deeper path reads ``R(z, K - i - 1)``. R(x, a) is x, with a times the gradient.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from dfs_engine.methods.combining import check_shares
from dfs_engine.methods.joint import Joint
from dfs_engine.models import MultiExitModel
from dfs_engine.models.attach import AttachedExit, AttachedModel
from dfs_engine.nn import flat, readings


@dataclass(frozen=True, kw_only=True)
class GEConfig:
    """Which tensors are rescaled (used with method ge)."""

    all_scales: bool = False
    """Rescale every scale that an MSDNet's deeper layers read, not the coarsest alone, which is what the official code
    does. The other families have one."""


class _Rescale(torch.autograd.Function):
    """R(x, factor) of the paper."""

    @staticmethod
    def forward(ctx, input: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return input.detach()

    @staticmethod
    def backward(ctx, grad_output: Tensor):
        return grad_output * ctx.factor, None


def rescale_gradient(input: Tensor, factor: float) -> Tensor:
    """`input` as it is, of any shape and dtype; what gets `factor` times the gradient that arrives."""
    if not (torch.is_grad_enabled() and input.requires_grad):
        return input
    return cast(Tensor, _Rescale.apply(input, factor))


class _Hook:
    """A hook of a module that a feature goes into (or, of `attach_exits`, comes out of)."""

    def __init__(self, factor: float, all_readings: bool = False) -> None:
        self.factor, self.all_readings = factor, all_readings

    def before(self, module: nn.Module, args: tuple) -> tuple:
        """Forward pre-hook: rescales the live part of the last reading, or of all."""
        found = readings(args)
        first = 0 if self.all_readings else len(found) - 1
        return flat(
            (rescale_gradient(reading[0], self.factor), *reading[1:]) if index >= first else reading
            for index, reading in enumerate(found)
        )

    def after(self, module: nn.Module, args: Any, output: Tensor) -> Tensor:
        """Forward hook."""
        return rescale_gradient(output, self.factor)


class GE(Joint):
    """The sum of the exits' losses, whose gradients are averaged instead of added in every block.

    In a chain block j (from 1) gets ``1 / (K - j + 1)`` times the gradient of each of the K - j + 1 exits behind it.
    The classifiers get their plain gradients. In an MSDNet only the coarsest scale is rescaled. With surgery each
    exit's gradient has the same factor, in the channels that it trains.

    The rescaling is done by hooks of the model, which stay until `remove()`; forward values are not changed.

    Args:
        model: to be trained by this method.
    """

    def __init__(self, model: MultiExitModel, config: GEConfig | None = None) -> None:
        super().__init__()
        self.config = config or GEConfig()
        _remove_hooks(model)
        self._handles: list[Any] = []
        num_exits = model.num_exits
        for index in range(num_exits - 1):
            to_exit, to_deeper = 1 / (num_exits - index), (num_exits - index - 1) / (num_exits - index)
            if isinstance(model, AttachedModel):
                exit = cast(AttachedExit, model.exits[index])
                self._handles.append(exit.register_forward_hook(_Hook(to_deeper).after))
                self._before(exit.head, to_exit)
            else:
                self._before(model.exits[index], to_exit)
                self._before(model.blocks[index + 1], to_deeper)

    def _before(self, module: nn.Module, factor: float) -> None:
        self._handles.append(module.register_forward_pre_hook(_Hook(factor, self.config.all_scales).before))

    def remove(self) -> None:
        """Takes the hooks off the model, which another method may then train."""
        for handle in self._handles:
            handle.remove()


def _remove_hooks(model: MultiExitModel) -> None:
    """Those of a `GE` before this one: together they would rescale twice."""
    for module in model.modules():
        for hooks in (module._forward_hooks, module._forward_pre_hooks):
            for key in [key for key, hook in hooks.items() if _is_ours(hook)]:
                del hooks[key]


def _is_ours(hook: Callable) -> bool:
    return isinstance(getattr(hook, "__self__", None), _Hook)


def create_ge(model: MultiExitModel, config: GEConfig | None = None) -> GE:
    """The method for `model`, whose surgery it has to make sense with."""
    check_shares("ge", model)
    return GE(model, config)
