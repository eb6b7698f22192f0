"""Comma-separated numbers and common checks of the benchmarks' flags."""

import torch

LAYOUTS = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}


def split_ints(argument: str, value: str, least: int = 1) -> list[int]:
    """The integers in `value`, in order, without repeats.

    Raises:
        ValueError: an empty list, something else than an integer, or one below `least`.
    """
    try:
        numbers = [int(part) for part in value.split(",") if part.strip()]
    except ValueError:
        numbers = []
    if not numbers or min(numbers) < least:
        raise ValueError(f"{argument}: expected comma-separated integers of at least {least}, got {value!r}.")
    return list(dict.fromkeys(numbers))


def check_least(config: object, minima: dict[str, int]) -> None:
    """Raises ValueError for a field of `config` that is neither None nor at least its minimum."""
    for name, least in minima.items():
        value = getattr(config, name)
        if value is not None and value < least:
            raise ValueError(f"{name}: expected at least {least}, got {value}.")
