"""Memory that does not suffice, in words that name the batch size."""

import contextlib
from collections.abc import Iterator

import torch

from dfs_engine.checks import one_line


@contextlib.contextmanager
def batch_in_memory(argument: str, batch_size: int, remedy: str = "") -> Iterator[None]:
    """Raises MemoryError, naming the argument, where the block runs out of the CPU's or an accelerator's memory.

    Args:
        remedy: what helps besides a smaller batch.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not _is_out_of_memory(error):
            raise
        reason = one_line(error) or type(error).__name__
        raise MemoryError(
            f"{argument}: expected a batch that fits into memory, got {batch_size} ({reason}). "
            f"Lower --{argument}{remedy}."
        ) from error


def _is_out_of_memory(error: Exception) -> bool:
    # On the CPU torch has no exception of its own for it.
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in str(error)
