"""Budgeted batch classification against a slow transcription of the published protocol, sample by sample."""

import math

import pytest
import torch
import torch.nn.functional as F

from dfs_engine.inference import MaxProbability, simulate
from dfs_engine.inference.budgeted import budgeted_batch
from dfs_engine.inference.per_sample import Outputs

COSTS = [3.0, 7.5, 8.0, 20.0]


def logits_of(num_samples: int, num_classes: int = 6, num_exits: int = 4):
    """Of exits each of which knows more than the one before, and labels."""
    labels = torch.randint(num_classes, (num_samples,))
    signal = F.one_hot(labels, num_classes) * torch.rand(num_samples, 1)
    return [torch.randn(num_samples, num_classes) + 2 * (1 + k) * signal for k in range(num_exits)], labels


def held_out_and_test(num_held_out: int = 173, num_test: int = 211, **sizes):
    return tuple(Outputs.of(split, *logits_of(n, **sizes)) for split, n in (("val", num_held_out), ("test", num_test)))


def protocol(val: Outputs, test: Outputs, costs: list[float]):
    """Softmax outputs of every exit on both sets -> for each p (accuracy, mean cost, samples that leave at each exit of
    the validation set, of the test set)."""
    num_exits, n_val, n_test = len(costs), val.labels.numel(), test.labels.numel()
    val_confidence, test_confidence = val.confidence.tolist(), test.confidence.tolist()
    for index in range(1, 41):
        p = index / 20
        powers = [p**k for k in range(1, num_exits + 1)]
        q = [power / sum(powers) for power in powers]
        thresholds = [1e8] * (num_exits - 1) + [-1e8]
        exited = [False] * n_val
        val_counts = [0] * num_exits
        for k in range(num_exits - 1):
            wanted, count = math.floor(n_val * q[k]), 0
            for sample in sorted(range(n_val), key=lambda sample: -val_confidence[k][sample]):
                if exited[sample]:
                    continue
                count += 1
                if count == wanted:
                    thresholds[k] = val_confidence[k][sample]
                    break
            for sample in range(n_val):
                if not exited[sample] and val_confidence[k][sample] >= thresholds[k]:
                    exited[sample] = True
                    val_counts[k] += 1
        right, counts = 0, [0] * num_exits
        for sample in range(n_test):
            for k in range(num_exits):
                if test_confidence[k][sample] >= thresholds[k]:
                    right += int(test.classes[k, sample] == test.labels[sample])
                    counts[k] += 1
                    break
        cost = sum(count / n_test * price for count, price in zip(counts, costs, strict=True))
        yield right / n_test, cost, val_counts, counts


@pytest.mark.parametrize("are_distinct", [True, False], ids=["distinct", "ties"])
@pytest.mark.parametrize("num_exits", [4, 2])
def test_equals_the_protocol(are_distinct, num_exits):
    val, test = held_out_and_test(num_exits=num_exits)
    if not are_distinct:
        val, test = (each._replace(confidence=(each.confidence * 8).round() / 8) for each in (val, test))
    costs = COSTS[:num_exits]
    found = budgeted_batch(val, test, costs)
    assert [point.p for point in found] == [pytest.approx(index / 20) for index in range(1, 41)]
    for point, (accuracy, cost, _, counts) in zip(found, protocol(val, test, costs), strict=True):
        assert point.accuracy == pytest.approx(accuracy)
        assert point.cost == pytest.approx(cost)
        assert [round(share * 211) for share in point.exits] == counts


def test_on_the_held_out_samples_as_many_leave_as_their_share_is():
    """Of distinct confidences floor(N q_k) at each exit but the last."""
    val, _ = held_out_and_test(num_held_out=400)
    assert all(len(row.unique()) == len(row) for row in val.confidence)
    copy = val._replace(split="test", confidence=val.confidence.clone())
    copy.confidence[:, 0] -= 1e-7  # another tensor, or it would be refused as the same samples
    for point in budgeted_batch(val, copy, COSTS):
        powers = torch.tensor([point.p**k for k in range(1, 5)], dtype=torch.float64)
        wanted = (400 * powers / powers.sum()).floor().long().tolist()
        stays = torch.ones(400, dtype=torch.bool)
        for k, threshold in enumerate(point.thresholds):
            leaves = stays & (val.confidence[k] >= threshold)
            assert leaves.sum() == min(wanted[k], int(stays.sum())) or math.isinf(threshold)
            assert not math.isinf(threshold) or wanted[k] == 0
            stays &= ~leaves


def test_the_thresholds_are_a_policy_that_gives_that_accuracy():
    (val_logits, val_labels), (logits, labels) = logits_of(150), logits_of(90)
    points = budgeted_batch(Outputs.of("val", val_logits, val_labels), Outputs.of("test", logits, labels), COSTS)
    for point in points[::5]:
        found = simulate(logits, MaxProbability(point.thresholds))
        assert (found.classes == labels).double().mean().item() == pytest.approx(point.accuracy)
        assert torch.tensor(COSTS)[found.exits].double().mean().item() == pytest.approx(point.cost)


def test_one_exit_takes_all():
    val, test = held_out_and_test(num_exits=1)
    for point in budgeted_batch(val, test, [5.0]):
        assert (point.cost, point.exits, point.thresholds) == (5.0, [1.0], [])


def test_thresholds_asked_of_test_samples_are_refused():
    val, test = held_out_and_test()
    for held_out in (test, test._replace(split="val"), val._replace(split="test_mismatched")):
        with pytest.raises(ValueError, match=r"thresholds: expected .*kept out of training.*data\.val_fraction 0\.1"):
            budgeted_batch(held_out, test, COSTS)
    with pytest.raises(ValueError, match=r"thresholds: .*got those of 'test'"):
        budgeted_batch(test._replace(split="val", confidence=test.confidence.clone()), test, COSTS)


def test_costs_and_outputs_have_to_fit():
    val, test = held_out_and_test()
    with pytest.raises(ValueError, match=r"one cost for each exit.* and 3 costs"):
        budgeted_batch(val, test, COSTS[:3])
    with pytest.raises(ValueError, match="at least one sample"):
        budgeted_batch(val._replace(confidence=val.confidence[:, :0], labels=val.labels[:0]), test, COSTS)
