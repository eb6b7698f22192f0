"""`nn.Conv2d` that trains through a slice of its input channels."""

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from dfs_engine.nn.partitioned import Partitioned
from dfs_engine.nn.reading import Columns, whole
from dfs_engine.ops import partitioned_conv2d


class PartitionedConv2d(Partitioned, nn.Conv2d):
    """Drop-in for `nn.Conv2d` whose backward computes grad_input only for channels [start, stop).

    Same parameters, initialisation and state_dict keys as `nn.Conv2d`.

    Equivalent to: ``nn.Conv2d`` on ``torch.cat([x[:, :start].detach(), x[:, start:stop], x[:, stop:].detach()], 1)``

    Args:
        in_channels, ..., dtype: as `nn.Conv2d`.
        start, stop: half-open range of channels that receive gradient; stop=None means in_channels.
        reference: whether channels outside the slice are read (True) or read as zero (False).
        backend: "reference", "aten", "cpp", "triton"; None or "auto" picks.
    """

    stock = nn.Conv2d
    arguments = (
        "in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "padding_mode",
    )  # fmt: skip

    def forward(self, input: Tensor, full: Tensor | None = None, columns: Columns | None = None) -> Tensor:
        """(N, in_channels, H, W) -> (N, out_channels, H', W').

        Args:
            input: all channels, or, with `full`, the live ones alone (N, live, H, W).
            full: all channels, without gradient.
            columns: which channels of `full` are live; then the layer's own slice does not matter.
        """
        if full is None or columns is None:
            return self._compute(input, full, self.weight, Columns(self.start, self.reference), self.stop)
        weight = self.weight
        if columns.order is not None:
            if self.groups != 1:  # its weight has no column for each channel
                return self._compute(whole((input, full, columns)), None, weight, Columns(0), self.in_channels)
            weight = columns.order.columns_of(weight)
        return self._compute(input, full, weight, columns, columns.start + input.size(columns.dim))

    def _compute(self, input: Tensor, full: Tensor | None, weight: Tensor, columns: Columns, stop: int) -> Tensor:
        padding: Any = self.padding
        if self.padding_mode != "zeros" or isinstance(padding, str):
            # Left, right, top, bottom, as nn.Conv2d counts "same" (which may be uneven) and the other modes.
            mode = "constant" if self.padding_mode == "zeros" else self.padding_mode
            input = F.pad(input, self._reversed_padding_repeated_twice, mode=mode)
            full = None if full is None else F.pad(full, self._reversed_padding_repeated_twice, mode=mode)
            padding = 0
        return partitioned_conv2d(
            input,
            weight,
            self.bias,
            self.stride,  # type: ignore[arg-type]
            padding,
            self.dilation,  # type: ignore[arg-type]
            self.groups,
            start=columns.start,
            stop=stop,
            reference=columns.reference,
            full=full,
            backend=self.backend,
        )

    @classmethod
    def from_conv(cls, conv: nn.Conv2d, **sliced: Any) -> "PartitionedConv2d":
        """The same layer, partitioned as `start`, `stop`, `reference` and `backend` say.

        Shares the Parameter objects, so that an optimizer keeps working.
        """
        return cls._from_stock(conv, **sliced)
