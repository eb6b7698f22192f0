"""`simulate` and the policies against loops over single samples."""

import math

import pytest
import torch
from torch import Tensor

from dfs_engine.inference import Entropy, MaxProbability, Patience, simulate

POLICIES = [
    MaxProbability(0.6),
    MaxProbability([0.9, 0.5, 0.4]),
    MaxProbability([math.inf, 0.5, 0.0]),
    Entropy(1.0),
    Entropy([0.5, -math.inf, 1.3]),
    Patience(1),
    Patience(2),
    Patience(3),
    Patience(5),
]


def random_logits(num_exits: int = 4, num_samples: int = 50, num_classes: int = 3) -> Tensor:
    return 2 * torch.randn(num_exits, num_samples, num_classes, dtype=torch.float64)


def by_hand(exits: list[list[float]], policy) -> tuple[int, float]:
    """The exit that one sample takes, of its logits at every exit, and the value there."""
    classes: list[int] = []
    for index, logits in enumerate(exits):
        weights = [math.exp(each) for each in logits]
        probabilities = [weight / sum(weights) for weight in weights]
        classes.append(logits.index(max(logits)))
        if isinstance(policy, Patience):
            value, run = 0, classes[::-1]
            while value < len(run) and run[value] == run[0]:
                value += 1
            done = value >= policy.num_equal
        else:
            threshold = policy.threshold
            if isinstance(threshold, tuple):
                threshold = threshold[index] if index < len(threshold) else 0
            if isinstance(policy, MaxProbability):
                value = max(probabilities)
                done = value >= threshold
            else:
                value = -sum(each * math.log(each) for each in probabilities)
                done = value <= threshold
        if done or index == len(exits) - 1:
            return index, value
    raise AssertionError


@pytest.mark.parametrize("policy", POLICIES, ids=repr)
def test_it_routes_each_sample_as_a_loop_does(policy):
    logits = random_logits()
    found = simulate(list(logits), policy)
    for sample in range(logits.size(1)):
        index, value = by_hand(logits[:, sample].tolist(), policy)
        assert found.exits[sample] == index
        assert found.confidence[sample].item() == pytest.approx(value, rel=1e-9)
        torch.testing.assert_close(found.logits[sample], logits[index, sample], rtol=0, atol=0)
        assert found.classes[sample] == logits[index, sample].argmax()


def test_one_tensor_is_the_same_as_a_list():
    logits = random_logits()
    torch.testing.assert_close(simulate(logits, Patience(2)), simulate(list(logits), Patience(2)))


def test_patience_counts_equal_predictions_in_a_row():
    classes = torch.tensor([[0, 0, 0], [1, 0, 0], [1, 1, 0], [2, 1, 0], [2, 2, 1]])  # of each exit, of three samples
    logits = torch.nn.functional.one_hot(classes, 3).float()
    assert simulate(logits, Patience(1)).exits.tolist() == [0, 0, 0]
    assert simulate(logits, Patience(2)).exits.tolist() == [2, 1, 1]
    assert simulate(logits, Patience(3)).exits.tolist() == [4, 4, 2]
    assert simulate(logits, Patience(3)).confidence.tolist() == [2, 1, 3]


@pytest.mark.parametrize("policy", [MaxProbability(0.0), Entropy(9.0)], ids=repr)
def test_a_nan_leaves_at_the_last_exit(policy):
    logits = random_logits()
    logits[0, 3], logits[:, 5] = math.nan, math.nan
    exits = simulate(logits, policy).exits
    assert (exits[3], exits[5]) == (1, 3)
    assert exits.sum() == 4


def test_an_infinite_logit_has_no_entropy_of_its_own():
    logits = torch.tensor([[0.0, 0.0, -math.inf]])
    assert simulate([logits], Entropy(0.0)).confidence.item() == pytest.approx(math.log(2))


def test_half_precision_is_decided_in_float32():
    logits = random_logits().bfloat16()
    for policy in (MaxProbability(0.6), Entropy(1.0)):
        found, expected = simulate(logits, policy), simulate(logits.float(), policy)
        torch.testing.assert_close(found.exits, expected.exits)
        torch.testing.assert_close(found.confidence, expected.confidence, rtol=0, atol=0)


def test_no_samples_and_one_exit():
    assert simulate(random_logits(num_samples=0), Patience(2)).exits.shape == (0,)
    assert simulate(random_logits(num_exits=1), MaxProbability(1.0)).exits.tolist() == [0] * 50
    assert simulate(random_logits(num_exits=1), MaxProbability([])).exits.tolist() == [0] * 50


@pytest.mark.parametrize("logits", [[], [torch.zeros(3)], [torch.zeros(3, 2), torch.zeros(2, 2)]])
def test_logits_of_other_shapes(logits):
    with pytest.raises(ValueError, match=r"logits: expected one tensor \(N, num_classes\) for each exit"):
        simulate(logits, Patience(1))


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (
            lambda: MaxProbability(90),
            ValueError,
            r"expected 0 <= threshold <= 1, got threshold=90\. At inf nobody leaves",
        ),
        (lambda: MaxProbability([0.5, -0.1]), ValueError, r"got threshold=-0\.1"),
        (lambda: MaxProbability(math.nan), ValueError, r"got threshold=nan"),
        (lambda: MaxProbability("high"), TypeError, r"a number or a list of numbers, got 'high'"),
        (lambda: MaxProbability(None), TypeError, r"a number or a list of numbers, got None"),
        (lambda: Entropy(-1), ValueError, r"expected 0 <= threshold <= inf, got threshold=-1\. At -inf nobody leaves"),
        (lambda: Patience(0), ValueError, r"expected num_equal >= 1, got num_equal=0"),
        (lambda: Patience(1.5), TypeError, r"expected num_equal to be an integer, got 1\.5"),
        (lambda: simulate(random_logits(), MaxProbability([0.5])), ValueError, r"or 3, one for each of 4 .*, got 1"),
        (lambda: simulate(random_logits(), Entropy), TypeError, r"Write Entropy\(\.\.\.\)"),
        (lambda: simulate(random_logits(num_classes=1), Entropy(1)), ValueError, r"got num_classes=1"),
    ],
)
def test_errors_say_what_and_what_instead(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_thresholds_may_come_as_a_tensor():
    policy = MaxProbability(torch.tensor([0.5, 0.25]))
    assert policy == MaxProbability((0.5, 0.25))
    assert hash(policy) == hash(MaxProbability([0.5, 0.25]))
