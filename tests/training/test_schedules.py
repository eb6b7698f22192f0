import math

import pytest
import torch
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, MultiStepLR, SequentialLR

from dfs_engine.training.config import OptimConfig
from dfs_engine.training.schedules import Schedule

STEPS_PER_EPOCH, EPOCHS = 7, 6


def torch_rates(make_scheduler, num_steps, lr):
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=lr)
    scheduler = make_scheduler(optimizer)
    rates = []
    for _ in range(num_steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


def our_rates(**options):
    schedule = Schedule(OptimConfig(**options), STEPS_PER_EPOCH, EPOCHS)
    return [schedule(step) for step in range(STEPS_PER_EPOCH * EPOCHS)]


def test_cosine():
    expected = torch_rates(lambda optimizer: CosineAnnealingLR(optimizer, 42), 42, 0.3)
    assert our_rates(lr=0.3, schedule="cosine") == pytest.approx(expected, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("milestones", [(), (1,), (2, 3, 5)], ids=str)
def test_multistep(milestones):
    expected = torch_rates(
        lambda optimizer: MultiStepLR(optimizer, [epoch * STEPS_PER_EPOCH for epoch in milestones], 0.2), 42, 0.1
    )
    assert our_rates(lr=0.1, schedule="multistep", milestones=milestones, gamma=0.2) == pytest.approx(expected)


def test_warmup_then_cosine():
    def sequence(optimizer):
        warmup = LinearLR(optimizer, start_factor=1 / 14, end_factor=1.0, total_iters=13)
        return SequentialLR(optimizer, [warmup, CosineAnnealingLR(optimizer, 28)], [14])

    expected = torch_rates(sequence, 42, 0.1)
    assert our_rates(lr=0.1, schedule="cosine", warmup_epochs=2) == pytest.approx(expected, rel=1e-9, abs=1e-12)


def test_warmup_then_linear():
    """As transformers' `get_linear_schedule_with_warmup`, but that its first step has a rate."""
    rates = our_rates(lr=0.1, schedule="linear", warmup_epochs=2)
    assert rates[:14] == pytest.approx([0.1 * (step + 1) / 14 for step in range(14)])
    assert rates[14:] == pytest.approx([0.1 * (28 - step) / 28 for step in range(28)])


def test_multistep_after_warmup_counts_epochs_from_the_start():
    rates = our_rates(lr=1.0, schedule="multistep", milestones=(3,), warmup_epochs=0.5)
    assert rates[:4] == pytest.approx([0.25, 0.5, 0.75, 1.0])
    assert rates[20] == 1.0
    assert rates[21] == pytest.approx(0.1)


def test_apply_sets_every_group():
    weights = [torch.zeros(1, requires_grad=True) for _ in range(2)]
    optimizer = torch.optim.SGD([{"params": [weight]} for weight in weights], lr=9.0)
    Schedule(OptimConfig(lr=0.1), STEPS_PER_EPOCH, EPOCHS).apply(optimizer, 21)
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.05, 0.05])


def test_the_step_after_the_last_has_a_rate():
    assert Schedule(OptimConfig(), STEPS_PER_EPOCH, EPOCHS)(42) == pytest.approx(0.0)
    assert math.isfinite(Schedule(OptimConfig(), STEPS_PER_EPOCH, EPOCHS)(100))
