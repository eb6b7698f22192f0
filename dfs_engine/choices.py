"""Comma-separated lists of names: how a configuration and a command line say "these of those"."""

from collections.abc import Iterable

from dfs_engine.names import check_choice


def split_choices(argument: str, value: str, valid: Iterable[str]) -> list[str]:
    """The names in `value`, in order, without repeats.

    Raises:
        ValueError: an empty list, or a name that is not one of `valid` (which the message lists).
    """
    names = list(valid)
    chosen = [check_choice(argument, name.strip(), names) for name in value.split(",") if name.strip()]
    if not chosen:
        raise ValueError(f"{argument}: expected a comma-separated list of {', '.join(names)}, got {value!r}.")
    return list(dict.fromkeys(chosen))
