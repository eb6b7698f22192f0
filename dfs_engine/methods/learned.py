"""What a method learns by gradients of its own, beside the model's training."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.optim.adam import adam
from torch.optim.sgd import sgd

from dfs_engine.methods.method import Input


class Tensors(nn.Module):
    """A list of tensors that are buffers, so that a checkpoint has them."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        super().__init__()
        for index, tensor in enumerate(tensors):
            self.register_buffer(str(index), tensor.detach().clone())

    def __iter__(self) -> Iterator[Tensor]:
        return self.buffers()

    @torch.no_grad()
    def copy_(self, tensors: Sequence[Tensor]) -> None:
        """Takes over these values."""
        for mine, other in zip(self, tensors, strict=True):
            mine.copy_(other)

    @torch.no_grad()
    def copy_to(self, tensors: Sequence[Tensor]) -> None:
        """Gives them its values."""
        for mine, other in zip(self, tensors, strict=True):
            other.copy_(mine)


class Learned(nn.Module):
    """Tensors with an optimizer of their own, Adam or SGD; all of its state is part of the checkpoint.

    They are no parameters, which the run's optimizer would train.

    Args:
        tensors: where they start.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        super().__init__()
        self.values = Tensors(tensors)
        self.first, self.second = (Tensors([torch.zeros_like(tensor) for tensor in tensors]) for _ in range(2))
        self.counts = Tensors([torch.zeros(()) for _ in tensors])

    def leaves(self) -> list[Tensor]:
        """The tensors themselves, as something to differentiate by."""
        return [value.detach().requires_grad_() for value in self.values]

    @torch.no_grad()
    def adam_step(self, gradients: Sequence[Tensor], *, lr: float, weight_decay: float = 0.0) -> None:
        """One step of `torch.optim.Adam`, in place."""
        adam(
            list(self.values),
            list(gradients),
            list(self.first),
            list(self.second),
            [],
            list(self.counts),
            amsgrad=False,
            beta1=0.9,
            beta2=0.999,
            lr=lr,
            weight_decay=weight_decay,
            eps=1e-8,
            maximize=False,
        )

    @torch.no_grad()
    def sgd_step(self, gradients: Sequence[Tensor | None], *, lr: float, momentum: float, weight_decay: float) -> None:
        """One step of `torch.optim.SGD`, in place; of a tensor without a gradient none."""
        given = [index for index, gradient in enumerate(gradients) if gradient is not None]
        values, momenta = list(self.values), list(self.first)  # from zero, which is how a momentum begins
        sgd(
            [values[index] for index in given],
            [gradient for gradient in gradients if gradient is not None],
            [momenta[index] for index in given],
            lr=lr,
            momentum=momentum,
            weight_decay=weight_decay,
            dampening=0.0,
            nesterov=False,
            maximize=False,
        )


def call_with(model: nn.Module, tensors: Mapping[str, Tensor], input: Input) -> Any:
    """The model's results with these in place of its parameters and buffers of the same names; it stays as it is."""
    if isinstance(input, Mapping):
        return functional_call(model, dict(tensors), (), dict(input))
    return functional_call(model, dict(tensors), (input,))
