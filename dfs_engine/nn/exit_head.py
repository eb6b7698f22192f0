"""Classifiers of one exit."""

from typing import Any

from torch import Tensor, nn

from dfs_engine.nn.reading import Reading, apply_layer, global_avg_pool, whole


class Exit(nn.Module):
    """A classifier in two steps: a family overrides both."""

    takes_slices = True  # see `nn.reading.apply_layer`

    def feature(self, reading: Reading) -> Reading:
        """The exit's own last feature (N, D), of what it reads."""
        raise NotImplementedError

    def classify(self, feature: Reading) -> Tensor:
        """Logits (N, num_classes), of the last feature."""
        raise NotImplementedError

    def forward(self, *reading: Any, return_feature: bool = False) -> Any:
        """Returns the logits (N, num_classes); with `return_feature` a pair of them and the last feature (N, D).

        Gradient that comes in by the feature goes where the logits' goes, and nowhere else.
        """
        feature = self.feature(reading)
        logits = self.classify(feature)
        return (logits, whole(feature)) if return_feature else logits


class ExitHead(Exit):
    """Global average pool and one linear layer: VGG's exit.

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

    def feature(self, reading: Reading) -> Reading:
        """Of a feature (N, in_channels, H, W): its average (N, in_channels)."""
        return global_avg_pool(reading)

    def classify(self, feature: Reading) -> Tensor:
        return apply_layer(self.linear, feature)


class TokenHead(Exit):
    """LayerNorm, the mean over tokens, and one linear layer.

    Args:
        in_channels: channels of the feature it reads.
        num_classes: width of the logits.
    """

    def __init__(self, in_channels: int, num_classes: int, device: Any = None, dtype: Any = None) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(in_channels, device=device, dtype=dtype)
        self.linear = nn.Linear(in_channels, num_classes, device=device, dtype=dtype)

    def feature(self, reading: Reading) -> Reading:
        """Of tokens (N, T, in_channels): (N, in_channels)."""
        return (self.norm(whole(reading)).mean(1),)

    def classify(self, feature: Reading) -> Tensor:
        return apply_layer(self.linear, feature)
