"""Training methods: how the exits' losses, and later their gradients, become one update. One file each."""

from collections.abc import Callable, Sequence

from torch import Tensor

from dfs_engine.methods.joint import Joint, exit_losses
from dfs_engine.names import check_choice

Method = Callable[[Sequence[Tensor], Tensor], Tensor]
"""(logits of every exit, shallow to deep; target) -> the scalar that is minimised."""

_METHODS: dict[str, Callable[[], Method]] = {"joint": Joint}


def list_methods() -> list[str]:
    """Names that `create_method` knows."""
    return sorted(_METHODS)


def create_method(name: str) -> Method:
    """Builds a training method by name.

    Raises:
        ValueError: unknown name; the message lists the known ones.
    """
    return _METHODS[check_choice("method", name, _METHODS)]()


__all__ = ["Joint", "Method", "create_method", "exit_losses", "list_methods"]
