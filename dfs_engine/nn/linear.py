"""`nn.Linear` that trains through a slice of its input features."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dfs_engine.backend import check_backend
from dfs_engine.nn.routing import Reading, SlicedReading, apply_layer
from dfs_engine.ops import _common, partitioned_linear


class PartitionedLinear(nn.Linear):
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

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        start: int = 0,
        stop: int | None = None,
        reference: bool = True,
        backend: str | None = None,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(in_features, out_features, bias, device, dtype)
        self.start, self.stop = start, in_features if stop is None else stop
        self.reference, self.backend = reference, check_backend(backend)
        _common.check_slice("PartitionedLinear", self.start, self.stop, in_features, "in_features")

    def forward(self, input: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features)."""
        return partitioned_linear(
            input,
            self.weight,
            self.bias,
            start=self.start,
            stop=self.stop,
            reference=self.reference,
            backend=self.backend,
        )

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        *,
        start: int = 0,
        stop: int | None = None,
        reference: bool = True,
        backend: str | None = None,
    ) -> "PartitionedLinear":
        """The same layer, partitioned. Shares the Parameter objects, so that an optimizer keeps working."""
        layer = cls(
            linear.in_features,
            linear.out_features,
            linear.bias is not None,
            start=start,
            stop=stop,
            reference=reference,
            backend=backend,
            device="meta",
        )
        return _share_parameters(linear, layer)

    def to_stock(self) -> nn.Linear:
        """The plain `nn.Linear` with the same Parameter objects."""
        return _share_parameters(
            self, nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta")
        )

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, start={self.start}, stop={self.stop}, reference={self.reference}"


def convert_linears(module: nn.Module, backend: str | None = None) -> None:
    """Lets this engine's kernels compute every plain `nn.Linear` inside `module`: the same parameters, whole gradients.

    Layers of another class, subclasses among them, are left alone.
    """
    for name, child in module.named_children():
        if type(child) is nn.Linear:
            setattr(module, name, PartitionedLinear.from_linear(child, backend=backend))
        else:
            convert_linears(child, backend)


def apply_linears(layers: Sequence[nn.Linear], input: Reading) -> list[Tensor]:
    """Stock layers on the same reading, e.g. query, key and value; on a sliced one, one product of stacked weights."""
    if not isinstance(input, SlicedReading):
        return [apply_layer(layer, input) for layer in layers]
    output = partitioned_linear(
        input.live,
        torch.cat([layer.weight for layer in layers]),
        None if layers[0].bias is None else torch.cat([layer.bias for layer in layers]),
        start=input.start,
        stop=input.start + input.live.size(-1),
        reference=input.reference,
        full=input.full,
        backend=input.backend,
    )
    return list(output.split([layer.out_features for layer in layers], -1))


def _share_parameters(source: nn.Module, target: nn.Module) -> Any:
    target.weight, target.bias = source.weight, source.bias
    return target.train(source.training)
