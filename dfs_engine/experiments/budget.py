"""Budgeted classification of a trained run: thresholds from its validation samples, measured on the test samples."""

from typing import Any

import torch
from torch import Tensor

from dfs_engine.evaluation.operations import ExitCost
from dfs_engine.inference import find_thresholds, simulate
from dfs_engine.models.multi_exit import run_model
from dfs_engine.training.batches import to_device
from dfs_engine.training.trainer import Trainer

_NUM_BUDGETS = 12


def budget_curve(trainer: Trainer, exits: list[ExitCost]) -> list[dict[str, Any]]:
    """For budgets between the first exit's cost and the last one's: the columns of budget.csv, none without val.

    Costs are mean operations of a sample, accuracies per cent.
    """
    if trainer.data.val is None or trainer.data.num_classes == 1:
        return []
    costs = [float(exit.operations) for exit in exits]
    val, val_labels = _logits(trainer, "val")
    test, test_labels = _logits(trainer, "test")
    prices = torch.tensor(costs, dtype=torch.float64)
    rows = []
    for share in torch.linspace(0, 1, _NUM_BUDGETS).tolist():
        budget = costs[0] + share * (costs[-1] - costs[0])
        point = find_thresholds(val, val_labels, target_cost=budget, costs=costs)
        found = simulate(test, point.policy)
        rows.append(
            {
                "budget": budget,
                "val_top1": 100 * point.accuracy,
                "val_operations": point.cost,
                "test_top1": 100 * (found.classes == test_labels).double().mean().item(),
                "test_operations": prices[found.exits].mean().item(),
            }
        )
    return rows


@torch.no_grad()
def _logits(trainer: Trainer, split: str) -> tuple[list[Tensor], Tensor]:
    """Of every exit (N, num_classes), and the labels (N,), on the CPU."""
    model = (trainer.model if trainer.ema is None else trainer.ema.module).eval()
    batches, labels = [], []
    for input, target in trainer.eval_loaders[split]:
        logits = run_model(model, to_device(input, trainer.accelerator.device, trainer.memory_format))
        batches.append([exit_logits.float().cpu() for exit_logits in logits])
        labels.append(target)
    return [torch.cat(parts) for parts in zip(*batches, strict=True)], torch.cat(labels)
