"""Floating-point operations of a training step, counted while it runs. One multiply-add is two."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode, conv_flop_count

from dfs_engine.runtime import backend as backends
from dfs_engine.runtime import calibration


@dataclass(frozen=True, slots=True)
class FlopCount:
    """FLOPs of one training pass: convolutions and matrix products, as the dispatcher sees them."""

    forward: int
    backward: int

    @property
    def total(self) -> int:
        return self.forward + self.backward


def _conv_backward_flops(
    grad_output_shape: Any,
    input_shape: Any,
    weight_shape: Any,
    bias_size: Any,
    stride: Any,
    padding: Any,
    dilation: Any,
    transposed: bool,
    output_padding: Any,
    groups: int,
    output_mask: Any,
    out_shape: Any = None,
) -> int:
    """Either gradient costs what the forward does; torch takes a grouped weight gradient for a dense one."""
    forward = conv_flop_count(input_shape, weight_shape, grad_output_shape, transposed)
    return forward * sum(output_mask[:2])


_FORMULAS = {torch.ops.aten.convolution_backward: _conv_backward_flops}


def count_flops(model: nn.Module, input: Any) -> FlopCount:
    """Runs one forward and one backward of all exits and counts.

    Attention counts as the matrix products that define it, whichever kernel would compute them. On the meta device
    nothing is computed, and the count is the same.

    Args:
        model: returns a tensor, or a list of every exit's logits; eager, because a compiled graph is not seen. Its
            gradients are left as they were; a BatchNorm's running statistics move, as in any training step.
        input: what the model takes, e.g. `MultiExitModel.example_input(batch)`.
    """
    if backends.unavailable_reason("cpp") is None:
        calibration.wins()  # not while operators are counted
    # Stock autograd computes what is asked for; as in training, nobody asks for the images' gradient.
    with sdpa_kernel(SDPBackend.MATH):
        with FlopCounterMode(display=False) as forward:
            logits = model(input)
        total = logits.sum() if isinstance(logits, Tensor) else torch.stack([exit.sum() for exit in logits]).sum()
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        with FlopCounterMode(display=False, custom_mapping=_FORMULAS) as backward:
            torch.autograd.grad(total, parameters, allow_unused=True)
    return FlopCount(forward.get_total_flops(), backward.get_total_flops())
