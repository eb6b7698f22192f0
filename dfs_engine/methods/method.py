"""What the trainer asks of a training method."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn


class Method(nn.Module):
    """How the exits' results become the one scalar that is minimised.

    A method's own parameters are trained and checkpointed beside the model's, and are no part of the model.
    """

    needs_features: bool = False
    """Whether `forward` is given the model's features."""

    def forward(self, logits: Sequence[Tensor], target: Tensor, features: Sequence[Tensor] | None = None) -> Tensor:
        """Returns the loss.

        Args:
            logits: (N, num_classes) of each exit, shallow to deep.
            target: (N,) class indices.
            features: what each exit read, with `needs_features`.
        """
        raise NotImplementedError

    def run(self, model: nn.Module, images: Tensor) -> tuple[list[Tensor], list[Tensor] | None]:
        """The model's logits, and its features where this method's loss takes them."""
        result: Any = model(images, return_features=True) if self.needs_features else (model(images), None)
        return result
