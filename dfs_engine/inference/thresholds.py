"""Thresholds for a budget, from held-out logits: budgeted batch classification (Huang et al., ICLR 2018).

A share q_k of the samples is to leave at exit k, with q_k proportional to p**k: at a small p most leave early, at a
large one late. Of those who are still there at exit k the surest leave, as many as this share is; the value of the last
of them is the exit's threshold. Each p gives one operating point: an accuracy at a mean cost.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from dfs_engine.inference.policies import Entropy, MaxProbability, Patience, Policy
from dfs_engine.inference.simulate import check_logits, simulate

PUBLISHED_RATIOS = [index / 20 for index in range(1, 41)]
"""The published values of p, 0.05 ... 2."""
# Those, and others on both sides of them and between.
_RATIOS = sorted({*PUBLISHED_RATIOS} | {2 ** (index / 8) for index in range(-80, 81)})


class OperatingPoint(NamedTuple):
    """What a policy reaches on the held-out samples.

    Attributes:
        policy: for `EarlyExit`.
        accuracy: the share of right classes, in [0, 1].
        cost: the mean over the samples, each of which costs what its exit does.
    """

    policy: Policy
    accuracy: float
    cost: float


@torch.no_grad()
def find_thresholds(
    logits: Sequence[Tensor] | Tensor,
    labels: Tensor,
    family: type[Policy] = MaxProbability,
    *,
    target_accuracy: float | None = None,
    target_cost: float | None = None,
    costs: Sequence[float] | None = None,
) -> OperatingPoint:
    """The cheapest policy of at least an accuracy, or the most accurate one of at most a mean cost.

    Both hold on the samples given; have ones that the model was not trained on, prepared as those of the test are.

    Args:
        logits: of every exit, shallow to deep: num_exits tensors (N, num_classes), or one (num_exits, N, num_classes).
        labels: int64 (N,), the right classes.
        family: `MaxProbability` or `Entropy`, with a threshold for each exit but the last, or `Patience`.
        target_accuracy: in [0, 1]. target_cost: in the unit of `costs`. One of the two.
        costs: of each exit, what a sample costs that leaves there, with all that has run by then, e.g.
            ``[cost.operations for cost in dfs_engine.evaluation.operations.count_operations(model)]``.
            None: 1, 2, ..., num_exits, the number of blocks that run.

    Raises:
        ValueError: a target out of reach (the message says what is in reach), both targets or none, another family,
            or logits, labels and costs that do not fit each other.
    """
    exits = check_logits(logits)
    _check_labels(labels, exits[0])
    prices = _check_costs(costs, len(exits))
    if (target_accuracy is None) == (target_cost is None):
        raise ValueError(
            "find_thresholds: expected one of target_accuracy and target_cost, got "
            f"target_accuracy={target_accuracy} and target_cost={target_cost}."
        )
    points = _operating_points(exits, labels, family, prices)
    if target_accuracy is not None:
        return _cheapest(points, target_accuracy)
    return _most_accurate(points, cast(float, target_cost))


def _check_labels(labels: Tensor, logits: Tensor) -> None:
    if len(logits) == 0 or labels.shape != logits.shape[:1] or labels.is_floating_point():
        raise ValueError(
            f"labels: expected class indices of shape (N,) beside logits (N, num_classes) with N >= 1, got "
            f"{labels.dtype} {tuple(labels.shape)} beside {tuple(logits.shape)}."
        )


def _check_costs(costs: Sequence[float] | None, num_exits: int) -> list[float]:
    prices = [float(cost) for cost in (range(1, num_exits + 1) if costs is None else costs)]
    rises = all(0 <= low <= high < math.inf for low, high in zip(prices, [*prices[1:], *prices[-1:]], strict=True))
    if len(prices) != num_exits or not rises:
        raise ValueError(
            f"costs: expected {num_exits} numbers, 0 or more, that do not fall from exit to exit, got {prices}. The "
            "cost of an exit is that of all that has run by then."
        )
    return prices


def _cheapest(points: list[OperatingPoint], target_accuracy: float) -> OperatingPoint:
    if not 0 <= target_accuracy <= 1:
        raise ValueError(f"target_accuracy: expected a share in [0, 1], got {target_accuracy}. Of percents take 1/100.")
    reached = [point for point in points if point.accuracy >= target_accuracy]
    if not reached:
        best = max(points, key=_by_accuracy)
        raise ValueError(
            f"target_accuracy: expected at most {best.accuracy:.6g}, the best that these exits reach (at a mean cost "
            f"of {best.cost:.6g}), got {target_accuracy}."
        )
    return min(reached, key=lambda point: (point.cost, -point.accuracy))


def _most_accurate(points: list[OperatingPoint], target_cost: float) -> OperatingPoint:
    affordable = [point for point in points if point.cost <= target_cost * (1 + 1e-12)]  # but for rounding
    if not affordable:
        lowest = min(point.cost for point in points)
        raise ValueError(
            f"target_cost: expected at least {lowest:.6g}, the mean cost where all leave as early as they can, got "
            f"{target_cost}."
        )
    return max(affordable, key=_by_accuracy)


def _by_accuracy(point: OperatingPoint) -> tuple[float, float]:
    return point.accuracy, -point.cost


def _operating_points(
    exits: list[Tensor], labels: Tensor, family: type[Policy], costs: list[float]
) -> list[OperatingPoint]:
    kind: Any = family
    is_right = torch.stack([each.argmax(-1) == labels for each in exits])
    if family is Patience:
        policies: list[Policy] = [Patience(length) for length in range(1, len(exits) + 1)]
        return [_measure(policy, simulate(exits, policy).exits, is_right, costs) for policy in policies]
    if family not in (MaxProbability, Entropy):
        raise ValueError(f"family: expected one of the classes MaxProbability, Entropy, Patience, got {family!r}.")
    any_one = kind(kind.limits[0])
    any_one.check(len(exits), exits[0].size(1))
    surest = kind.sign * torch.stack([any_one.value(each) for each in exits])
    thresholds = find_by_shares(surest[:-1], shares_of_exits(len(exits)).to(labels.device))
    found = []
    for row in dict.fromkeys(map(tuple, thresholds.tolist())):
        first = route(surest, surest.new_tensor(row))
        found.append(_measure(kind([kind.sign * each for each in row]), first, is_right, costs))
    return found


def _measure(policy: Policy, exits: Tensor, is_right: Tensor, costs: list[float]) -> OperatingPoint:
    """Args: exits (N,), the one that each sample takes; is_right (num_exits, N)."""
    num_samples = len(exits)
    counts = exits.bincount(minlength=len(costs)).tolist()
    cost = sum(count * price for count, price in zip(counts, costs, strict=True)) / num_samples
    return OperatingPoint(policy, int(is_right.gather(0, exits[None]).sum()) / num_samples, cost)


def shares_of_exits(num_exits: int) -> Tensor:
    """float64 (P, num_exits): what share of the samples leaves where, for each p, and all at each one exit."""
    return torch.cat([geometric_shares(num_exits, _RATIOS), torch.eye(num_exits).double()])


def geometric_shares(num_exits: int, ratios: Sequence[float] = PUBLISHED_RATIOS) -> Tensor:
    """float64 (P, num_exits): of each p, the share p**k / sum over j of p**j of exit k."""
    powers = torch.tensor(ratios, dtype=torch.float64)[:, None] ** torch.arange(num_exits)
    return powers / powers.sum(1, keepdim=True)


def route(surest: Tensor, thresholds: Tensor) -> Tensor:
    """int64 (N,): the first exit from 0 where a sample reaches the threshold; the last one decides about all that come.

    Args:
        surest: (num_exits, N), as in `find_by_shares`. thresholds: (num_exits - 1,).
    """
    leaves = surest[:-1] >= thresholds[:, None]
    return torch.cat([leaves, torch.ones_like(surest[-1:], dtype=torch.bool)]).int().argmax(0)


def find_by_shares(surest: Tensor, shares: Tensor) -> Tensor:
    """For each row of shares, the value at each exit but the last from which on a sample leaves.

    Args:
        surest: (num_exits - 1, N), of each exit but the last: the surer of a sample the higher.
        shares: float64 (P, num_exits), of the samples, that are to leave at each exit.

    Returns:
        (P, num_exits - 1), infinite where no sample is to leave or fewer are left than are to.
    """
    num_samples = surest.size(1)
    stays = torch.ones(len(shares), num_samples, dtype=torch.bool, device=shares.device)
    found = [surest.new_empty(len(shares), 0)]
    for value, share in zip(surest, shares.T, strict=False):
        ranked, order = value.nan_to_num(nan=-math.inf).sort(descending=True)
        wanted = (share * num_samples).floor().int()[:, None]
        counts = stays[:, order].cumsum(1, dtype=torch.int32)
        is_found = (wanted > 0) & (counts[:, -1:] >= wanted)
        place = (counts < wanted).sum(1, keepdim=True).clamp(max=num_samples - 1)
        threshold = torch.where(is_found & ranked[place].isfinite(), ranked[place], math.inf)
        stays &= ~(value >= threshold)
        found.append(threshold)
    return torch.cat(found, 1)
