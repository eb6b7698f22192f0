"""Checks that all share: of names, lists and numbers as a configuration gives them; of torch.func's transforms."""

import difflib
import math
from collections.abc import Iterable, Mapping

import torch


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


def check_numbers(config: object, prefix: str, ranges: Mapping[str, Iterable[str]]) -> None:
    """Checks fields of a configuration.

    Args:
        prefix: of the fields' names in messages: "optim.".
        ranges: ">= 1", "> 0" or an interval, "[0, 1)", -> the fields that have to be in it. One whose default is None
            may be None.

    Raises:
        ValueError: a number outside its range, or not finite, or no number.
    """
    for interval, names in ranges.items():
        for name in names:
            value, is_optional = getattr(config, name), getattr(type(config), name, "") is None
            if (value is None and is_optional) or _lies_in(value, interval):
                continue
            expected = interval if interval.startswith(">") else f"in {interval}"
            remedy = " Leave it out for its default." if is_optional else ""
            raise ValueError(f"{prefix}{name}: expected a number {expected}, got {value!r}.{remedy}")


def _lies_in(value: object, interval: str) -> bool:
    if not isinstance(value, (int, float)) or not math.isfinite(value):
        return False
    lowest, _, highest = interval.strip("[(>=)] ").partition(", ")
    above = value > float(lowest) or (value == float(lowest) and interval.startswith(("[", ">=")))
    return above and (not highest or value < float(highest) or (value == float(highest) and interval.endswith("]")))


def one_line(error: Exception, length: int = 200) -> str:
    """The beginning of what an exception of another library says, for a message of this one's."""
    return " ".join(str(error).split())[:length]


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


def is_transforming() -> bool:
    """Whether one of torch.func's transforms is active. torch.compile says by itself what it cannot trace."""
    # As torch.autograd.Function asks.
    return not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active()


def check_no_transform(op: str) -> None:
    """That none of torch.func's transforms is active, which would want to go through a backward of this engine's.

    Raises:
        RuntimeError: one is.
    """
    if is_transforming():
        raise RuntimeError(
            f"{op}: torch.func's transforms (grad, vmap, jvp, jacrev, hessian, ...) cannot go through this engine's "
            "backward. Use backend='reference' for an op, variant='detach' for a model or a Fork: the same gradients, "
            "by stock autograd."
        )
