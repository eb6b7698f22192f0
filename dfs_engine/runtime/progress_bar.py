"""The progress bar of a long measurement or comparison: tqdm's; none where tqdm is not installed, or in no terminal."""

import importlib.util
from typing import Any


def progress_bar(total: int, unit: str, enabled: bool) -> Any:
    """A context manager with tqdm's `update` and `set_description`."""
    if importlib.util.find_spec("tqdm") is None:
        return _NoBar()
    from tqdm import tqdm

    return tqdm(total=total, unit=unit, disable=None if enabled else True)


class _NoBar:
    def __enter__(self) -> "_NoBar":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def update(self, count: int = 1) -> None:
        pass

    def set_description(self, text: str) -> None:
        pass
