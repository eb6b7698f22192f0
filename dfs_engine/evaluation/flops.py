"""Floating-point operations of a model, counted while it runs. One multiply-add is two."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode


@dataclass(frozen=True, slots=True)
class FlopCount:
    """FLOPs of one training pass: convolutions and matrix products, as the dispatcher sees them."""

    forward: int
    backward: int

    @property
    def total(self) -> int:
        return self.forward + self.backward


def count_flops(
    model: nn.Module, input_shape: tuple[int, ...], batch: int = 1, *, device: torch.device | str = "cpu"
) -> FlopCount:
    """Runs one forward and one backward of all exits and counts.

    Args:
        model: returns a tensor, or a list of every exit's logits; eager, because a compiled graph is not seen. Its
            gradients are left as they were; a BatchNorm's running statistics move, as in any training step.
        input_shape: of one sample.
        batch: samples at once.
        device: where the model is.
    """
    input = torch.randn(batch, *input_shape, device=device)
    # Stock autograd computes what is asked for; as in training, nobody asks for the images' gradient.
    with FlopCounterMode(display=False) as forward:
        logits = model(input)
    total = logits.sum() if isinstance(logits, Tensor) else torch.stack([exit.sum() for exit in logits]).sum()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with FlopCounterMode(display=False) as backward:
        torch.autograd.grad(total, parameters, allow_unused=True)
    return FlopCount(forward.get_total_flops(), backward.get_total_flops())
