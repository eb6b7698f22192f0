"""Dropout at the price of its memory traffic, on the CPU.

ATen's draws on one thread, number after number, where the CPU is not Intel's: 8 ns an element, a fifth of BERT's step.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from dfs_engine.checks import check_no_transform, is_transforming
from dfs_engine.ops import _common
from dfs_engine.runtime import backend as backends

NAME = "dropout"

# An element's fate depends on the seed and on its place alone: nothing but the seed is kept for the backward.
_common.define(
    "dropout",
    "Tensor input, Tensor seed, float p",
    "Tensor",
    fake=lambda input, seed, p: input.new_empty(input.shape),
)


def _keep_seed(ctx, inputs, output) -> None:
    _, seed, ctx.p = inputs
    ctx.save_for_backward(seed)


def _backward(ctx, grad_output: Tensor):
    (seed,) = ctx.saved_tensors
    return torch.ops.dfs_engine.dropout(grad_output, seed, ctx.p), None, None


torch.library.register_autograd("dfs_engine::dropout", _backward, setup_context=_keep_seed, lib=_common.LIBRARY)


def has_dropout_kernel(input: Tensor, backend: str | None = None) -> bool:
    """Whether `dropout` runs this project's kernel: float32 and bfloat16 on the CPU, with the extension.

    Raises:
        RuntimeError: "cpp" is requested, and cannot run here or has no kernel for this dtype.
    """
    explicit = backends.requested(backend)
    if explicit is None:
        is_known = backends.unsupported_dtype(NAME, "cpp", input.dtype) is None and not is_transforming()
        return is_known and backends.unavailable_reason("cpp", input.device.type) is None
    if explicit == "cpp":
        check_no_transform(NAME)
        backends.check_request(NAME, "cpp", input.device, input.dtype)
    return explicit == "cpp"


def dropout(input: Tensor, p: float = 0.5, training: bool = True, *, backend: str | None = None) -> Tensor:
    """Zeroes elements with probability p, and scales the others by 1 / (1 - p).

    Equivalent to: ``F.dropout(input, p, training)``, with other random numbers of the same distribution, which
    `torch.manual_seed` repeats for every number of threads.

    Args:
        input: any shape and strides, a floating dtype.
        p: 0 <= p <= 1. training: False returns the input.
        backend: "cpp" is this project's kernel, of float32 and bfloat16 on the CPU; None or "auto" picks it where it
            can run, else ATen's. The others are ATen's: Triton has no kernel of it, whose device ATen's is made for.

    Returns:
        a tensor like input. A dropped infinity or NaN is NaN.

    Raises:
        ValueError: p out of range. TypeError: no floating-point tensor.
        RuntimeError: "cpp" is requested, and cannot run here or has no kernel for this dtype.
    """
    if not 0 <= p <= 1:
        raise ValueError(f"{NAME}: expected 0 <= p <= 1, got p={p}.")
    _common.check_tensors(NAME, input=input)
    if not training or p in (0, 1) or not has_dropout_kernel(input, backend):
        return F.dropout(input, p, training)
    return torch.ops.dfs_engine.dropout(input, torch.randint(2**62, ()), p)
