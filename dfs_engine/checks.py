"""Checks of names and of lists: how a configuration and a command line say "this" or "these of those"."""

import difflib
from collections.abc import Iterable


def check_choice(argument: str, value: object, valid: Iterable[str]) -> str:
    """Returns `value` if it is one of `valid`.

    Raises:
        ValueError: naming the argument, the value, every valid name and the nearest one.
    """
    names = list(valid)
    if isinstance(value, str) and value in names:
        return value
    raise ValueError(f"{argument}: expected one of {', '.join(names)}, got {value!r}.{nearest_name(value, names)}")


def nearest_name(value: object, valid: Iterable[str]) -> str:
    """What an error message adds: a question with the name that looks most like `value`, if any does."""
    nearest = difflib.get_close_matches(str(value), list(valid), n=1)
    return f" Did you mean {nearest[0]!r}?" if nearest else ""


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


def split_betas(argument: str, value: str) -> list[float]:
    """The shares of channels in `value`, in order, without repeats.

    Raises:
        ValueError: an empty list, or something else than a number in [0, 1].
    """
    try:
        numbers = [float(part) for part in value.split(",") if part.strip()]
    except ValueError:
        numbers = []
    if not numbers or not all(0 <= number <= 1 for number in numbers):
        raise ValueError(f"{argument}: expected comma-separated numbers in [0, 1], got {value!r}.")
    return list(dict.fromkeys(numbers))
