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
