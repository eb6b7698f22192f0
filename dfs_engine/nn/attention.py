"""Attention in the form that is the fastest one for its dtype, length and machine."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dfs_engine.nn.dropout import Dropout
from dfs_engine.ops.dropout import has_dropout_kernel
from dfs_engine.runtime import choice


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    drop: nn.Module,
    mask: Tensor | None = None,
    *,
    plain: bool | None = None,
) -> Tensor:
    """Attention whose weights go through the dropout module `drop`.

    Equivalent to: ``F.scaled_dot_product_attention(query, key, value, mask, drop.p if drop.training else 0.0)``

    Args:
        query: (N, heads, t, d). key: (N, heads, T, d). value: (N, heads, T, e).
        mask: bool, (N, 1, 1, T), True where a token may be read; a row that may read nothing yields 0.
        plain: True: by plain products, which keep N * heads * t * T weights for the backward; False: by PyTorch's fused
            kernels. None: with this engine's `Dropout` as `choice.attention` says, plainly where it draws; else fused.

    Returns:
        (N, heads, t, e).
    """
    p = drop.p if isinstance(drop, nn.Dropout) and drop.training else 0.0
    if plain is None and isinstance(drop, Dropout):
        form = choice.attention(query, key, value)
        if form == "float":
            with torch.autocast(query.device.type, enabled=False):
                return attend(query.float(), key.float(), value.float(), drop, mask).to(query.dtype)
        plain = form == "plain" or (p > 0 and has_dropout_kernel(query, drop.backend))
    if not plain:
        return F.scaled_dot_product_attention(query, key, value, mask, p)
    scores = (query * query.size(-1) ** -0.5) @ key.transpose(-2, -1)
    if mask is not None:
        lowest = torch.finfo(scores.dtype).min  # not -inf, of which a row that may read nothing would become NaN
        scores = scores + torch.zeros_like(mask, dtype=scores.dtype).masked_fill(~mask, lowest)
        value = value * mask.any(-1, keepdim=True)
    return drop(scores.softmax(-1)) @ value
