"""One optimizer step: the batch mixed and its labels softened, gradients accumulated, checked, clipped and applied."""

import contextlib
import itertools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from dfs_engine.data.mixup import Mixup
from dfs_engine.gradients import ExitGradients
from dfs_engine.methods import Method, exit_losses
from dfs_engine.methods.method import LossOf
from dfs_engine.models import MultiExitModel
from dfs_engine.nn import smooth_labels
from dfs_engine.training.batches import micro_batches
from dfs_engine.training.config import TrainConfig

if TYPE_CHECKING:
    from accelerate import Accelerator


class OptimizerStep:
    """What `config` does with one batch: `methods.Step`, for the method to make an update with.

    Args:
        model, method, optimizer: as `accelerator` prepared them.

    Raises:
        ValueError: the config asks for what this model's targets or inputs do not allow.
    """

    def __init__(
        self, config: TrainConfig, accelerator: "Accelerator", model: nn.Module, method: nn.Module, optimizer: Any
    ) -> None:
        self.config, self.accelerator = config, accelerator
        self.model, self.method, self.optimizer = model, method, optimizer
        self.raw_model: MultiExitModel = accelerator.unwrap_model(model)
        self.raw_method = cast(Method, accelerator.unwrap_model(method))
        self.parameters = dict(itertools.chain(self.raw_model.named_parameters(), self.raw_method.named_parameters()))
        self.num_classes = self.raw_model.num_classes
        self.exit_gradients: ExitGradients | None = None
        if self.raw_method.combines:
            self.exit_gradients = ExitGradients(self.raw_model, self.raw_method.routing(self.raw_model))
        self.epoch, self.epochs, self.phase = 0, config.epochs, 0
        _check_targets(config, self.raw_model)
        self.mixup: Mixup | None = None
        if config.data.mixup or config.data.cutmix:
            self.mixup = Mixup(config.data, self.num_classes, seed=config.seed, rank=accelerator.process_index)

    def __call__(self, input: Tensor | Mapping[str, Tensor], target: Tensor, step: int) -> Tensor:
        """Updates the weights; returns each exit's loss, (num_exits,).

        Args:
            input: this process's share of the batch, on the device. target: (N,).
            step: of the run, counted from 0.

        Raises:
            FloatingPointError: the loss or a gradient is not finite. The weights are as they were.
        """
        config = self.config
        if self.mixup is not None:
            input, target = self.mixup(cast(Tensor, input), target, step)
        if config.label_smoothing:
            target = smooth_labels(target, self.num_classes, config.label_smoothing)
        return self.raw_method.train_batch(self, input, target)

    def update(self, input: Tensor | Mapping[str, Tensor], target: Tensor) -> Tensor:
        """As `methods.Step.update`."""
        self.optimizer.zero_grad(set_to_none=True)
        loss, losses = self._backward(input, target)
        norm = self._gradient_norm()
        self._check_finite(loss, norm, losses)
        if self.config.optim.clip_grad is not None:
            assert norm is not None
            nn.utils.clip_grads_with_norm_(self.parameters.values(), self.config.optim.clip_grad, norm)
        self.optimizer.step()
        return losses

    def gradients(
        self, loss_of: LossOf, input: Tensor | Mapping[str, Tensor], target: Tensor, of: Sequence[Tensor]
    ) -> tuple[list[Tensor], Tensor]:
        """As `methods.Step.gradients`."""
        sums, exit_parts = [torch.zeros_like(tensor, requires_grad=False) for tensor in of], []
        for part, part_target in micro_batches(input, target, self.config.micro_batch_size):
            share = len(part_target) / len(target)
            loss, logits = loss_of(part, part_target)
            found = torch.autograd.grad(loss, of, allow_unused=True, materialize_grads=True)
            for total, gradient in zip(sums, found, strict=True):
                total.add_(gradient, alpha=share)
            exit_parts.append(exit_losses([exit_logits.detach() for exit_logits in logits], part_target) * share)
        losses = torch.stack(exit_parts).sum(0)
        sums = [self.accelerator.reduce(total, "mean") for total in sums]
        # A reduced sum is not finite wherever one process's is not, so that all refuse at once.
        if not all(total.isfinite().all() for total in sums):
            raise FloatingPointError(f"{_by_exit(losses)}; not finite: what the method itself learns by")
        return sums, losses

    def _backward(self, input: Tensor | Mapping[str, Tensor], target: Tensor) -> tuple[Tensor, Tensor]:
        """Leaves the gradient of the batch's mean loss; returns that loss, and each exit's (num_exits,)."""
        loss_parts, exit_parts = [], []
        pieces = list(micro_batches(input, target, self.config.micro_batch_size))
        for index, (part, part_target) in enumerate(pieces, start=1):
            share = len(part_target) / len(target)
            with contextlib.ExitStack() as stack:
                if index < len(pieces):  # the processes sum their gradients once, with the last
                    for module in (self.model, self.method):
                        stack.enter_context(self.accelerator.no_sync(module))
                if self.exit_gradients is not None:
                    stack.enter_context(self.exit_gradients.apart())
                logits, features = self.raw_method.run(self.model, part)
                loss = self.method(logits, part_target, features)
                if self.exit_gradients is None:
                    loss = loss * share
                    self.accelerator.backward(loss)
                else:
                    losses = [exit_loss * share for exit_loss in loss]
                    self.exit_gradients.add(losses)
                    loss = torch.stack(losses).sum()
            loss_parts.append(loss.detach())
            exit_parts.append(exit_losses([exit_logits.detach() for exit_logits in logits], part_target) * share)
        if self.exit_gradients is not None:
            self.raw_method.combine(self.exit_gradients)
            self.exit_gradients.clear()
        return torch.stack(loss_parts).sum(0), torch.stack(exit_parts).sum(0)

    def _gradient_norm(self) -> Tensor | None:
        """Of all of the gradient together. None under fp16 without clipping, which does not need it."""
        if self.config.precision == "fp16":
            if self.config.optim.clip_grad is None:
                return None
            self.accelerator.unscale_gradients(self.optimizer)
        return nn.utils.get_total_norm([p.grad for p in self.parameters.values() if p.grad is not None])

    def _check_finite(self, loss: Tensor, norm: Tensor | None, losses: Tensor) -> None:
        """Refuses the step, in every process at once, while the weights are still good."""
        finite = loss.isfinite()
        if self.config.precision != "fp16":  # whose loss scaling skips steps with infinite gradients by itself
            assert norm is not None
            finite &= norm.isfinite()
        if finite.item():
            return
        gradients = {name: p.grad for name, p in self.parameters.items() if p.grad is not None}
        broken = [name for name, gradient in gradients.items() if not gradient.isfinite().all()]
        others = f"; not finite: the gradient of {broken[0]} and of {len(broken) - 1} others" if broken else ""
        raise FloatingPointError(_by_exit(losses) + others)


def _by_exit(losses: Tensor) -> str:
    return ", ".join(f"exit {index} {value:.4g}" for index, value in enumerate(losses.tolist(), start=1))


def _check_targets(config: TrainConfig, model: MultiExitModel) -> None:
    for name, value in {
        "label_smoothing": config.label_smoothing,
        "data.mixup": config.data.mixup,
        "data.cutmix": config.data.cutmix,
    }.items():
        if value and model.num_classes == 1:
            raise ValueError(
                f"{name}: expected 0 for a regression, whose targets are numbers, got {value}. Leave it out."
            )
        if value and name != "label_smoothing" and len(model.input_shape) == 1:
            raise ValueError(f"{name}: expected 0 for {model.name}, which reads tokens, got {value}. Leave it out.")
