"""The Triton kernels as the dispatcher's implementations: for CUDA tensors, or for CPU ones where Triton interprets.

An op joins by one line in `_KERNELS`. Triton is imported when a kernel first runs, not before.
"""

import importlib
import logging
from collections.abc import Callable
from typing import Any

from dfs_engine.kernels.config import INTERPRETED, NoConfigFits, is_forced
from dfs_engine.ops import _common, conv2d, linear, norm_act, norm_linear
from dfs_engine.runtime import backend as backends

logger = logging.getLogger(__name__)

# op -> its file in kernels/, which has a function of the op's name; whose dtypes it takes.
_KERNELS = {
    "linear_grad_input": ("linear", linear.NAME),
    "linear_grad_weight": ("linear", linear.NAME),
    "conv2d_grad_input": ("conv2d", conv2d.NAME),
    "conv2d_grad_weight": ("conv2d", conv2d.NAME),
    "norm_linear_grad_input": ("norm_linear", norm_linear.NAME),
    "norm_linear_grad_weight": ("norm_linear", norm_linear.NAME),
    "norm_act": ("norm_act", norm_act.NAME),
    "norm_act_backward": ("norm_act", norm_act.NAME),
}
# Their forwards are cuBLAS's and cuDNN's.
_STOCK = ("linear", "conv2d")

_said: set[str] = set()


def _implementation(op: str) -> Callable:
    """Runs the kernel; `aten` instead, with one warning, where no configuration fits the GPU.

    Raises:
        RuntimeError: a dtype without a kernel.
        NoConfigFits: a forced configuration does not fit.
    """
    file, public = _KERNELS[op]
    aten = _common.ATEN.get(op)

    def run(*args: Any) -> Any:
        refused = backends.unsupported_dtype(public, "triton", args[0].dtype)
        if refused is not None:
            raise RuntimeError(f"{op}: {refused}. Use another dtype, or the aten backend.")
        kernel = getattr(importlib.import_module(f"dfs_engine.kernels.{file}"), op)
        try:
            return kernel(*args)
        except NoConfigFits as error:
            if aten is None or is_forced(op):
                raise
            if op not in _said:
                _said.add(op)
                logger.warning("backend: using aten, because %s.", error)
            return aten(*args)

    return run


def register() -> None:
    """Makes the kernels the implementation of their ops."""
    key = "CPU" if INTERPRETED else "CUDA"
    for op in _STOCK:
        _common.LIBRARY.impl(op, _common.ATEN[op], key)
    for op in _KERNELS:
        _common.LIBRARY.impl(op, _implementation(op), key)
