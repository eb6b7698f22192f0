"""Accuracy, loss and GLUE's metrics of every exit and of their ensemble, exact over batches of any size."""

import importlib
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dfs_engine.checks import check_choice
from dfs_engine.nn import exit_loss

TITLES = {
    "top1": "top-1",
    "top5": "top-5",
    "f1": "F1",
    "matthews": "Matthews",
    "pearson": "Pearson",
    "spearman": "Spearman",
}
"""How people call what `ExitMetrics` measures."""

IMAGE_METRICS = ("top1", "top5")
# Where the functions (target, predicted) of the others are.
_OF_PREDICTIONS = {
    "f1": ("sklearn.metrics", "f1_score"),
    "matthews": ("sklearn.metrics", "matthews_corrcoef"),
    "pearson": ("scipy.stats", "pearsonr"),
    "spearman": ("scipy.stats", "spearmanr"),
}


class ExitMetrics:
    """Measures each exit and the ensemble, the mean of all exits' logits.

    Nothing leaves the device before `compute`, so no batch waits for it. To add up several processes:
    ``metrics.counters = accelerator.reduce(metrics.counters, "sum")`` and
    ``metrics.predictions = gather_object(metrics.predictions)``.

    Args:
        num_exits: number of logits in each `update`.
        device: where the logits will be.
        metrics: of top1, top5 (accuracies), f1 and matthews (of two classes), pearson and spearman (of regressions).
    """

    def __init__(
        self, num_exits: int, device: torch.device | str = "cpu", metrics: Sequence[str] = IMAGE_METRICS
    ) -> None:
        self.num_exits = num_exits
        self.metrics = [check_choice("metrics", name, [*IMAGE_METRICS, *_OF_PREDICTIONS]) for name in metrics]
        # MPS has no float64.
        dtype = torch.float32 if torch.device(device).type == "mps" else torch.float64
        # (num_exits + 1, 4): rows are the exits, shallow to deep, then the ensemble;
        # columns are samples, top-1 correct, top-5 correct, sum of losses.
        self.counters = torch.zeros(num_exits + 1, 4, dtype=dtype, device=device)
        self.predictions: list[Tensor] = []
        """Of each batch (num_exits + 2, N): the same rows, then the target; where a metric needs them."""

    @torch.no_grad()
    def update(self, logits: Sequence[Tensor], target: Tensor) -> None:
        """Adds one batch.

        Args:
            logits: (N, num_classes) for each exit, shallow to deep.
            target: (N,) class indices, or numbers where num_classes is 1.
        """
        if len(logits) != self.num_exits:
            raise ValueError(f"logits: expected one tensor for each of {self.num_exits} exits, got {len(logits)}.")
        exits = torch.stack(list(logits)).float()
        outputs = torch.cat([exits, exits.mean(0, keepdim=True)])  # (num_exits + 1, N, num_classes)
        hits = outputs.topk(min(5, outputs.shape[-1])).indices == target[:, None]
        losses = exit_loss(outputs.flatten(0, 1), target.repeat(len(outputs)), reduction="none")
        self.counters += torch.stack(
            [
                torch.full_like(self.counters[:, 0], len(target)),
                hits[..., 0].sum(1),
                hits.sum((1, 2)),
                losses.view(len(outputs), -1).sum(1, dtype=self.counters.dtype),
            ],
            dim=1,
        )
        if any(name in _OF_PREDICTIONS for name in self.metrics):
            predicted = outputs.argmax(-1) if outputs.shape[-1] > 1 else outputs.squeeze(-1)
            self.predictions.append(torch.cat([predicted.float(), target.float()[None]]))

    def compute(self) -> dict[str, Any]:
        """``{"num_samples": n, "exits": [{"top1": %, "top5": %, "loss": mean}, ...], "ensemble": {...}}``.

        All metrics are per cent, also the correlations; with fewer than 5 classes top-5 counts them all. Without
        samples all are None.
        """
        *exits, ensemble = [self._summary(index) for index in range(self.num_exits + 1)]
        return {"num_samples": int(self.counters[-1, 0].item()), "exits": exits, "ensemble": ensemble}

    def _summary(self, index: int) -> dict[str, float | None]:
        num_samples, top1, top5, loss = self.counters[index].tolist()
        if num_samples == 0:
            return dict.fromkeys([*self.metrics, "loss"])
        counted = {"top1": top1, "top5": top5}
        values: dict[str, float | None] = {}
        for name in self.metrics:
            share = counted[name] / num_samples if name in counted else self._of_predictions(name, index)
            values[name] = 100 * share
        return values | {"loss": loss / num_samples}

    def _of_predictions(self, name: str, index: int) -> float:
        rows = torch.cat([batch.cpu() for batch in self.predictions], 1).double().numpy()
        module, function = _OF_PREDICTIONS[name]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of predictions that are all the same, which correlate with nothing
            found = getattr(importlib.import_module(module), function)(rows[-1], rows[index])
        return float(np.nan_to_num(getattr(found, "statistic", found)))


def table(result: dict[str, Any]) -> list[tuple[Any, ...]]:
    """Rows (name, value of each metric, loss) of what `ExitMetrics.compute` returned, for printing."""
    named = [(f"exit {index}", values) for index, values in enumerate(result["exits"], start=1)]
    return [(name, *values.values()) for name, values in [*named, ("ensemble", result["ensemble"])]]
