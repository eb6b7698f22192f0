"""Classifiers of one exit."""

from typing import Any

from torch import Tensor, nn

from dfs_engine.nn.routing import Reading, apply_layer, global_avg_pool, whole


class ExitHead(nn.Module):
    """Global average pool and one linear layer: VGG's exit (DESIGN section 2).

    Args:
        in_channels: channels of the feature it reads.
        num_classes: width of the logits.
        bias: the published VGG exits have none.
    """

    def __init__(
        self, in_channels: int, num_classes: int, bias: bool = False, device: Any = None, dtype: Any = None
    ) -> None:
        super().__init__()
        self.linear = nn.Linear(in_channels, num_classes, bias, device=device, dtype=dtype)

    def forward(self, input: Reading) -> Tensor:
        """A reading of a feature (N, in_channels, H, W) -> logits (N, num_classes)."""
        return apply_layer(self.linear, global_avg_pool(input))


class TokenHead(nn.Module):
    """LayerNorm, the mean over tokens, and one linear layer.

    Args:
        in_channels: channels of the feature it reads.
        num_classes: width of the logits.
    """

    def __init__(self, in_channels: int, num_classes: int, device: Any = None, dtype: Any = None) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(in_channels, device=device, dtype=dtype)
        self.linear = nn.Linear(in_channels, num_classes, device=device, dtype=dtype)

    def forward(self, input: Reading) -> Tensor:
        """A reading of tokens (N, T, in_channels) -> logits (N, num_classes)."""
        return self.linear(self.norm(whole(input)).mean(1))
