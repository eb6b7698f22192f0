"""The rows of a comparison: a name each, and the flags of `dfs train` by which it parts from the recipe."""

import functools
import itertools
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

from dfs_engine.checks import check_choice, nearest_name
from dfs_engine.training.config import TrainConfig

# A folder of that name is made for each run.
_NAME = re.compile(r"[A-Za-z0-9][\w.+-]*")
_SEEDS = "seeds"
# These are the comparison's to choose.
_RESERVED = {"seed": f"`{_SEEDS}`, their number", "run_dir": "--output", "resume": "the same command again"}


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        name: also the beginning of its runs' folders.
        flags: dotted name -> value, of what it changes in the recipe: ``{"model.variant": "dense"}``.
        num_seeds: if it is not the comparison's.
    """

    name: str
    flags: Mapping[str, Any]
    num_seeds: int | None = None

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name):
            raise ValueError(
                f"rows: expected names of letters, digits and .+-_, which make folders, got {self.name!r}. Rename it."
            )
        for flag in self.flags.keys() & _RESERVED.keys():
            raise ValueError(
                f"rows: {self.name}: expected no {flag}, which the comparison sets. Use {_RESERVED[flag]}."
            )
        if self.num_seeds is not None and (not isinstance(self.num_seeds, int) or self.num_seeds < 1):
            raise ValueError(f"rows: {self.name}: {_SEEDS}: expected a number >= 1, got {self.num_seeds!r}.")

    def config(self, recipe: TrainConfig) -> TrainConfig:
        """The recipe with this row's flags.

        Raises:
            ValueError: a flag that `dfs train` does not have, or a value that it refuses.
        """
        try:
            return with_flags(recipe, self.flags)
        except (ValueError, TypeError) as error:
            raise ValueError(f"rows: {self.name}: {error}") from None


def with_flags(recipe: TrainConfig, flags: Mapping[str, Any]) -> TrainConfig:
    """`recipe` with options changed, by their dotted names; their values may be text, as on a command line."""
    options = recipe.to_dict()
    for flag, value in flags.items():
        *groups, name = flag.split(".")
        group = options
        for part in groups:
            group = group.get(part, {}) if isinstance(group, dict) else {}
        if name not in group and groups[-1:] != ["options"]:  # whose names are the model's
            known = list(_names(options))
            raise ValueError(f"expected an option of `dfs train`, got {flag!r}.{nearest_name(flag, known)}")
        group[name] = value
    return _parsed(options)


def values_of(config: TrainConfig, flags: Iterable[str]) -> dict[str, Any]:
    """By their dotted names, the values that `config` has of options."""
    found = {}
    for flag in flags:
        value: Any = config.to_dict()
        for part in flag.split("."):
            value = value[part]
        found[flag] = value
    return found


def _names(options: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for name, value in options.items():
        if isinstance(value, dict) and name != "options":
            yield from _names(value, f"{prefix}{name}.")
        else:
            yield prefix + name


@functools.cache
def _parser() -> Any:
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(TrainConfig)
    return parser


def _parsed(options: dict[str, Any]) -> TrainConfig:
    from jsonargparse import ArgumentError

    try:
        values = _parser().instantiate(_parser().parse_object(options))
    except ArgumentError as error:
        raise ValueError(" ".join(str(error).split())) from None
    return TrainConfig(**vars(values))


def list_row_files() -> list[str]:
    """Names of the lists of rows that come with the package: `configs/rows/`."""
    return sorted(path.stem for path in _folder().glob("*.yaml"))


def _folder() -> Path:
    return Path(str(files("dfs_engine.configs").joinpath("digits_vgg7_dfs.yaml"))).parent / "rows"


def read_rows(source: str | Mapping[str, Any]) -> list[Row]:
    """Rows from a YAML file, from one of `list_row_files()` by its name, or from what such a file holds.

    It maps each row's name to its flags, dotted or nested, and to `seeds`, if it has a number of its own.

    Raises:
        ValueError: no such file, or something else in it.
    """
    return list(_rows_of(source if isinstance(source, Mapping) else _read(source)))


def _read(name_or_path: str) -> Any:
    path = Path(name_or_path).expanduser()
    if not path.is_file():
        if path.suffix in (".yaml", ".yml") or path.parent != Path("."):
            known = ", ".join(list_row_files())
            raise ValueError(f"rows: expected a file, or one of {known}, got {name_or_path} (nothing there).")
        path = _folder() / f"{check_choice('rows', name_or_path, list_row_files())}.yaml"
    try:
        return yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise ValueError(f"rows: expected YAML in {path}, got: {' '.join(str(error).split())}") from None


def _rows_of(listed: Any) -> Iterator[Row]:
    if not isinstance(listed, Mapping) or not listed:
        raise ValueError(f"rows: expected NAME: {{FLAG: VALUE, ...}}, got {str(listed)[:80]!r}.")
    for name, options in listed.items():
        if not isinstance(options or {}, Mapping):
            raise ValueError(f"rows: {name}: expected {{FLAG: VALUE, ...}}, got {str(options)[:80]!r}.")
        flags = dict(_dotted(options or {}))
        yield Row(str(name), flags, flags.pop(_SEEDS, None))


def _dotted(options: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in options.items():
        if isinstance(value, Mapping) and value:
            yield from _dotted(value, f"{prefix}{name}.")
        else:
            yield prefix + str(name), value


def grid(
    methods: Sequence[str], variants: Sequence[str], models: Sequence[str] = (), betas: Sequence[float] = ()
) -> list[Row]:
    """A row for every combination, named by what tells it from the others: ``dfs+byot``, ``resnet18-dense``.

    Args:
        methods: `joint` is not named.
        models, betas: none: the recipe's. Variant `dense` has no beta.
    """
    rows = {}
    all_betas: list[float | None] = [*betas] or [None]
    for model, method, variant, beta in itertools.product(models or [""], methods, variants, all_betas):
        flags: dict[str, Any] = {"method": method, "model.variant": variant}
        flags |= {"model.name": model} if model else {}
        has_beta = beta is not None and variant != "dense"
        flags |= {"model.beta": beta} if has_beta else {}
        name = "".join((
            f"{model}-" if len(models) > 1 else "",
            variant,
            f"-beta{beta:g}" if has_beta and len(betas) > 1 else "",
            f"+{method}" if method != "joint" else "",
        ))  # fmt: skip
        rows[name] = Row(name, flags)
    return list(rows.values())
