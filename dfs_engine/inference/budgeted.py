"""Budgeted batch classification (Huang et al., ICLR 2018): accuracy at a mean cost, thresholds from held-out samples.

For p = 0.05, 0.1, ..., 2 a share in proportion to p**k of the samples is to leave at exit k. The confidence from which
on they leave is found on samples kept out of training (`thresholds.find_by_shares`), and applied to the test samples.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from dfs_engine.inference.per_sample import HELD_OUT, Outputs
from dfs_engine.inference.thresholds import PUBLISHED_RATIOS, find_by_shares, geometric_shares, route


class BudgetedPoint(NamedTuple):
    """One budget.

    Attributes:
        p: below 1 most leave early, above late.
        accuracy: of the test samples, in [0, 1].
        cost: of a test sample in the mean, in the unit of the costs.
        exits: share of the test samples that leaves at each exit.
        thresholds: of each exit but the last, infinite where nobody leaves; `MaxProbability(thresholds)` is the policy.
    """

    p: float
    accuracy: float
    cost: float
    exits: list[float]
    thresholds: list[float]


def budgeted_batch(held_out: Outputs, test: Outputs, costs: Sequence[float]) -> list[BudgetedPoint]:
    """Accuracy and mean cost on `test` at the 40 published budgets.

    Args:
        held_out: of samples that the network was not trained on and is not measured on; their split is "val".
        costs: of each exit, what a sample costs that leaves there, with all that has run by then.

    Raises:
        ValueError: thresholds asked of test samples, or outputs and costs that do not fit each other.
    """
    check_held_out(held_out, test)
    num_exits, num_samples = test.confidence.shape
    if not len(held_out.confidence) == num_exits == len(costs) or 0 in (num_samples, held_out.labels.numel()):
        raise ValueError(
            "budgeted_batch: expected one cost for each exit and at least one sample, got "
            f"{tuple(held_out.confidence.shape)} held-out and {tuple(test.confidence.shape)} test outputs "
            f"(num_exits, N), and {len(costs)} costs."
        )
    thresholds = find_by_shares(held_out.confidence[:-1], geometric_shares(num_exits))
    prices, points = torch.tensor(costs, dtype=torch.float64), []
    for p, row in zip(PUBLISHED_RATIOS, thresholds, strict=True):
        first = route(test.confidence, row)
        exits = first.bincount(minlength=num_exits).double() / num_samples
        accuracy = test.is_right.gather(0, first[None]).double().mean().item()
        points.append(BudgetedPoint(p, accuracy, (exits @ prices).item(), exits.tolist(), row.tolist()))
    return points


def check_held_out(held_out: Outputs, test: Outputs) -> None:
    """Raises ValueError if thresholds are asked of samples that are not held-out ones, or of the test samples."""
    is_test = held_out.confidence is test.confidence or torch.equal(held_out.confidence, test.confidence)
    if held_out.split != HELD_OUT or is_test:
        raise ValueError(
            f"thresholds: expected the outputs of samples kept out of training (split {HELD_OUT!r}), got those of "
            f"{test.split if is_test else held_out.split!r}. Thresholds chosen on the test samples would flatter the "
            "network: train with --data.val_fraction 0.1, which keeps a tenth of the training samples out."
        )
