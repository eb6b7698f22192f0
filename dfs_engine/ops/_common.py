"""What every op shares: how it is defined and run, argument checks, autocast."""

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from dfs_engine.kernels.config import INTERPRETED
from dfs_engine.partition import dense_memory_format
from dfs_engine.runtime import backend as backends
from dfs_engine.runtime import choice

# Schemas live in Python, so that the package imports and traces without a compiler and without Triton.
# csrc/ adds the CPU kernels, kernels/ the CUDA ones.
LIBRARY = torch.library.Library("dfs_engine", "DEF")
# op -> its `aten` implementation.
ATEN: dict[str, Callable] = {}


def define(
    op: str,
    arguments: str,
    returns: str,
    *,
    fake: Callable,
    aten: Callable | None = None,
    flops: Callable | None = None,
) -> None:
    """Defines `dfs_engine::op`, and the overload `op.kernel` too where the cpp backend has several kernels of it.

    Args:
        arguments, returns: of the schema.
        fake: the shape function. aten: the `aten` backend. flops: the formula for torch's FLOP counter.
    """
    LIBRARY.define(f"{op}({arguments}) -> {returns}")
    torch.library.register_fake(f"dfs_engine::{op}", fake, lib=LIBRARY)
    if any(op in passes for passes in backends.CPP_KERNELS.values()):
        LIBRARY.define(f"{op}.kernel({arguments}, *, str kernel) -> {returns}")
        torch.library.register_fake(
            f"dfs_engine::{op}.kernel", lambda *given, kernel, **more: fake(*given, **more), lib=LIBRARY
        )
        if not INTERPRETED:  # as _triton.py, which has the key then
            LIBRARY.impl(op, functools.partial(_pick_and_run, op), "CPU")
    if aten is not None:
        ATEN[op] = aten
    if flops is not None:
        register_flop_formula(getattr(torch.ops.dfs_engine, op))(flops)


def run(op: str, backend: str, *arguments: Any) -> Any:
    """Runs an op by a backend, on the kernel that `choice` picks where that has several.

    Under torch.compile the op picks when it runs.
    """
    if backend == "aten":
        return ATEN[op](*arguments)
    if backend == "triton" or op not in choice.KERNEL_OF:
        return getattr(torch.ops.dfs_engine, op).default(*arguments)
    kernel = None if backend == "cpp" else choice.asked_kernel(op, backend)
    if kernel is None and torch.compiler.is_compiling():
        return getattr(torch.ops.dfs_engine, op).default(*arguments)
    return _run_kernel(op, kernel or choice.KERNEL_OF[op](*arguments), arguments)


def _pick_and_run(op: str, *arguments: Any) -> Any:
    # The dispatcher makes lists of the tuples that `choice` compares with.
    arguments = tuple(tuple(one) if isinstance(one, list) else one for one in arguments)
    return _run_kernel(op, choice.KERNEL_OF[op](*arguments), arguments)


def _run_kernel(op: str, kernel: str, arguments: tuple) -> Any:
    backends.record(op, kernel)
    return getattr(torch.ops.dfs_engine, op).kernel(*arguments, kernel=kernel)


def live_and_full(input: Tensor, full: Tensor | None, start: int, stop: int, dim: int) -> tuple[Tensor, Tensor]:
    """What every op computes with: the live part of a feature, with gradient, and the data of all its channels."""
    if full is not None:
        return input, full.detach()
    return narrow(input, start, stop, dim), input.detach()


def narrow(feature: Tensor, start: int, stop: int, dim: int) -> Tensor:
    """Channels [start, stop), whose gradient comes back in the feature's own memory format."""
    if stop - start == feature.size(dim):
        return feature
    if dense_memory_format(feature) is torch.channels_last:
        return feature.permute(0, 2, 3, 1).narrow(-1, start, stop - start).permute(0, 3, 1, 2)
    return feature.narrow(dim, start, stop - start)


def check_tensors(op: str, *, same_dtype: bool = True, **tensors: Tensor | None) -> None:
    """Floating dtypes, one dtype or one under autocast (unless `same_dtype` is off), one device.

    Raises:
        TypeError: not a tensor, or integer, complex or mixed dtypes. ValueError: tensors on several devices.
    """
    first: str | None = None
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{op}: expected a Tensor, got {name}={tensor!r} of type {type(tensor).__name__}.")
        if not tensor.is_floating_point():
            raise TypeError(
                f"{op}: expected a floating-point tensor, got {name} of dtype {tensor.dtype}. "
                f"Convert it, e.g. `{name}.float()`."
            )
        if first is None:
            first, device, given = name, tensor.device, tensor.dtype
            dtype = autocast_dtype(tensor)
        elif tensor.device != device:
            raise ValueError(
                f"{op}: expected all tensors on one device, got {first} on {device} and {name} on {tensor.device}. "
                "Move one of them."
            )
        elif same_dtype and tensor.dtype != given and autocast_dtype(tensor) != dtype:
            raise TypeError(
                f"{op}: expected tensors of one dtype, got {first}={dtype} and {name}={tensor.dtype}. "
                "Convert one, or use torch.autocast."
            )


def check_integers(op: str, **values: int) -> None:
    """Integers, symbolic ones among them.

    Raises:
        TypeError: something else.
    """
    for name, value in values.items():
        if isinstance(value, (bool, float, str)):
            raise TypeError(f"{op}: expected an integer, got {name}={value!r}.")


def check_slice(op: str, start: int, stop: int, num_channels: int, channels_name: str) -> None:
    """0 <= start <= stop <= num_channels.

    Raises:
        TypeError: not integers. ValueError: out of order or out of range.
    """
    check_integers(op, start=start, stop=stop)
    if not 0 <= start <= stop <= num_channels:
        raise ValueError(
            f"{op}: expected 0 <= start <= stop <= {channels_name}={num_channels}, got start={start}, stop={stop}."
        )


def check_live(op: str, input: Tensor, full: Tensor, start: int, stop: int, dim: int) -> None:
    """`input` is `full` narrowed to [start, stop).

    Raises:
        ValueError: another shape.
    """
    expected = list(full.shape)
    expected[dim] = stop - start
    if list(input.shape) != expected:
        raise ValueError(
            f"{op}: expected input to be the live part of full, of shape {tuple(expected)}, "
            f"got input of shape {tuple(input.shape)}. Without `full`, input is the whole feature."
        )


def is_autocast(device_type: str) -> bool:
    """Whether autocast is on; it knows no meta device, where shapes are inferred."""
    # Not torch.amp.is_autocast_available, which torch.compile of 2.11 cannot trace.
    return device_type != "meta" and torch.is_autocast_enabled(device_type)


def autocast_dtype(tensor: Tensor, wide: bool = False) -> torch.dtype:
    """The dtype that autocast would cast a tensor to for a convolution or a linear: the device's in force.

    With `wide`: for a normalisation, float32. As stock autocast: float64 stays, and what is not floating.
    """
    if not is_autocast(tensor.device.type) or tensor.dtype == torch.float64 or not tensor.is_floating_point():
        return tensor.dtype
    return torch.float32 if wide else torch.get_autocast_dtype(tensor.device.type)


def autocast(*tensors: Tensor | None, wide: bool = False) -> list[Tensor | None]:
    """Casts tensors to their `autocast_dtype`, differentiably.

    `register_autocast` knows one fixed dtype, and a Function's body would be cast or not depending on what it calls.
    """
    first = next((tensor for tensor in tensors if tensor is not None), None)
    if first is None or not is_autocast(first.device.type):
        return list(tensors)  # as casting would; asking is faster
    return [None if tensor is None else tensor.to(autocast_dtype(tensor, wide)) for tensor in tensors]


def no_autocast(device_type: str) -> contextlib.AbstractContextManager:
    """Inside an op the dtypes are settled."""
    if not is_autocast(device_type):  # torch.autocast takes 10 us, a small layer not much longer
        return contextlib.nullcontext()
    return torch.autocast(device_type, enabled=False)


def creating_graph() -> bool:
    """Whether this backward is itself being differentiated (`create_graph=True`)."""
    return torch.is_grad_enabled() and not torch.compiler.is_compiling()
