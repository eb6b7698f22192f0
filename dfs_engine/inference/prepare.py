"""A model as it is fastest to run where nothing is learned any more."""

import copy
from typing import Any, cast

import torch
from torch import nn

from dfs_engine.models import MultiExitModel
from dfs_engine.nn import ConvAct, can_fix


@torch.no_grad()
def prepare(model: MultiExitModel) -> MultiExitModel:
    """A snapshot of a model for evaluation: the same call, the same outputs up to rounding, less work.

    Batch normalisations are folded into the convolutions before them. Bias, residual, ReLU, and in a VGG block the
    normalisation behind the ReLU, the 2x2 max pool and the exit's average, are computed in one pass with the
    convolution. Weights are brought once into the order that the kernels read, at the first call that needs it: then
    the model holds two or three of them for a convolution, of which Winograd's is four times as large as the weight.

    The model given is neither changed nor shared: it may be trained on, and the snapshot does not see that. The
    snapshot cannot be trained: its parameters ask for no gradient, and an input that does is an error.

    What a layer becomes it says itself, by a method `for_inference()` that returns what takes its place (or itself).
    Convolutions without one that are plain are prepared as they are. Left alone, and right, are subclasses of stock
    layers, layers with hooks, grouped convolutions, and normalisations without running statistics.

    Args:
        model: of any family, in any mode. Of one that `attach_exits` made, what torch.fx can show is folded.

    Returns:
        a model of the same class in eval mode, where the given one is (device and dtype), for `EarlyExit` as well. Call
        it under `torch.inference_mode()`.

    Raises:
        TypeError: no `MultiExitModel`.
    """
    if not isinstance(model, MultiExitModel):
        inner = next((name for name in ("module", "_orig_mod") if hasattr(model, name)), None)
        remedy = f"Give what it wraps, model.{inner}." if inner else "attach_exits makes one of any backbone."
        raise TypeError(f"prepare: expected a MultiExitModel, got model={type(model).__name__}. {remedy}")
    return _replaced(copy.deepcopy(model).eval().requires_grad_(False))


def _replaced(module: nn.Module) -> Any:
    """What takes a module's place, and of what is inside it likewise, the outer ones first."""
    if hasattr(module, "for_inference"):
        module = cast(Any, module).for_inference()
    elif can_fix(module):
        module = ConvAct(module, backend=getattr(module, "backend", None))
    for name, child in module.named_children():
        replaced = _replaced(child)
        if replaced is not child:
            setattr(module, name, replaced)
    return module
