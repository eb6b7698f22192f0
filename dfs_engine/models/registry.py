"""Models by name."""

import fnmatch
from collections.abc import Callable
from typing import Any

from dfs_engine.models.multi_exit import MultiExitModel
from dfs_engine.names import check_choice

_entrypoints: dict[str, Callable[..., MultiExitModel]] = {}


def register_model(entrypoint: Callable[..., MultiExitModel]) -> Callable[..., MultiExitModel]:
    """Makes a function that builds a model known by its own name."""
    _entrypoints[entrypoint.__name__] = entrypoint
    return entrypoint


def list_models(pattern: str = "*") -> list[str]:
    """Names of the registered models that match a shell pattern, e.g. "vgg*"."""
    return sorted(fnmatch.filter(_entrypoints, pattern))


def create_model(
    name: str,
    *,
    num_classes: int = 10,
    beta: float = 0.5,
    variant: str = "dfs",
    reference: bool = True,
    exit_gradient: str | None = None,
    backend: str | None = None,
    **options: Any,
) -> MultiExitModel:
    """Builds a multi-exit model.

    Args:
        name: one of `list_models()`.
        num_classes: width of every exit's logits.
        beta: share of each split feature's channels that deeper exits train, in [0, 1].
        variant: "dense", "detach", "split" or "dfs"; they share one state_dict layout.
        reference: whether the deeper path and the exit look at each other's part (feature referencing).
        exit_gradient: "own" or "whole": what an exit trains of the feature it reads; None: the family's published one.
        backend: of the partitioned ops; None picks the fastest.
        options: the family's own, e.g. `width` of VGG; `device` and `dtype` of the parameters.

    Raises:
        ValueError: an unknown name or value, naming the valid ones. TypeError: an option the family does not have.
    """
    check_choice("model", name, list_models())
    if isinstance(num_classes, bool) or not isinstance(num_classes, int) or num_classes < 1:
        raise ValueError(f"num_classes: expected a positive integer, got {num_classes!r}.")
    model = _entrypoints[name](
        num_classes=num_classes,
        beta=beta,
        variant=variant,
        reference=reference,
        exit_gradient=exit_gradient,
        backend=backend,
        **options,
    )
    kept = {key: value for key, value in options.items() if key not in ("device", "dtype")}
    model.name, model.options = name, kept
    return model
