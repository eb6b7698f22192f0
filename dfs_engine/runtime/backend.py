"""Which backends there are here, which one is asked for, and which one ran.

`reference` is the oracle, `aten` the floor that everyone has, `cpp` and `triton` the kernels of this project. An
explicit request works or raises; the automatic choice (`runtime.choice`) says once why a faster backend is missing.
"""

import contextlib
import importlib
import importlib.util
import logging
import os
from collections.abc import Callable, Iterator

import torch

from dfs_engine.checks import check_choice, check_no_transform
from dfs_engine.kernels.config import INTERPRETED

logger = logging.getLogger(__name__)

BACKENDS = ("reference", "aten", "cpp", "triton")
# What `variant="split"` asks its layers' ops for, two stock calls each: a form to compare with, offered to nobody else.
SPLIT = "split"
OPS = ("partitioned_conv2d", "partitioned_linear", "partitioned_norm_linear", "norm_act", "conv_act")

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
# backend -> op -> the dtypes in which this project's code computes it; in half precision `cpp` does it in float32 where
# the CPU lacks the instructions. `reference` and `aten` are stock operators, and take what those take.
KERNEL_DTYPES: dict[str, dict[str, tuple[torch.dtype, ...]]] = {
    "cpp": {
        "partitioned_conv2d": _FLOATS,
        "partitioned_linear": _FLOATS,
        "partitioned_norm_linear": _FLOATS,
        "norm_act": (torch.float32, torch.bfloat16),
        "dropout": (torch.float32, torch.bfloat16),
        "conv_act": (torch.float32, torch.bfloat16),
    },
    "triton": {op: _FLOATS for op in OPS if op != "conv_act"},
}
# Of the ops that `cpp` has several kernels of (`runtime.choice` describes them): their passes, and who serves each. An
# op's `backend=` may name one, as in "cpp:winograd"; passes that lack it are served as usual.
CPP_KERNELS: dict[str, dict[str, tuple[str, ...]]] = {
    "partitioned_conv2d": {
        "conv2d": ("aten", "winograd", "depthwise"),
        "conv2d_grad_input": ("aten", "winograd", "depthwise"),
        "conv2d_grad_weight": ("aten", "winograd", "depthwise", "gemm"),
    },
    "partitioned_linear": {
        "linear": ("aten", "onednn", "gemm"),
        "linear_grad_input": ("aten", "onednn", "gemm"),
        "linear_grad_weight": ("aten", "gemm"),
    },
    "conv_act": {"conv_act_forward": ("aten", "winograd", "onednn")},
}

# The request in force when an op names none: the environment's, until `use_backend` sets another for a block.
_request: str | None = os.environ.get("DFS_BACKEND") or None
_last_used: dict[str, str] = {}
_said: set[str] = set()


def _load_extension() -> str | None:
    """Loads csrc's kernels into the dispatcher; returns why it cannot, or None.

    Raises:
        ValueError: DFS_CPU is no instruction set.
    """
    if INTERPRETED:
        return "TRITON_INTERPRET=1 is set, with which the Triton kernels serve CPU tensors in its place"
    try:
        extension = importlib.import_module("dfs_engine._C")
    except ImportError as error:
        return (
            f"the C++ extension dfs_engine._C is not built for this torch ({error}); "
            "install g++ and run `pip install --no-build-isolation -e .`"
        )
    if limit := os.environ.get("DFS_CPU"):
        extension.limit_instruction_set(check_choice("DFS_CPU", limit, ("baseline", "avx2", "avx512")))
    return None


_extension_missing = _load_extension()

# Looked up at import, because torch.compile traces what reads it.
_has_triton = importlib.util.find_spec("triton") is not None


def unavailable_reason(backend: str, device: torch.device | str = "cpu") -> str | None:
    """Why `backend` cannot run on `device` here, or None if it can; "cuda" is the current GPU."""
    check_choice("backend", backend, BACKENDS)
    device = torch.device(device)
    if backend == "triton":
        return _triton_unavailable(device)
    if backend == "cpp":
        if device.type != "cpu":
            return f"the cpp backend computes on cpu tensors, got {device.type}"
        return _extension_missing
    return None


def _triton_unavailable(device: torch.device) -> str | None:
    if not _has_triton:
        return "Triton is not installed; run `pip install triton`"
    if INTERPRETED:
        if device.type == "cpu":
            return None
        return f"the triton backend computes on cpu tensors while TRITON_INTERPRET=1 is set, got {device.type}"
    if device.type != "cuda":
        return (
            f"the triton backend computes on cuda tensors, got {device.type} "
            "(TRITON_INTERPRET=1, set before Python starts, runs it on the CPU, slowly)"
        )
    if not torch.cuda.is_available():
        return "the triton backend computes on cuda tensors, and torch sees no CUDA device"
    gpu = torch.cuda.get_device_properties(device)
    if gpu.major < 8:
        return f"the triton backend needs compute capability 8.0, and {gpu.name} has {gpu.major}.{gpu.minor}"
    return None


def unsupported_dtype(op: str, backend: str, dtype: torch.dtype) -> str | None:
    """Why `backend` refuses `op` on tensors of `dtype` here, or None if it takes them."""
    if backend not in KERNEL_DTYPES:
        return None
    if op not in KERNEL_DTYPES[backend]:
        return f"it has no kernel of {op}"
    if dtype not in KERNEL_DTYPES[backend][op]:
        names = ", ".join(str(known).removeprefix("torch.") for known in KERNEL_DTYPES[backend][op])
        return f"it has no kernel for {str(dtype).removeprefix('torch.')}, only for {names}"
    if backend == "triton" and INTERPRETED and dtype == torch.bfloat16:
        return "Triton's interpreter computes bfloat16 wrongly"
    return None


def _kernels_of(op: str) -> list[str]:
    """The names of the cpp backend's kernels of an op, of any of its passes."""
    passes = CPP_KERNELS.get(op, {}).values()
    return list(dict.fromkeys(f"cpp:{kernel}" for kernels in passes for kernel in kernels))


def check_request(op: str, backend: str, device: torch.device, dtype: torch.dtype) -> None:
    """That an explicit request can be served.

    Raises:
        RuntimeError: the backend cannot run on this device, or has no kernel of `op` for this dtype, or of this name.
    """
    name, _, kernel = backend.partition(":")
    reason, remedy = unavailable_reason(name, device), ""
    if reason is None:
        reason = unsupported_dtype(op, name, dtype)
        remedy = " Use backend='aten' or 'auto', or convert the tensors (or the model) to another dtype."
    if reason is None and kernel and backend not in _kernels_of(op):
        reason = f"it has only {', '.join(_kernels_of(op)) or 'one kernel'}"
        remedy = f" Use one of these, or backend={name!r}."
    if reason is not None:
        raise RuntimeError(f"{op}: backend {backend!r} was requested, but {reason}.{remedy}")


def check_backend(name: str | None) -> str | None:
    """Returns None for None and "auto", the name of a known backend otherwise.

    Raises:
        ValueError: unknown name.
    """
    return None if name in (None, "auto") else check_choice("backend", name, BACKENDS)


def requested(backend: str | None = None) -> str | None:
    """The explicit request in force: an op's argument, else `use_backend`, else DFS_BACKEND, else None.

    The argument may also name a kernel, as in "cpp:winograd".
    """
    if backend == SPLIT or (isinstance(backend, str) and backend.startswith("cpp:")):
        return backend
    return check_backend(backend) or check_backend(_request)


def select(
    op: str,
    device: torch.device,
    dtype: torch.dtype,
    backend: str | None = None,
    wins: Callable[[str], bool] = lambda kernels: kernels == "cpp",
) -> str:
    """Picks the backend that serves `op`, and remembers it for `last_used`.

    In a graph that torch.export makes, it is `aten` whatever is asked for: its operators are those that every runtime
    has.

    Args:
        op: one of `OPS`.
        backend: an explicit request (see `requested`); None or "auto" picks: this project's kernels for the device
            (`cpp` on the CPU, `triton` on CUDA) where they are there, take the dtype and win, else `aten`.
        wins: whether the kernels of the backend that it is given beat `aten` on the shape at hand. Default: `cpp`'s do,
            `triton`'s do not.

    Raises:
        RuntimeError: the requested backend cannot run on this device, or has no kernel for this dtype; any but
            `reference` under a transform of torch.func.
    """
    explicit = requested(backend)
    if torch.compiler.is_exporting():
        return "aten"
    if explicit not in ("reference", SPLIT):
        check_no_transform(op)
    if explicit == SPLIT:
        chosen = SPLIT
    elif explicit is not None:
        check_request(op, explicit, device, dtype)
        chosen = explicit
    else:
        chosen = _automatic(device, lambda kernels: unsupported_dtype(op, kernels, dtype) is None and wins(kernels))
    record(op, chosen)
    return chosen


def record(op: str, used: str) -> None:
    """Remembers for `last_used` the backend that serves an op, or the kernel that serves one of its passes."""
    if not torch.compiler.is_compiling():
        if op in CPP_KERNELS:
            _last_used.pop(_forward(op), None)  # of an earlier call
        _last_used[op] = used


def _automatic(device: torch.device, wins: Callable[[str], bool]) -> str:
    if device.type == "cuda":
        return "triton" if wins("triton") and unavailable_reason("triton", device) is None else "aten"
    if device.type != "cpu":
        return "aten"
    if _extension_missing is None:
        return "cpp" if wins("cpp") else "aten"
    if _extension_missing not in _said and not torch.compiler.is_compiling():
        _said.add(_extension_missing)
        logger.warning("backend: using aten, because %s.", _extension_missing)
    return "aten"


def last_used(op: str) -> str | None:
    """What served the last eager call of `op`, or None if it has not run: "aten", "cpp:winograd", "triton".

    Args:
        op: one of `OPS`, which tells of its forward; or one of its passes, as in "conv2d_grad_weight".
    """
    passes = [name for names in CPP_KERNELS.values() for name in names]
    used = _last_used.get(check_choice("op", op, [*OPS, *passes]))
    if used is not None and used.startswith("cpp") and op in CPP_KERNELS:
        return last_used(_forward(op)) or used
    return f"cpp:{used}" if used is not None and op in passes else used


def _forward(op: str) -> str:
    """The first of its passes."""
    return next(iter(CPP_KERNELS[op]))


@contextlib.contextmanager
def use_backend(name: str | None) -> Iterator[None]:
    """Requests a backend for every op called in the block, process-wide; an op's own `backend=` argument still wins."""
    global _request
    previous, _request = _request, check_backend(name)
    try:
        yield
    finally:
        _request = previous
