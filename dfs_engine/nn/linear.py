"""`nn.Linear` that trains through a slice of its input features."""

from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn.modules import module as _module

from dfs_engine.nn.partitioned import Partitioned
from dfs_engine.nn.reading import Columns, Reading, apply_layer
from dfs_engine.ops import partitioned_linear, partitioned_norm_linear


class Normalisation(NamedTuple):
    """A LayerNorm's parameters, (C,) or None, and what it adds to the variance."""

    weight: Tensor | None
    bias: Tensor | None
    eps: float


class PartitionedLinear(Partitioned, nn.Linear):
    """Drop-in for `nn.Linear` whose backward computes grad_input only for features [start, stop).

    Same parameters, initialisation and state_dict keys as `nn.Linear`.

    Equivalent to: ``nn.Linear`` on
    ``torch.cat([x[..., :start].detach(), x[..., start:stop], x[..., stop:].detach()], -1)``

    Args:
        in_features, out_features, bias, device, dtype: as `nn.Linear`.
        start, stop: half-open range of features that receive gradient; stop=None means in_features.
        reference: whether features outside the slice are read (True) or read as zero (False).
        backend: "reference", "aten", "cpp", "triton"; None or "auto" picks.
    """

    stock, arguments = nn.Linear, ("in_features", "out_features")

    def forward(
        self,
        input: Tensor,
        full: Tensor | None = None,
        columns: Columns | None = None,
        norm: Normalisation | None = None,
        *,
        rows: slice = slice(None),
    ) -> Tensor:
        """(..., in_features) -> (..., out_features).

        Args:
            input: all features, or, with `full`, the live ones alone (..., live).
            full: all features, without gradient.
            columns: which features of `full` are live; then the layer's own slice does not matter.
            norm: what a `PartitionedLayerNorm` in front has left to do here.
            rows: of the weight: the output features that are wanted.
        """
        # Slices of everything are left out: they would cost a node of the graph.
        weight: Tensor = self.weight
        bias: Tensor | None = self.bias
        if rows != slice(None):
            weight, bias = weight[rows], None if bias is None else bias[rows]
        if full is None or columns is None:
            columns, stop = Columns(self.start, self.reference), self.stop
        else:
            stop = columns.start + input.size(-1)
            weight = weight if columns.order is None else columns.order.columns_of(weight)
        sliced: dict[str, Any] = {
            "start": columns.start, "stop": stop, "reference": columns.reference, "full": full, "backend": self.backend,
        }  # fmt: skip
        if norm is None:
            return partitioned_linear(input, weight, bias, **sliced)
        return partitioned_norm_linear(input, norm.weight, norm.bias, weight, bias, eps=norm.eps, **sliced)

    @classmethod
    def from_linear(cls, linear: nn.Linear, **sliced: Any) -> "PartitionedLinear":
        """The same layer, partitioned as `start`, `stop`, `reference` and `backend` say.

        Shares the Parameter objects, so that an optimizer keeps working.
        """
        return cls._from_stock(linear, **sliced)


def apply_linears(layers: Sequence[nn.Module], reading: Reading) -> list[Tensor]:
    """Layers on the same reading, e.g. query, key and value; plain ones of this engine in one product."""
    if len(reading) == 1 or not all(map(_is_plain, layers)):
        return [apply_layer(layer, reading) for layer in layers]
    first = cast(PartitionedLinear, layers[0])
    live, full, columns = reading
    output = partitioned_linear(
        live,
        torch.cat([cast(Tensor, layer.weight) for layer in layers]),
        None if first.bias is None else torch.cat([cast(Tensor, layer.bias) for layer in layers]),
        start=columns.start,
        stop=columns.start + live.size(-1),
        reference=columns.reference,
        full=full,
        backend=first.backend,
    )
    return list(output.split([cast(int, layer.out_features) for layer in layers], -1))


def _is_plain(layer: nn.Module) -> bool:
    """Whether nobody waits for this layer's own call, and two stock calls a layer were not asked for."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    is_awaited = any(getattr(layer, name) for name in hooks) or _module._has_any_global_hook()
    return type(layer) is PartitionedLinear and layer.backend != "split" and not is_awaited
