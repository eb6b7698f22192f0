"""timm's attention in the form that is the fastest one here; imported where timm is there."""

from typing import Any

from timm.models.vision_transformer import Attention
from torch import Tensor, nn

from dfs_engine.nn import attend


class ChosenAttention(Attention):
    """A timm `Attention` that is no more than projections, norms of query and key, and dropouts; see `make_chosen`."""

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, *options: Any, **more: Any) -> Tensor:
        """Of (N, T, C) -> (N, T, C)."""
        if attn_mask is not None or any(options) or any(more.values()):
            return super().forward(x, attn_mask, *options, **more)
        return self.mix(*self.qkv(x).chunk(3, -1))

    def mix(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """What lies behind `qkv`: query (N, t, width), key and value (N, T, width) -> (N, t, C)."""
        heads = self.num_heads, self.head_dim
        query, key, value = (projection.unflatten(-1, heads).transpose(1, 2) for projection in (query, key, value))
        # timm's switch: the fused kernels have no second derivative.
        plain = None if self.fused_attn else True
        mixed = attend(self.q_norm(query), self.k_norm(key), value, self.attn_drop, plain=plain)
        return self.proj_drop(self.proj(mixed.transpose(1, 2).flatten(2)))


def is_plain(attention: nn.Module) -> bool:
    """Whether it has no other parts than those that `ChosenAttention` computes."""
    parts = ("qkv", "q_norm", "k_norm", "attn_drop", "proj", "proj_drop")
    return type(attention) in (Attention, ChosenAttention) and all(
        name in parts or type(part) is nn.Identity for name, part in attention.named_children()
    )


def make_chosen(attention: nn.Module) -> None:
    """Turns a plain timm `Attention` into a `ChosenAttention`, in place; its weights keep their names."""
    if type(attention) is Attention and is_plain(attention):
        attention.__class__ = ChosenAttention
