"""Accuracy of every exit over a set of samples: after each epoch, and of saved weights (`inference.evaluate`)."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from dfs_engine.evaluation.metrics import IMAGE_METRICS, ExitMetrics
from dfs_engine.models.multi_exit import run_model
from dfs_engine.training.batches import to_device

if TYPE_CHECKING:
    from accelerate import Accelerator

    from dfs_engine.training.signals import StopRequest


@torch.no_grad()
def evaluate(
    model: nn.Module,
    loader: DataLoader[Any],
    accelerator: "Accelerator",
    *,
    channels_last: bool,
    metrics: Sequence[str] = IMAGE_METRICS,
    stop: "StopRequest | None" = None,
    observe: Callable[[list[Tensor], Tensor], None] | None = None,
) -> dict[str, Any]:
    """`ExitMetrics.compute` over the loaders of all processes together. Leaves the model in eval mode.

    After a signal that some process's `stop` received, it breaks off and returns an empty dict.

    Args:
        observe: called with every exit's logits and the target of each of this process's batches.
    """
    from accelerate.utils import gather_object

    model.eval()
    device = accelerator.device
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    found = ExitMetrics(accelerator.unwrap_model(model).num_exits, device, metrics)
    for input, target in loader:
        logits = run_model(model, to_device(input, device, memory_format))
        target = target.to(device, non_blocking=True)
        found.update(logits, target)
        if observe is not None:
            observe(logits, target)
        if stop is not None and stop.received:
            break
    if stop is not None and stop.agreed():
        return {}
    found.counters = accelerator.reduce(found.counters, "sum")
    found.predictions = gather_object([batch.cpu() for batch in found.predictions])
    return found.compute()
