"""Models by name."""

import fnmatch
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, NamedTuple, TypeVar

from dfs_engine.checks import nearest_name
from dfs_engine.models.multi_exit import MultiExitModel
from dfs_engine.nn import Fork, convert_layers


class Family(NamedTuple):
    """What builds a model around its fork, and how the published models of its kind are split.

    Attributes:
        create: (fork, num_classes=, and the family's own options) -> model.
        exit_gradient: what an exit trains of the feature that it reads.
        dim: channel axis of the features.
    """

    create: Callable[..., MultiExitModel]
    exit_gradient: str
    dim: int = 1


class Catalogue(NamedTuple):
    """Models that another library names; it is imported only when asked for one of them."""

    description: str
    names: Callable[[str], list[str]]
    family: Family


_families: dict[str, Family] = {}
_catalogues: list[Catalogue] = []
_Create = TypeVar("_Create", bound=Callable[..., MultiExitModel])


def register_models(names: Iterable[str], exit_gradient: str, dim: int = 1) -> Callable[[_Create], _Create]:
    """Makes models known that a function builds, which gets their name and a fork; see `Family`."""

    def register(create: _Create) -> _Create:
        for name in names:
            _families[name] = Family(partial(create, name), exit_gradient, dim)
        return create

    return register


def register_catalogue(description: str, names: Callable[[str], list[str]], family: Family) -> None:
    """Makes models known by the names that another library gives them.

    Args:
        description: of what it holds, for error messages.
        names: those that match a shell pattern; a name matches itself.
        family: whose `create` takes the name first.
    """
    _catalogues.append(Catalogue(description, names, family))


def list_models(pattern: str | None = None) -> list[str]:
    """Names of the models of this package; with a shell pattern, e.g. "vit_*", also of timm's that can have exits."""
    if pattern is None:
        return sorted(_families)
    others = {name for catalogue in _catalogues for name in catalogue.names(pattern)}
    return sorted({*fnmatch.filter(_families, pattern), *others})


def check_model(name: str, argument: str = "model") -> str:
    """Returns `name` if `create_model` knows it.

    Raises:
        ValueError: naming the argument, the value, what is valid and the nearest name.
    """
    _family(name, argument)
    return name


def _family(name: str, argument: str) -> Family:
    if name in _families:
        return _families[name]
    for catalogue in _catalogues:
        if isinstance(name, str) and name in catalogue.names(name):
            return catalogue.family._replace(create=partial(catalogue.family.create, name))
    valid = [*sorted(_families), *(catalogue.description for catalogue in _catalogues)]
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
    family = _family(name, "model")
    if isinstance(num_classes, bool) or not isinstance(num_classes, int) or num_classes < 1:
        raise ValueError(f"num_classes: expected a positive integer, got {num_classes!r}.")
    fork = Fork(
        beta,
        variant,
        reference=reference,
        exit_gradient=exit_gradient or family.exit_gradient,
        dim=family.dim,
        backend=backend,
    )
    model = family.create(fork, num_classes=num_classes, **options)
    convert_layers(model, variant, backend)
    # Where the weights lie and where they came from is no part of what the model is.
    kept = {key: value for key, value in options.items() if key not in ("device", "dtype", "pretrained")}
    model.name, model.options, model.create = name, kept | model.options, create_model
    return model
