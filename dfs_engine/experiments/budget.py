"""Budgeted classification of a trained run: thresholds from its validation samples, measured on the test samples."""

from typing import Any

from dfs_engine.evaluation.operations import ExitCost
from dfs_engine.inference import Outputs, budgeted_batch
from dfs_engine.inference.per_sample import HELD_OUT, OutputCollector
from dfs_engine.training.evaluate import evaluate
from dfs_engine.training.trainer import Trainer


def budget_curve(trainer: Trainer, exits: list[ExitCost]) -> list[dict[str, Any]]:
    """At the published budgets, see `budgeted_batch`: the columns of budget.csv, none without validation samples.

    Operations are the mean of a test sample, accuracies per cent.
    """
    if trainer.data.val is None or trainer.data.num_classes == 1:
        return []
    costs = [float(exit.operations) for exit in exits]
    return [
        {"p": point.p, "test_top1": 100 * point.accuracy, "test_operations": point.cost}
        for point in budgeted_batch(_outputs(trainer, HELD_OUT), _outputs(trainer, "test"), costs)
    ]


def _outputs(trainer: Trainer, split: str) -> Outputs:
    model = trainer.model if trainer.ema is None else trainer.ema.module
    collector = OutputCollector(split)
    channels_last = trainer.config.channels_last
    evaluate(model, trainer.eval_loaders[split], trainer.accelerator, channels_last=channels_last, observe=collector)
    return collector.outputs
