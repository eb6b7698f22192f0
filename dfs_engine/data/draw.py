"""Shares of a dataset drawn by a seed of their own: a function of the labels, the share and the seed alone."""

from collections.abc import Sequence
from typing import Any

import numpy as np


def draw_share(labels: Sequence[Any], share: float, seed: int) -> tuple[list[int], list[int]]:
    """Splits the positions of `labels` in two, so that both parts have every label as often as its share says.

    Args:
        labels: classes, or numbers, which are then drawn evenly from small to large.
        share: of them to draw, in [0, 1).

    Returns:
        Positions kept, and share * N positions, rounded, drawn, both rising.
    """
    # RandomState's stream is frozen: later versions of NumPy draw the same.
    order = np.random.RandomState(seed).permutation(len(labels))
    order = order[np.argsort(np.asarray(labels)[order], kind="stable")]
    counts = np.floor(share * np.arange(len(labels) + 1) + 0.5)  # of the first so many, how many are drawn
    drawn = np.diff(counts) > 0
    return np.sort(order[~drawn]).tolist(), np.sort(order[drawn]).tolist()
