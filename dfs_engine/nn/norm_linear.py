"""A LayerNorm and the linear after it as one op, for readers of a split feature: a ViT block's `norm1` and `qkv`."""

import torch.nn.functional as F
from torch import Tensor, nn

from dfs_engine.nn.routing import Reading, SlicedReading
from dfs_engine.ops import partitioned_norm_linear


def apply_norm_linear(norm: nn.LayerNorm, linear: nn.Linear, input: Reading, rows: slice | None = None) -> Tensor:
    """The two stock layers on whatever their reader got: (..., C) -> (..., out_features), or `rows` of them.

    Without referencing the other part reads as zero, and the normalisation still runs over all C channels.
    """
    weight: Tensor = linear.weight
    bias: Tensor | None = linear.bias
    if rows is not None:
        weight, bias = weight[rows], None if bias is None else bias[rows]
    if not isinstance(input, SlicedReading):
        normalised = norm(input if isinstance(input, Tensor) else input.whole(-1))  # which cannot be cut in two
        return linear(normalised) if rows is None else F.linear(normalised, weight, bias)
    return partitioned_norm_linear(
        input.live,
        norm.weight,
        norm.bias,
        weight,
        bias,
        eps=norm.eps,
        start=input.start,
        stop=input.start + input.live.size(-1),
        reference=input.reference,
        full=input.full,
        backend=input.backend,
    )
