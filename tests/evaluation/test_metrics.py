"""ExitMetrics against a naive computation, sample by sample."""

import json

import pytest
import torch
import torch.nn.functional as F

from dfs_engine.evaluation import ExitMetrics, table


def random_batches(sizes, num_exits, num_classes):
    return [
        ([torch.randn(size, num_classes) for _ in range(num_exits)], torch.randint(num_classes, (size,)))
        for size in sizes
    ]


def naive(logits, target):
    """Top-1 and top-5 in per cent and the mean loss of one output over all samples."""
    top1 = top5 = loss = 0.0
    for row, label in zip(logits.double(), target.tolist(), strict=True):
        better = sum(value > row[label] for value in row)
        top1 += bool(better < 1)
        top5 += bool(better < 5)
        loss += F.cross_entropy(row, torch.tensor(label)).item()
    return {"top1": 100 * top1 / len(target), "top5": 100 * top5 / len(target), "loss": loss / len(target)}


@pytest.mark.parametrize("num_classes", [3, 5, 12])
@pytest.mark.parametrize("sizes", [[8, 8, 3], [1], [4, 0, 5]])
def test_equals_the_naive_computation(sizes, num_classes):
    batches = random_batches(sizes, num_exits=4, num_classes=num_classes)
    metrics = ExitMetrics(4)
    for logits, target in batches:
        metrics.update(logits, target)
    result = metrics.compute()
    exits = [torch.cat([logits[index] for logits, _ in batches]) for index in range(4)]
    target = torch.cat([target for _, target in batches])
    assert result["num_samples"] == sum(sizes)
    assert result["exits"] == [pytest.approx(naive(logits, target), rel=1e-6) for logits in exits]
    assert result["ensemble"] == pytest.approx(naive(sum(exits) / 4, target), rel=1e-6)
    assert json.loads(json.dumps(result)) == result


def test_ensemble_can_be_right_where_an_exit_is_wrong():
    logits = [torch.tensor([[3.0, 0, 0]]), torch.tensor([[0, 1.0, 0]]), torch.tensor([[0, 0.5, 0]])]
    metrics = ExitMetrics(3)
    metrics.update(logits, torch.tensor([0]))
    result = metrics.compute()
    assert [values["top1"] for values in result["exits"]] == [100, 0, 0]
    assert result["ensemble"]["top1"] == 100


def test_no_batches_give_none():
    result = ExitMetrics(2).compute()
    nothing = {"top1": None, "top5": None, "loss": None}
    assert result == {"num_samples": 0, "exits": [nothing, nothing], "ensemble": nothing}
    json.dumps(result, allow_nan=False)


def test_counters_of_two_processes_add_up():
    batches = random_batches([6, 5, 3], num_exits=2, num_classes=7)
    whole, first, second = ExitMetrics(2), ExitMetrics(2), ExitMetrics(2)
    for index, batch in enumerate(batches):
        whole.update(*batch)
        (first if index % 2 else second).update(*batch)
    first.counters = first.counters + second.counters
    assert first.compute()["num_samples"] == 14
    for mine, theirs in zip(table(first.compute()), table(whole.compute()), strict=True):
        assert mine == (mine[0], *(pytest.approx(value) for value in theirs[1:]))


def by_hand(name, target, predicted):
    """GLUE's metrics from their definitions, in per cent."""
    if name in ("pearson", "spearman"):
        if name == "spearman":
            target, predicted = (values.argsort().argsort().double() for values in (target, predicted))
        left, right = target - target.mean(), predicted - predicted.mean()
        return 100 * (left @ right / (left @ left).sqrt() / (right @ right).sqrt()).item()
    counts = torch.zeros(2, 2, dtype=torch.float64).index_put_(
        (target.long(), predicted.long()), torch.ones(len(target), dtype=torch.float64), accumulate=True
    )
    (tn, fp), (fn, tp) = counts.tolist()
    if name == "f1":
        return 100 * 2 * tp / (2 * tp + fp + fn)
    return 100 * (tp * tn - fp * fn) / ((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn)) ** 0.5


@pytest.mark.parametrize("names", [("matthews", "f1"), ("top1", "f1")], ids=str)
def test_metrics_of_two_classes(names):
    batches = random_batches([40, 1, 30], num_exits=3, num_classes=2)
    metrics = ExitMetrics(3, metrics=names)
    for batch in batches:
        metrics.update(*batch)
    result = metrics.compute()
    assert list(result["ensemble"]) == [*names, "loss"]
    target = torch.cat([target for _, target in batches])
    exits = [torch.cat([logits[index] for logits, _ in batches]) for index in range(3)]
    for values, logits in zip([*result["exits"], result["ensemble"]], [*exits, sum(exits) / 3], strict=True):
        assert values["loss"] == pytest.approx(F.cross_entropy(logits, target).item(), rel=1e-5)
        for name in names:
            expected = naive(logits, target)["top1"] if name == "top1" else by_hand(name, target, logits.argmax(1))
            assert values[name] == pytest.approx(expected)
    json.dumps(result, allow_nan=False)


def test_metrics_of_a_regression():
    batches = [([torch.randn(size, 1) for _ in range(2)], torch.randn(size)) for size in (30, 1, 25)]
    metrics, halves = (
        ExitMetrics(2, metrics=("pearson", "spearman")),
        [ExitMetrics(2, metrics=("pearson", "spearman")) for _ in range(2)],
    )
    for index, batch in enumerate(batches):
        metrics.update(*batch)
        halves[index % 2].update(*batch)
    result = metrics.compute()
    target = torch.cat([target for _, target in batches])
    exits = [torch.cat([logits[index] for logits, _ in batches])[:, 0] for index in range(2)]
    for values, predicted in zip([*result["exits"], result["ensemble"]], [*exits, sum(exits) / 2], strict=True):
        assert values["loss"] == pytest.approx(F.mse_loss(predicted, target).item(), rel=1e-5)
        for name in ("pearson", "spearman"):
            assert values[name] == pytest.approx(by_hand(name, target.double(), predicted.double()))
    halves[0].counters = halves[0].counters + halves[1].counters
    halves[0].predictions = halves[0].predictions + halves[1].predictions
    assert table(halves[0].compute()) == [(row[0], *map(pytest.approx, row[1:])) for row in table(result)]


@pytest.mark.parametrize("name", ["matthews", "f1", "pearson", "spearman"])
def test_predictions_that_are_all_the_same_are_worth_nothing(name):
    metrics = ExitMetrics(1, metrics=(name,))
    metrics.update([torch.zeros(4, 1 if name in ("pearson", "spearman") else 2)], torch.tensor([0, 1, 1, 0]))
    assert metrics.compute()["ensemble"][name] == 0.0
    assert ExitMetrics(1, metrics=(name,)).compute()["ensemble"] == {name: None, "loss": None}


def test_unknown_metric_is_refused():
    with pytest.raises(ValueError, match=r"metrics: expected one of top1, .*, got 'accuracy'"):
        ExitMetrics(1, metrics=("accuracy",))


def test_bfloat16_logits_with_gradient_are_accumulated_in_full_precision():
    metrics = ExitMetrics(1)
    for _ in range(300):
        metrics.update(
            [torch.zeros(10, 4, dtype=torch.bfloat16, requires_grad=True)], torch.zeros(10, dtype=torch.long)
        )
    assert not metrics.counters.requires_grad
    assert metrics.compute()["exits"][0]["loss"] == pytest.approx(torch.tensor(4.0).log().item(), rel=1e-6)


def test_wrong_number_of_exits_is_refused():
    with pytest.raises(ValueError, match="logits: expected one tensor for each of 3 exits, got 2"):
        ExitMetrics(3).update([torch.zeros(1, 2)] * 2, torch.zeros(1, dtype=torch.long))


def test_table_has_a_row_for_each_exit_and_the_ensemble():
    ((logits, target),) = random_batches([9], num_exits=2, num_classes=6)
    metrics = ExitMetrics(2)
    metrics.update(logits, target)
    result = metrics.compute()
    rows = table(result)
    assert [row[0] for row in rows] == ["exit 1", "exit 2", "ensemble"]
    assert rows[1][1:] == tuple(result["exits"][1].values())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_update_never_waits_for_the_device():
    ((logits, target),) = random_batches([9], num_exits=2, num_classes=6)
    metrics, expected = ExitMetrics(2, device="cuda"), ExitMetrics(2)
    expected.update(logits, target)
    logits, target = [one.cuda() for one in logits], target.cuda()
    torch.cuda.set_sync_debug_mode("error")
    try:
        metrics.update(logits, target)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(metrics.counters.cpu(), expected.counters)
