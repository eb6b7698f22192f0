"""What the trainer asks of a training method."""

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from dfs_engine.models.multi_exit import run_model


class Method(nn.Module):
    """How the exits' results become the one scalar that is minimised.

    A method's own parameters are trained and checkpointed beside the model's, and are no part of the model.
    """

    needs_features: bool | str = False
    """Which of the model's features `forward` is given, as its `return_features` says."""

    def forward(self, logits: Sequence[Tensor], target: Tensor, features: Sequence[Tensor] | None = None) -> Tensor:
        """Returns the loss.

        Args:
            logits: (N, num_classes) of each exit, shallow to deep.
            target: (N,) class indices, or numbers (see `dfs_engine.nn.exit_loss`).
            features: as the model returns them, with `needs_features`.
        """
        raise NotImplementedError

    def run(self, model: nn.Module, input: Tensor | Mapping[str, Tensor]) -> tuple[list[Tensor], list[Tensor] | None]:
        """The model's logits, and its features where this method's loss takes them."""
        if self.needs_features:
            return run_model(model, input, return_features=self.needs_features)
        return run_model(model, input), None
