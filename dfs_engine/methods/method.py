"""What the trainer asks of a training method.

An epoch is `num_phases` passes over the training data, one for most methods. `begin_phase` and `end_phase` stand around
each. Of each batch `train_batch` makes an update: one optimizer step, unless the method says otherwise. Of each piece
of a batch that step asks `run` and then the call; of a method that combines gradients, `combine` once a step.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol, TypeAlias

from torch import Tensor, nn
from torch.optim import Optimizer

from dfs_engine.gradients import ExitGradients
from dfs_engine.models import MultiExitModel
from dfs_engine.models.multi_exit import run_model

Input: TypeAlias = Tensor | Mapping[str, Tensor]

LossOf: TypeAlias = Callable[[Input, Tensor], tuple[Tensor, Sequence[Tensor]]]
"""(input, target) of a piece of a batch -> (its mean loss, each exit's logits)."""

REFUSABLE = ("adamw", "compile", "ema", "fp16", "micro_batch_size", "processes")
"""What a run may have that not every method can: AdamW, torch.compile, an average of the weights, float16 with its loss
scaling, gradient accumulation, several processes."""


class Step(Protocol):
    """What a method has to make an update with.

    Attributes:
        raw_model: the model itself, whatever is wrapped around it to train.
        optimizer: the model's; `defaults["lr"]` is its learning rate before any decay.
        epoch: epochs completed, of `epochs` in all.
        phase: passes over the data completed in this epoch.
    """

    raw_model: MultiExitModel
    optimizer: Optimizer
    epoch: int
    epochs: int
    phase: int

    def update(self, input: Input, target: Tensor) -> Tensor:
        """One optimizer step on the method's loss of these samples; returns each exit's loss, (num_exits,)."""
        ...

    def gradients(
        self, loss_of: LossOf, input: Input, target: Tensor, of: Sequence[Tensor]
    ) -> tuple[list[Tensor], Tensor]:
        """The gradients of a batch's mean loss, over its pieces and all processes; and each exit's loss.

        Args:
            of: tensors that require gradient; of one that the loss does not depend on it is zero.

        Raises:
            FloatingPointError: loss or gradients are not finite.
        """
        ...


class Method(nn.Module):
    """How the exits' results become one update: by a scalar that is minimised, or by what is made of their gradients.

    A method's own parameters are trained and checkpointed beside the model, and are no part of the model. What else
    it has to remember from step to step are buffers, which are checkpointed too, so that a run resumes exactly.
    """

    needs_features: bool | str = False
    """Which of the model's features `forward` is given, as its `return_features` says."""
    combines: bool = False
    """Whether `forward` returns several losses, of each of which `combine` gets the gradient."""
    num_phases: int = 1
    """Passes over the training data in an epoch."""
    refuses: Mapping[str, str] = {}
    """What of `REFUSABLE` a run by this method cannot have, each with the reason."""

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

    def run(self, model: nn.Module, input: Input) -> tuple[list[Tensor], list[Tensor] | None]:
        """The model's logits, and its features where this method's loss takes them."""
        if self.needs_features:
            return run_model(model, input, return_features=self.needs_features)
        return run_model(model, input), None

    def routing(self, model: MultiExitModel) -> Sequence[Sequence[nn.Parameter]]:
        """Of each exit, the parameters that its loss trains, with `combines`: those that it reaches."""
        return [list(model.reached_parameters(index)) for index in range(model.num_exits)]

    def combine(self, gradients: ExitGradients) -> None:
        """Writes the update into the parameters' `.grad`, with `combines`.

        Args:
            gradients: of the losses of the whole batch.
        """
        raise NotImplementedError

    def train_batch(self, step: Step, input: Input, target: Tensor) -> Tensor:
        """Makes the update, or updates, of a batch; returns each exit's loss, (num_exits,)."""
        return step.update(input, target)

    def begin_phase(self, step: Step) -> None:
        """Before the first batch of a pass; not again where a run is resumed within the pass."""

    def end_phase(self, step: Step) -> None:
        """After the last batch of a pass."""

    def phase_name(self, phase: int) -> str:
        """What a progress bar calls a pass."""
        return ""
