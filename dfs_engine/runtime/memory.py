"""A caching allocator for CPU tensors: memory that one training step frees, the next one takes again (csrc/memory.cpp).

The C library gives large blocks back to the system at once, and fresh memory costs a page fault per 4 KiB: up to a
third of a step with large feature maps. On CUDA torch has such an allocator (`torch.cuda.memory`), on the CPU none.
`dfs train` uses this one; in a training loop of one's own, whatever the model:

    dfs_engine.memory.caching_allocator_enable()

What is cached never makes the memory held more than half as much again as live tensors needed at their peak.
"""

import contextlib
from collections.abc import Iterator

from dfs_engine.runtime import backend


def is_available() -> bool:
    """Whether the C++ extension, which it is part of, is built."""
    return backend.unavailable_reason("cpp") is None


def caching_allocator_enable(enabled: bool = True) -> bool:
    """Switches it on or off for all threads of this process; returns what it was.

    Tensors that are there already stay as they are and may be freed at any time. Results do not depend on it. Blocks
    under 256 KiB, pinned and shared memory are left to torch. Off, it keeps what is cached until `empty_cache`.

    Raises:
        RuntimeError: the C++ extension is not built.
    """
    return _extension().caching_allocator_enable(enabled)


@contextlib.contextmanager
def caching_allocator(enabled: bool = True) -> Iterator[None]:
    """On (or off) within the block; where it was off before, what it has cached is freed at the end.

    Raises:
        RuntimeError: `enabled`, and the C++ extension is not built.
    """
    if not enabled and not is_available():
        yield
        return
    before = caching_allocator_enable(enabled)
    try:
        yield
    finally:
        caching_allocator_enable(before)
        if not before:
            empty_cache()


def empty_cache() -> None:
    """Gives cached blocks back to the system, as `torch.cuda.empty_cache` does on CUDA."""
    _extension().empty_cache()


def memory_allocated() -> int:
    """Bytes of the live CPU tensors that come from it."""
    return _extension().memory_allocated()


def memory_reserved() -> int:
    """Bytes of those and of cached blocks."""
    return _extension().memory_reserved()


def _extension():
    reason = backend.unavailable_reason("cpp")
    if reason:
        raise RuntimeError(f"caching allocator: {reason}.")
    from dfs_engine import _C

    return _C
