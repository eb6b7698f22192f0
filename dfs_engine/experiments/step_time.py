"""A training step of every row on synthetic batches, in turns in one process: the fair comparison of their times."""

import logging
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from dfs_engine.benchmarks.measure import Stats, peak_memory, time_phases
from dfs_engine.data import DataSplits
from dfs_engine.runtime import memory
from dfs_engine.runtime.progress_bar import progress_bar
from dfs_engine.training.batches import to_device
from dfs_engine.training.config import TrainConfig
from dfs_engine.training.trainer import Trainer

logger = logging.getLogger(__name__)

_WARMUP = 2
# The smallest learning rate that still is work: random labels must not drive the weights to infinity.
_LR = 1e-6


def time_steps(configs: Mapping[str, TrainConfig], data: DataSplits, rounds: int) -> list[dict[str, Any]]:
    """The lines of step_time.csv.

    Args:
        configs: by the row's name.
        data: whose classes the models have; no sample of it is read.
        rounds: steps of each row that are timed.
    """
    steps, device = {}, torch.device("cpu")
    for name, config in configs.items():
        optim = replace(config.optim, lr=_LR)
        trainer = Trainer(replace(config, optim=optim, run_dir=None, tensorboard=False), data=data)
        device = trainer.accelerator.device
        steps[name] = _step(trainer)
    caches = device.type == "cpu" and memory.is_available()
    lines = []
    with (
        memory.caching_allocator(caches and all(config.caching_allocator for config in configs.values())),
        progress_bar(rounds + _WARMUP, "round", any(config.progress for config in configs.values())) as bar,
    ):
        bar.set_description(f"timing a step of {len(steps)} rows")
        phases = {name: {"step": step} for name, step in steps.items()}
        times = time_phases(phases, rounds, _WARMUP, device=device.type, on_round=bar.update)
        for name, step in steps.items():
            stats = Stats.of(times[name]["step"])
            peak = peak_memory(step, device.type) / 2**20
            lines.append(
                {
                    "row": name,
                    "median_seconds": stats.median,
                    "min_seconds": stats.min,
                    "p20_seconds": stats.p20,
                    "p80_seconds": stats.p80,
                    "rounds": stats.n,
                    "peak_memory_mib": round(peak, 2),
                }
            )
    return lines


def _step(trainer: Trainer) -> Any:
    model, config = trainer.raw_model, trainer.config
    model.train()
    size = config.batch_size
    input = to_device(model.example_input(size), trainer.accelerator.device, trainer.memory_format)
    classes = model.num_classes
    target = torch.randint(classes, (size,)) if classes > 1 else torch.randn(size)
    target = target.to(trainer.accelerator.device)
    return lambda: trainer.train_step(input, target)
