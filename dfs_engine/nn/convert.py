"""Stock layers as this engine's: the same objects with the same Parameters, of another class.

So every reference to a layer and every hook on it holds, and the state_dict is the same.
"""

from typing import Any, cast

from torch import nn

from dfs_engine.nn.conv2d import PartitionedConv2d
from dfs_engine.nn.fork import SLICED_VARIANTS
from dfs_engine.nn.linear import PartitionedLinear
from dfs_engine.nn.norm_act import NormAct2d


def convert_layers(module: nn.Module, variant: str, backend: str | None = None) -> None:
    """Lets the layers of `module` read split features, and in the `dfs` variant run on this engine's kernels.

    Layers of another class than the stock one, subclasses among them, are left alone.

    Args:
        variant: "dfs": convolutions, linear layers and batch normalisations; "split": the first two; others: none,
            because their readers get whole features.
        backend: of the `dfs` variant.
    """
    if variant not in SLICED_VARIANTS:
        return
    for layer in module.modules():
        if type(layer) in (nn.Conv2d, nn.Linear):
            partition_layer(cast(Any, layer), variant=variant, backend=backend)
        elif type(layer) is nn.BatchNorm2d and variant == "dfs":
            layer.__class__ = NormAct2d
            vars(layer)["backend"] = backend


def partition_layer(
    layer: nn.Conv2d | nn.Linear,
    start: int = 0,
    stop: int | None = None,
    *,
    reference: bool = True,
    variant: str = "dfs",
    backend: str | None = None,
) -> None:
    """Lets a stock layer train through a slice of its input alone; None: to its last channel."""
    kind = PartitionedConv2d if isinstance(layer, nn.Conv2d) else PartitionedLinear
    layer.__class__ = kind
    stop = getattr(layer, kind.arguments[0]) if stop is None else stop
    vars(layer).update(start=start, stop=stop, reference=reference, backend="split" if variant == "split" else backend)


def to_stock(layer: Any) -> None:
    """Undoes `partition_layer`."""
    layer.__class__ = layer.stock
    for name in ("start", "stop", "reference", "backend"):
        del vars(layer)[name]


def layers_to_stock(module: nn.Module) -> None:
    """Undoes `convert_layers`."""
    for layer in module.modules():
        if type(layer) in (PartitionedConv2d, PartitionedLinear):
            to_stock(layer)
        elif type(layer) is NormAct2d:
            cast(Any, layer).__class__ = nn.BatchNorm2d
            del vars(layer)["backend"]
