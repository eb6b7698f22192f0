"""A LayerNorm and the linear after it as one op, for readers of a split feature: a ViT block's `norm1` and `qkv`."""

from torch import Tensor, nn

from dfs_engine.nn.routing import Reading, SlicedReading
from dfs_engine.ops import partitioned_norm_linear


def apply_norm_linear(norm: nn.LayerNorm, linear: nn.Linear, input: Reading) -> Tensor:
    """The two stock layers on whatever their reader got: (..., C) -> (..., out_features).

    Without referencing the other part reads as zero, and the normalisation still runs over all C channels.
    """
    if isinstance(input, Tensor):
        return linear(norm(input))
    if not isinstance(input, SlicedReading):
        return linear(norm(input.whole(-1)))  # a normalisation cannot be cut in two
    return partitioned_norm_linear(
        input.live,
        norm.weight,
        norm.bias,
        linear.weight,
        linear.bias,
        eps=norm.eps,
        start=input.start,
        stop=input.start + input.live.size(-1),
        reference=input.reference,
        full=input.full,
        backend=input.backend,
    )
