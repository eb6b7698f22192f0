"""What `PartitionedConv2d` and `PartitionedLinear` share: the slice of their input, and the way from and to stock."""

from typing import Any, ClassVar

from torch import nn

from dfs_engine.ops import _common
from dfs_engine.runtime.backend import check_backend


class Partitioned(nn.Module):
    """A stock layer whose backward computes grad_input only for channels [start, stop); comes before its class."""

    takes_slices = True  # see `nn.reading.apply_layer`
    stock: ClassVar[type[nn.Module]]
    arguments: ClassVar[tuple[str, ...]]
    """What the stock constructor takes and keeps by the same name; the channels that it reads come first."""

    def __init__(
        self,
        *args: Any,
        start: int = 0,
        stop: int | None = None,
        reference: bool = True,
        backend: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        name = self.arguments[0]
        num_channels = getattr(self, name)
        self.start, self.stop = start, num_channels if stop is None else stop
        self.reference, self.backend = reference, check_backend(backend)
        _common.check_slice(type(self).__name__, self.start, self.stop, num_channels, name)

    @classmethod
    def _from_stock(cls, layer: nn.Module, **sliced: Any) -> Any:
        return _with_parameters_of(layer, cls(**_constructor_arguments(layer, cls.arguments), **sliced, device="meta"))

    def to_stock(self) -> Any:
        """The plain stock layer with the same Parameter objects."""
        return _with_parameters_of(self, self.stock(**_constructor_arguments(self, self.arguments), device="meta"))

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, start={self.start}, stop={self.stop}, reference={self.reference}"


def _constructor_arguments(layer: nn.Module, names: tuple[str, ...]) -> dict[str, Any]:
    return {"bias": layer.bias is not None} | {name: getattr(layer, name) for name in names}


def _with_parameters_of(source: nn.Module, target: nn.Module) -> Any:
    target.weight, target.bias = source.weight, source.bias
    return target.train(source.training)
