"""What the trainer asks of a training method.

Of each piece of a batch `run` and then the call; of a method that combines gradients, `combine` once a step.
"""

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from dfs_engine.gradients import ExitGradients
from dfs_engine.models.multi_exit import run_model


class Method(nn.Module):
    """How the exits' results become one update: by a scalar that is minimised, or by what is made of their gradients.

    A method's own parameters are trained and checkpointed beside the model's, and are no part of the model. What else
    it has to remember from step to step are buffers, which are checkpointed too.
    """

    needs_features: bool | str = False
    """Which of the model's features `forward` is given, as its `return_features` says."""
    combines: bool = False
    """Whether `forward` returns several losses, of each of which `combine` gets the gradient."""

    def forward(
        self, logits: Sequence[Tensor], target: Tensor, features: Sequence[Tensor] | None = None
    ) -> Tensor | tuple[Tensor, ...]:
        """Returns the loss, a scalar; with `combines` a tuple of losses, as a rule one of each exit.

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

    def combine(self, gradients: ExitGradients) -> None:
        """Writes the update into the parameters' `.grad`, with `combines`.

        Args:
            gradients: of the losses of the whole batch.
        """
        raise NotImplementedError
