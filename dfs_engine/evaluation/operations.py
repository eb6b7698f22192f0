"""What an exit costs an image at inference, as the papers count it: MSDNet's counter, where a multiply-add is one.

Convolutions and matrix products count their multiply-adds; a linear layer's bias and a ReLU one for each element of the
output; a global average pool one for each element that it reads, another pool one for each that a window reads.
Normalisation, a convolution's bias, other activations, sums, dropout and whatever moves data count nothing.
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from dfs_engine.models import MultiExitModel

_aten = torch.ops.aten


def _elements_read(output: Any, input: Tensor, *args: Any) -> int:
    return input.numel()


def _window_elements(output: Any, input: Tensor, kernel_size: list[int], *args: Any) -> int:
    pooled = output if isinstance(output, Tensor) else output[0]
    return pooled.numel() * (prod(kernel_size) if len(kernel_size) == 2 else kernel_size[0] ** 2)


# Convolutions, matrix products and attention: (*arguments, out_val=output) -> twice their multiply-adds.
_MULTIPLY_ADDS: dict[Any, Callable[..., int]] = FlopCounterMode(display=False).flop_registry
# (output, *arguments) -> operations.
_COUNTED: dict[Any, Callable[..., int]] = {
    _aten.relu: _elements_read,
    _aten.relu_: _elements_read,
    _aten.mean: _elements_read,
    _aten._adaptive_avg_pool2d: _elements_read,
    _aten.avg_pool2d: _window_elements,
    _aten.max_pool2d_with_indices: _window_elements,
}
# Free besides views and what computes element by element.
_FREE = {
    _aten.native_batch_norm,
    _aten.native_layer_norm,
    _aten.native_group_norm,
    _aten._softmax,
    _aten._safe_softmax,
    _aten.native_dropout,
    torch.ops.dfs_engine.dropout,
    _aten.cat,
    _aten.stack,
    _aten.constant_pad_nd,
    _aten._unsafe_view,
    _aten._to_copy,
    _aten.copy_,
    _aten.embedding,
    _aten.index,
    _aten.index_select,
    _aten.gather,
    _aten.upsample_nearest2d,
    _aten.upsample_bilinear2d,
    _aten.upsample_bicubic2d,
}


@dataclass(frozen=True, slots=True)
class ExitCost:
    """What an image costs that leaves at one exit.

    Attributes:
        parameters, operations: of all that has run by then, the exits before it among them.
        parameters_alone, operations_alone: without those: of the exit, and of the blocks up to it.
    """

    parameters: int
    operations: int
    parameters_alone: int
    operations_alone: int


class _Counter(TorchDispatchMode):
    """Adds up the operations of whatever runs."""

    total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        output = func(*args, **(kwargs or {}))
        self.total += _operations(func, args, kwargs or {}, output)
        return output


def _operations(func: Any, args: tuple, kwargs: dict, output: Any) -> int:
    op = func.overloadpacket
    if op in _MULTIPLY_ADDS:
        bias = output.numel() if op is _aten.addmm else 0
        return _MULTIPLY_ADDS[op](*args, **kwargs, out_val=output) // 2 + bias
    if op in _COUNTED:
        return _COUNTED[op](output, *args)
    reads_numbers = any(isinstance(value, Tensor) and value.is_floating_point() for value in args)
    if reads_numbers and not (func.is_view or torch.Tag.pointwise in func.tags or op in _FREE):
        raise NotImplementedError(
            f"count_operations: expected operators that it knows, got {op}. Say in {__name__} what it counts."
        )
    return 0


@torch.no_grad()
def count_operations(model: MultiExitModel) -> list[ExitCost]:
    """Runs one sample and counts for every exit, shallow to deep; on the meta device nothing is computed.

    Args:
        model: of variant "dense", so that it runs stock operators.

    Raises:
        NotImplementedError: an operator that is neither counted nor known to be free.
    """
    counter, before, after = _Counter(), [], []
    hooks = [exit.register_forward_pre_hook(lambda *_: before.append(counter.total)) for exit in model.exits]
    hooks += [exit.register_forward_hook(lambda *_: after.append(counter.total)) for exit in model.exits]
    was_training = model.training
    try:
        with sdpa_kernel(SDPBackend.MATH), counter:
            model.eval()(model.example_input())
    finally:
        model.train(was_training)
        for hook in hooks:
            hook.remove()
    costs, so_far, in_exits = [], set(), 0
    for index, (begin, end) in enumerate(zip(before, after, strict=True)):
        alone = set(model.reached_parameters(index))
        so_far |= alone
        costs.append(ExitCost(_num_elements(so_far), end, _num_elements(alone), end - in_exits))
        in_exits += end - begin
    return costs


def _num_elements(parameters: set[torch.nn.Parameter]) -> int:
    return sum(parameter.numel() for parameter in parameters)
