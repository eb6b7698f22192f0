"""Models by name."""

import fnmatch
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

from dfs_engine.models.multi_exit import MultiExitModel
from dfs_engine.names import nearest_name

Entrypoint = Callable[..., MultiExitModel]


class Catalogue(NamedTuple):
    """Models that another library names; it is imported only when asked for one of them."""

    description: str
    names: Callable[[str], list[str]]
    create: Entrypoint


_entrypoints: dict[str, Entrypoint] = {}
_catalogues: list[Catalogue] = []


def register_model(entrypoint: Entrypoint) -> Entrypoint:
    """Makes a function that builds a model known by its own name."""
    _entrypoints[entrypoint.__name__] = entrypoint
    return entrypoint


def register_catalogue(description: str, names: Callable[[str], list[str]], create: Entrypoint) -> None:
    """Makes models known by the names that another library gives them.

    Args:
        description: of what it holds, for error messages.
        names: those that match a shell pattern; a name matches itself.
        create: builds the model of its first argument.
    """
    _catalogues.append(Catalogue(description, names, create))


def list_models(pattern: str | None = None) -> list[str]:
    """Names of the models of this package; with a shell pattern, e.g. "vit_*", also of timm's that can have exits."""
    if pattern is None:
        return sorted(_entrypoints)
    others = {name for catalogue in _catalogues for name in catalogue.names(pattern)}
    return sorted({*fnmatch.filter(_entrypoints, pattern), *others})


def check_model(name: str, argument: str = "model") -> str:
    """Returns `name` if `create_model` knows it.

    Raises:
        ValueError: naming the argument, the value, what is valid and the nearest name.
    """
    _entrypoint(name, argument)
    return name


def _entrypoint(name: str, argument: str) -> Entrypoint:
    if name in _entrypoints:
        return _entrypoints[name]
    for catalogue in _catalogues:
        if isinstance(name, str) and name in catalogue.names(name):
            return partial(catalogue.create, name)
    valid = [*sorted(_entrypoints), *(catalogue.description for catalogue in _catalogues)]
    raise ValueError(
        f"{argument}: expected one of {', '.join(valid)}, got {name!r}.{nearest_name(name, list_models('*'))}"
    )


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
        name: one of `list_models("*")`.
        num_classes: width of every exit's logits.
        beta: share of each split feature's channels that deeper exits train, in [0, 1].
        variant: "dense", "detach", "split" or "dfs"; they share one state_dict layout.
        reference: whether the deeper path and the exit look at each other's part (feature referencing).
        exit_gradient: "own" or "whole": what an exit trains of the feature it reads; None: the family's published one.
        backend: of the partitioned ops; None picks the fastest.
        options: the family's own, e.g. `width` of VGG; `device` and `dtype` of the parameters; `pretrained` where the
            family has it.

    Raises:
        ValueError: an unknown name or value, naming the valid ones. TypeError: an option the family does not have.
    """
    entrypoint = _entrypoint(name, "model")
    if isinstance(num_classes, bool) or not isinstance(num_classes, int) or num_classes < 1:
        raise ValueError(f"num_classes: expected a positive integer, got {num_classes!r}.")
    model = entrypoint(
        num_classes=num_classes,
        beta=beta,
        variant=variant,
        reference=reference,
        exit_gradient=exit_gradient,
        backend=backend,
        **options,
    )
    # Where the weights lie and where they came from is no part of what the model is.
    kept = {key: value for key, value in options.items() if key not in ("device", "dtype", "pretrained")}
    model.name, model.options = name, kept | model.options
    return model
