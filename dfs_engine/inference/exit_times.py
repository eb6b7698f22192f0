"""How long a network takes to each of its exits, on this machine."""

import statistics
import time
from typing import Any

import torch
from torch import Tensor, nn

from dfs_engine.models.multi_exit import OnExit, run_model
from dfs_engine.runtime.progress_bar import progress_bar

ROUNDS = 15
"""Of each exit; before them one that does not count."""


@torch.no_grad()
def time_exits(model: nn.Module, input: Any, num_exits: int, *, progress: bool = False) -> list[float]:
    """Seconds of the forward pass of a batch that leaves as a whole at each exit, shallow to deep: medians.

    The exits take turns, so that a busy machine is unfair to none. The exits before count too, as all of them have to
    be asked.

    Args:
        model: in eval mode. input: a batch as the model takes it, on its device.
    """
    seconds: list[list[float]] = [[] for _ in range(num_exits)]
    with progress_bar((ROUNDS + 1) * num_exits, "pass", progress) as bar:
        bar.set_description("timing the exits")
        for round_ in range(ROUNDS + 1):
            for index, found in enumerate(seconds):
                passed = _seconds_of(model, input, index)
                if round_ > 0:
                    found.append(passed)
                bar.update()
    return [statistics.median(found) for found in seconds]


def _stop_at(last: int) -> OnExit:
    def on_exit(index: int, logits: Tensor) -> Tensor | None:
        return torch.empty(0, dtype=torch.long, device=logits.device) if index == last else None

    return on_exit


def _seconds_of(model: nn.Module, input: Any, index: int) -> float:
    started = time.perf_counter()
    logits = run_model(model, input, on_exit=_stop_at(index))
    if logits[-1].device.type != "cpu":
        torch.accelerator.synchronize(logits[-1].device)
    return time.perf_counter() - started
