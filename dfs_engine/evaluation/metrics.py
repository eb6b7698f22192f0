"""Accuracy and loss of every exit and of their ensemble, exact over batches of any size."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


class ExitMetrics:
    """Counts correct answers of each exit and of the ensemble, the mean of all exits' logits.

    Nothing leaves the device before `compute`, so no batch waits for it. To add up several processes:
    ``metrics.counters = accelerator.reduce(metrics.counters, "sum")``.

    Args:
        num_exits: number of logits in each `update`.
        device: where the logits will be.
    """

    def __init__(self, num_exits: int, device: torch.device | str = "cpu") -> None:
        self.num_exits = num_exits
        # MPS has no float64.
        dtype = torch.float32 if torch.device(device).type == "mps" else torch.float64
        # (num_exits + 1, 4): rows are the exits, shallow to deep, then the ensemble;
        # columns are samples, top-1 correct, top-5 correct, sum of losses.
        self.counters = torch.zeros(num_exits + 1, 4, dtype=dtype, device=device)

    @torch.no_grad()
    def update(self, logits: Sequence[Tensor], target: Tensor) -> None:
        """Adds one batch.

        Args:
            logits: (N, num_classes) for each exit, shallow to deep. target: (N,) class indices.
        """
        if len(logits) != self.num_exits:
            raise ValueError(f"logits: expected one tensor for each of {self.num_exits} exits, got {len(logits)}.")
        exits = torch.stack(list(logits)).float()
        outputs = torch.cat([exits, exits.mean(0, keepdim=True)])  # (num_exits + 1, N, num_classes)
        hits = outputs.topk(min(5, outputs.shape[-1])).indices == target[:, None]
        losses = F.cross_entropy(outputs.flatten(0, 1), target.repeat(len(outputs)), reduction="none")
        self.counters += torch.stack(
            [
                torch.full_like(self.counters[:, 0], len(target)),
                hits[..., 0].sum(1),
                hits.sum((1, 2)),
                losses.view(len(outputs), -1).sum(1, dtype=self.counters.dtype),
            ],
            dim=1,
        )

    def compute(self) -> dict[str, Any]:
        """``{"num_samples": n, "exits": [{"top1": %, "top5": %, "loss": mean}, ...], "ensemble": {...}}``.

        Top-1 and top-5 are per cent; with fewer than 5 classes top-5 counts them all. Without samples all are None.
        """
        rows = self.counters.tolist()
        *exits, ensemble = [_summary(*row) for row in rows]
        return {"num_samples": int(rows[-1][0]), "exits": exits, "ensemble": ensemble}


def _summary(num_samples: float, top1: float, top5: float, loss: float) -> dict[str, float | None]:
    if num_samples == 0:
        return {"top1": None, "top5": None, "loss": None}
    return {"top1": 100 * top1 / num_samples, "top5": 100 * top5 / num_samples, "loss": loss / num_samples}


def table(result: dict[str, Any]) -> list[tuple[str, float | None, float | None, float | None]]:
    """Rows (name, top-1, top-5, loss) of what `ExitMetrics.compute` returned, for printing."""
    named = [(f"exit {index}", values) for index, values in enumerate(result["exits"], start=1)]
    return [(name, v["top1"], v["top5"], v["loss"]) for name, v in [*named, ("ensemble", result["ensemble"])]]
