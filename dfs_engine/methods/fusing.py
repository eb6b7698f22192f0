"""What the methods share that train every exit by itself for a while and then fuse what came of it."""

from collections.abc import Mapping, Sequence
from typing import cast

import torch
from torch import Tensor
from torch.optim import Optimizer

from dfs_engine.methods.learned import Learned, Tensors, call_with
from dfs_engine.methods.method import Input, Method, Step
from dfs_engine.models import MultiExitModel
from dfs_engine.nn import exit_loss


class FusingMethod(Method):
    """An epoch is one pass over the data for each exit, from the same weights, and one to learn how to fuse them.

    Exit k's pass minimises ``l_k + aux sum_{j != k} r_j l_j``. Of what it made of the weights, theta_k, those are kept
    that exit k reaches; the next pass begins at the weights theta_0 of before. In the last pass the net runs on fused
    weights, by which the method learns how to fuse; then they become the model's. Statistics of batch norms go on from
    pass to pass. All copies are part of the checkpoint.

    Args:
        model: to be trained by this method; its values do not matter.
        aux: weight of the other exits' losses.
        aux_weights: (num_exits,) r.
        inverse_order: the deepest exit's pass comes first.
        leak_momentum: an exit's pass goes on with the momentum of the one before, instead of none.
    """

    refuses: Mapping[str, str] = {
        "compile": "what is fused is no parameter of the model, which would be compiled anew for it",
        "ema": "the model holds each exit's own weights in turn, the average of which means nothing",
        "fp16": "its loss scaling does not reach the gradients that the fusion is learned by",
    }
    # What the fusion is learned by: a subclass says so.
    fusion: Learned
    meta_lr: float

    def __init__(
        self,
        model: MultiExitModel,
        *,
        aux: float,
        aux_weights: Sequence[float],
        inverse_order: bool = False,
        leak_momentum: bool = False,
    ) -> None:
        super().__init__()
        self.aux, self.aux_weights, self.leak_momentum = aux, tuple(aux_weights), leak_momentum
        self.num_exits = model.num_exits
        self.num_phases = self.num_exits + 1
        self.order = list(range(self.num_exits))[:: -1 if inverse_order else 1]
        self.exit = 0  # whose pass it is
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.names = list(trained)
        reached = [{id(p) for p in model.reached_parameters(index)} for index in range(self.num_exits)]
        self.reached = [[name for name, p in trained.items() if id(p) in inside] for inside in reached]
        self.reaching = {name: [k for k, names in enumerate(self.reached) if name in set(names)] for name in trained}
        self.start = Tensors(list(trained.values()))
        self.own = torch.nn.ModuleList(Tensors([trained[name] for name in names]) for names in self.reached)

    def forward(self, logits: Sequence[Tensor], target: Tensor, features: Sequence[Tensor] | None = None) -> Tensor:
        """The loss of the exit whose pass it is."""
        loss = exit_loss(logits[self.exit], target)
        for index, weight in enumerate(self.aux_weights):
            if index != self.exit:
                loss = loss + self.aux * weight * exit_loss(logits[index], target)
        return loss

    def fused(self, learned: Sequence[Tensor]) -> dict[str, Tensor]:
        """The fused value of every trained parameter, by its name, differentiable by `learned`."""
        raise NotImplementedError

    def fusion_loss(self, step: Step, losses: Sequence[Tensor]) -> Tensor:
        """What the fusion is learned by, of each exit's loss."""
        return torch.stack(list(losses)).sum()

    def is_learning(self, step: Step) -> bool:
        """Whether this epoch's last pass still changes what is learned."""
        return True

    def result(self, step: Step, exit: int) -> list[Tensor]:
        """What an exit's pass has made of the weights that the exit reaches, in the order of `reached`."""
        return [step.raw_model.get_parameter(name) for name in self.reached[exit]]

    def own_of(self, exit: int) -> dict[str, Tensor]:
        """theta_k, what exit k's pass has left, by name."""
        return dict(zip(self.reached[exit], cast(Tensors, self.own[exit]), strict=True))

    def begin_phase(self, step: Step) -> None:
        if step.phase >= self.num_exits:
            return
        parameters = _parameters(step.raw_model, self.names)
        if step.phase == 0:
            self.start.copy_(parameters)
        else:
            self.start.copy_to(parameters)
        if not self.leak_momentum:
            _forget(step.optimizer)

    def train_batch(self, step: Step, input: Input, target: Tensor) -> Tensor:
        if step.phase < self.num_exits:
            self.exit = self.order[step.phase]
            return self.train_exit(step, input, target)
        leaves = self.fusion.leaves()

        def loss_of(input: Input, target: Tensor) -> tuple[Tensor, Sequence[Tensor]]:
            logits = call_with(step.raw_model, self.fused(leaves), input)
            return self.fusion_loss(step, [exit_loss(exit_logits, target) for exit_logits in logits]), logits

        gradients, losses = step.gradients(loss_of, input, target, leaves)
        if self.is_learning(step):
            self.fusion.adam_step(gradients, lr=self.fusion_lr(step))
        return losses

    def train_exit(self, step: Step, input: Input, target: Tensor) -> Tensor:
        """The update of a batch in an exit's pass."""
        return step.update(input, target)

    def fusion_lr(self, step: Step) -> float:
        """Of Adam, in this epoch."""
        return self.meta_lr

    def end_phase(self, step: Step) -> None:
        if step.phase < self.num_exits:
            exit = self.order[step.phase]
            with torch.no_grad():
                cast(Tensors, self.own[exit]).copy_(self.result(step, exit))
        if step.phase == self.num_phases - 1:
            with torch.no_grad():
                fused = self.fused(list(self.fusion.values))
                for name, value in fused.items():
                    step.raw_model.get_parameter(name).copy_(value)

    def phase_name(self, phase: int) -> str:
        return f"exit {self.order[phase] + 1}" if phase < self.num_exits else "fusion"


def _parameters(model: MultiExitModel, names: Sequence[str]) -> list[Tensor]:
    return [model.get_parameter(name) for name in names]


def _forget(optimizer: Optimizer) -> None:
    """Lets it go on as one that has taken no step: momentum, averages and counts are zero."""
    for state in optimizer.state.values():
        for value in state.values():
            if isinstance(value, Tensor):
                value.zero_()
