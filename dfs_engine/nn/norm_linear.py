"""A LayerNorm and the linear behind it, for readers of a split feature: a ViT block's `norm1` and `qkv`.

LayerNorm's backward needs sums over all channels, which follow from the linear's output. So what a
`PartitionedLayerNorm` gives its linear of a split feature is not yet normalised: the linear computes both.
"""

from typing import Any

from torch import Tensor, nn

from dfs_engine.nn.linear import Normalisation
from dfs_engine.nn.reading import Columns, Reading, whole


class PartitionedLayerNorm(nn.LayerNorm):
    """`nn.LayerNorm`, in front of a `PartitionedLinear`. Same parameters and state_dict keys."""

    takes_slices = True  # see `nn.reading.apply_layer`

    def forward(self, input: Tensor, full: Tensor | None = None, columns: Columns | None = None) -> Any:
        """(..., C) -> (..., C); of a split feature the arguments of the linear's call."""
        if full is None:
            return super().forward(input)
        return input, full, columns, Normalisation(self.weight, self.bias, self.eps)


def apply_norm_linear(norm: nn.Module, linear: nn.Module, reading: Reading, rows: slice = slice(None)) -> Tensor:
    """The two layers on whatever their reader got: (..., C) -> (..., out_features), or `rows` of them.

    Without referencing the other part reads as zero, and the normalisation still runs over all C channels.
    """
    is_sliced = len(reading) == 3 and all(getattr(layer, "takes_slices", False) for layer in (norm, linear))
    normalised = norm(*reading) if is_sliced else norm(whole(reading))
    if isinstance(normalised, tuple):
        return linear(*normalised, rows=rows)
    return linear(normalised)[..., rows]  # of whole features, or what a hook has put in their place
