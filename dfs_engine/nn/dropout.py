"""`nn.Dropout` with this engine's kernel, and attention with it."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dfs_engine.ops.dropout import dropout, has_dropout_kernel
from dfs_engine.runtime.backend import check_backend


class Dropout(nn.Dropout):
    """Drop-in for `nn.Dropout`; see `dfs_engine.ops.dropout`.

    Args:
        p: the probability that an element is zeroed.
        backend: "reference", "aten", "cpp", "triton"; None or "auto" picks.
    """

    def __init__(self, p: float = 0.5, *, backend: str | None = None) -> None:
        super().__init__(p)
        self.backend = check_backend(backend)

    def forward(self, input: Tensor) -> Tensor:
        """Any shape -> the same shape."""
        return dropout(input, self.p, self.training, backend=self.backend)


def convert_dropouts(module: nn.Module, backend: str | None = None) -> None:
    """Replaces every plain `nn.Dropout` inside `module` by a `Dropout`, except where it works in place."""
    for name, child in module.named_children():
        if type(child) is nn.Dropout and not child.inplace:
            setattr(module, name, Dropout(child.p, backend=backend).train(child.training))
        else:
            convert_dropouts(child, backend)


def attend(query: Tensor, key: Tensor, value: Tensor, drop: nn.Module, mask: Tensor | None = None) -> Tensor:
    """Attention whose weights go through the dropout module `drop`.

    Equivalent to: ``F.scaled_dot_product_attention(query, key, value, mask, drop.p if drop.training else 0.0)``

    Args:
        query: (N, heads, t, d). key: (N, heads, T, d). value: (N, heads, T, e).
        mask: bool, (N, 1, 1, T), True where a token may be read; a row that may read nothing yields 0.

    Returns:
        (N, heads, t, e).
    """
    p = drop.p if isinstance(drop, nn.Dropout) and drop.training else 0.0
    if p == 0 or not (isinstance(drop, Dropout) and has_dropout_kernel(query, drop.backend)):
        return F.scaled_dot_product_attention(query, key, value, mask, p)
    scores = (query * query.size(-1) ** -0.5) @ key.transpose(-2, -1)
    if mask is not None:
        lowest = torch.finfo(scores.dtype).min  # not -inf, of which a row that may read nothing would become NaN
        scores = scores + torch.zeros_like(mask, dtype=scores.dtype).masked_fill(~mask, lowest)
        value = value * mask.any(-1, keepdim=True)
    return drop(scores.softmax(-1)) @ value
