"""Thresholds against the published loop, and targets against what `simulate` reaches with them."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dfs_engine import create_model
from dfs_engine.evaluation.operations import count_operations
from dfs_engine.inference import Entropy, MaxProbability, Patience, find_thresholds, simulate, thresholds

COSTS = [10.0, 25.0, 45.0, 70.0]
FAMILY = pytest.mark.parametrize("family", [MaxProbability, Entropy, Patience], ids=lambda family: family.__name__)


def exits_that_learn(num_samples: int = 400, num_classes: int = 5) -> tuple[list[Tensor], Tensor]:
    """Logits of exits each of which knows more than the one before, and labels."""
    labels = torch.randint(num_classes, (num_samples,))
    signal = F.one_hot(labels, num_classes) * torch.rand(num_samples, 1)
    return [torch.randn(num_samples, num_classes) + (1 + index) * 1.5 * signal for index in range(len(COSTS))], labels


def published_thresholds(values: list[list[float]], shares: list[float]) -> list[float]:
    """The protocol's own loop: `values` of every exit but the last, the surer the higher."""
    num_samples = len(values[0])
    left, found = [False] * num_samples, []
    for value, share in zip(values, shares, strict=False):
        wanted, threshold, count = math.floor(num_samples * share), math.inf, 0
        for sample in sorted(range(num_samples), key=lambda sample: -value[sample]):
            if not left[sample]:
                count += 1
                if count == wanted:
                    threshold = value[sample]
                    break
        left = [gone or value[sample] >= threshold for sample, gone in enumerate(left)]
        found.append(threshold)
    return found


@pytest.mark.parametrize("are_distinct", [True, False], ids=["distinct", "ties"])
def test_thresholds_are_those_of_the_published_loop(are_distinct):
    values = torch.rand(3, 200) if are_distinct else torch.randint(8, (3, 200)) / 8
    shares = thresholds.shares_of_exits(4)
    found = thresholds.find_by_shares(values, shares)
    expected = [published_thresholds(values.tolist(), row) for row in shares.tolist()]
    torch.testing.assert_close(found, torch.tensor(expected), rtol=0, atol=0)


def test_shares_are_the_published_ones_and_more():
    shares = thresholds.shares_of_exits(5)
    torch.testing.assert_close(shares.sum(1), torch.ones(len(shares)).double())
    for index in range(1, 41):
        powers = [(index / 20) ** k for k in range(1, 6)]
        expected = torch.tensor(powers, dtype=torch.float64) / sum(powers)
        assert (shares - expected).abs().amax(1).min() < 1e-12


def test_as_many_leave_as_their_share_is():
    values = torch.rand(3, 200)
    shares = torch.tensor([[0.4, 0.3, 0.2, 0.1], [0.1, 0.2, 0.3, 0.4]]).double()
    for row, share in zip(thresholds.find_by_shares(values, shares), shares, strict=True):
        stays = torch.ones(200, dtype=torch.bool)
        for index, value in enumerate(values):
            leaves = stays & (value >= row[index])
            assert leaves.sum() == math.floor(200 * share[index])
            stays &= ~leaves


def measure(logits: list[Tensor], labels: Tensor, policy) -> tuple[float, float]:
    found = simulate(logits, policy)
    return (found.classes == labels).double().mean().item(), torch.tensor(COSTS)[found.exits].double().mean().item()


@FAMILY
@pytest.mark.parametrize("target", [10.0, 20.0, 30.0, 47.5, 70.0, 1e9])
def test_a_cost_is_not_exceeded_and_what_is_said_is_so(family, target):
    logits, labels = exits_that_learn()
    point = find_thresholds(logits, labels, family, target_cost=target, costs=COSTS)
    accuracy, cost = measure(logits, labels, point.policy)
    assert (point.accuracy, point.cost) == (pytest.approx(accuracy), pytest.approx(cost))
    assert cost <= target
    assert isinstance(point.policy, family)


@FAMILY
def test_an_accuracy_is_reached_at_the_lowest_cost(family):
    logits, labels = exits_that_learn()
    single = [(each.argmax(-1) == labels).double().mean().item() for each in logits]
    target = (single[0] + max(single)) / 2
    point = find_thresholds(torch.stack(logits), labels, family, target_accuracy=target, costs=COSTS)
    accuracy, cost = measure(logits, labels, point.policy)
    assert accuracy >= target
    assert (point.accuracy, point.cost) == (pytest.approx(accuracy), pytest.approx(cost))
    for ratio in (0.05, 0.5, 1.0, 1.5, 2.0):  # no published operating point is better
        if family is Patience:
            break
        powers = torch.tensor([ratio**k for k in range(1, 5)], dtype=torch.float64)
        values = [(family.sign * family(0.0).value(each)).tolist() for each in logits]
        row = published_thresholds(values[:-1], (powers / powers.sum()).tolist())
        other_accuracy, other_cost = measure(logits, labels, family([family.sign * each for each in row]))
        assert other_accuracy < target or other_cost >= cost


@FAMILY
def test_more_cost_buys_no_less_accuracy(family):
    logits, labels = exits_that_learn()
    points = [find_thresholds(logits, labels, family, target_cost=cost, costs=COSTS) for cost in range(10, 71, 5)]
    accuracies = [point.accuracy for point in points]
    assert accuracies == sorted(accuracies)
    assert accuracies[-1] > accuracies[0]


def test_costs_are_numbers_of_blocks_unless_given():
    logits, labels = exits_that_learn()
    assert find_thresholds(logits, labels, target_cost=1).cost == 1
    assert find_thresholds(logits, labels, target_cost=2.5).cost <= 2.5


def test_costs_may_be_counted_operations():
    model = create_model("vgg7_64", num_classes=5, width=4, variant="dense")
    costs = [cost.operations for cost in count_operations(model)]
    logits, labels = exits_that_learn()
    logits += logits[-1:] * (len(costs) - len(logits))
    point = find_thresholds(logits, labels, target_cost=sum(costs) / len(costs), costs=costs)
    assert costs[0] <= point.cost <= sum(costs) / len(costs)


def test_nans_and_one_exit():
    logits, labels = exits_that_learn()
    logits[0][:7] = math.nan
    point = find_thresholds(logits, labels, target_cost=30, costs=COSTS)
    accuracy, cost = measure(logits, labels, point.policy)
    assert (point.accuracy, point.cost) == (pytest.approx(accuracy), pytest.approx(cost))
    assert find_thresholds(logits[-1:], labels, Entropy, target_cost=1).policy == Entropy([])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, r"expected one of target_accuracy and target_cost, got target_accuracy=None and target_cost=None"),
        ({"target_accuracy": 0.5, "target_cost": 3}, r"got target_accuracy=0\.5 and target_cost=3"),
        ({"target_accuracy": 93.0}, r"target_accuracy: expected a share in \[0, 1\], got 93\.0"),
        ({"target_accuracy": 1.0}, r"target_accuracy: expected at most 0\.\d+, the best"),
        ({"target_cost": 0.5}, r"target_cost: expected at least 1, .*got 0\.5"),
        ({"target_cost": 2, "costs": [1, 2]}, r"costs: expected 4 numbers"),
        ({"target_cost": 2, "costs": [1, 2, 3, 2]}, r"do not fall from exit to exit, got \[1\.0, 2\.0, 3\.0, 2\.0\]"),
        ({"target_cost": 2, "costs": [1, 2, 3, math.nan]}, r"costs: expected 4 numbers"),
        ({"target_cost": 2, "family": MaxProbability(0.5)}, r"family: expected one of the classes MaxProbability"),
        ({"target_cost": 2, "labels": torch.zeros(399).long()}, r"labels: .*torch\.int64 \(399,\) beside \(400, 5\)"),
        ({"target_cost": 2, "labels": torch.zeros(400)}, r"labels: expected class indices .*got torch\.float32"),
    ],
)
def test_errors_say_what_is_in_reach(options, message):
    logits, labels = exits_that_learn()
    with pytest.raises(ValueError, match=message):
        find_thresholds(logits, **{"labels": labels, **options})
