"""The two parts of a feature made apart, for gradients of one exit at a time.

Of a loss that trains f- alone the layer that makes f gets gradient in its rows [k, C) only, and of one that trains f+
in [0, k). Autograd gives a parameter the gradient of all its rows, zeros among them. So each part is made by a call of
its own, on the layer's rows as leaves of their own: what a loss does not train has no graph that leads to it.
"""

from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.func import functional_call

from dfs_engine.partition import ChannelSlice


class Leaf(NamedTuple):
    """Rows of a parameter as a tensor of its own, in the parameter's memory."""

    rows: ChannelSlice
    tensor: Tensor


class Leaves:
    """The leaves of the parameters that a forward pass has taken apart."""

    def __init__(self) -> None:
        self._of: dict[int, dict[ChannelSlice, Leaf]] = {}

    def of(self, parameter: nn.Parameter) -> list[Leaf]:
        """In the order of the rows; empty where the parameter is used whole."""
        return [leaf for _, leaf in sorted(self._of.get(id(parameter), {}).items())]

    def take(self, parameter: nn.Parameter, rows: ChannelSlice) -> Tensor:
        leaves = self._of.setdefault(id(parameter), {})
        if rows not in leaves:
            leaf = rows.of(parameter.detach(), 0).requires_grad_(parameter.requires_grad)
            leaves[rows] = Leaf(rows, leaf)
        return leaves[rows].tensor

    def call(self, layer: nn.Module, rows: ChannelSlice, *input: Any) -> Any:
        """The layer's call, with rows [start, stop) of its parameters and buffers in place of the whole ones.

        Args:
            layer: a convolution of one group, a linear or a batch normalisation: every output channel has a row.
        """
        tensors: dict[str, Tensor] = {
            name: self.take(parameter, rows) for name, parameter in layer.named_parameters(recurse=False)
        }
        for name, buffer in layer.named_buffers(recurse=False):
            if buffer.dim() > 0:
                tensors[name] = rows.of(buffer, 0)  # a view: running statistics are written through it
            elif rows.start > 0:
                tensors[name] = buffer.clone()  # counts batches, which the first rows have done
        return functional_call(layer, tensors, input)
