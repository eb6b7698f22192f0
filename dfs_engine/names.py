"""Checks of a name against the names that exist."""

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
    nearest = difflib.get_close_matches(str(value), names, n=1)
    hint = f" Did you mean {nearest[0]!r}?" if nearest else ""
    raise ValueError(f"{argument}: expected one of {', '.join(names)}, got {value!r}.{hint}")
