"""Whether a saved run may go on with the config of now, and what that changes."""

import logging
from collections.abc import Iterator
from dataclasses import fields
from typing import Any

from dfs_engine.training.config import OptimConfig, TrainConfig
from dfs_engine.training.schedules import Schedule
from dfs_engine.training.weights import REMEDY

logger = logging.getLogger(__name__)

# No option, but what they come to.
_SAMPLES = "data: number of training samples"
# With another value of these a resumed run would be another run, or could not take over the optimizer's state.
_FIXED = ("method", "batch_size", "seed", "optim.name", "optim.decay_norm_and_bias", "optim.ema_decay", _SAMPLES)
# These say where the data are and how they are read, not what they are.
_FREE_DATA = ("data.root", "data.tokenizer", "data.num_workers")
# These change nothing of the run.
_SILENT = ("run_dir", "progress", "tensorboard", "wandb", "log_every_steps", "checkpoint_every_steps")


def check_same_run(
    saved: dict[str, Any], config: TrainConfig, *, num_train: int, steps_per_epoch: int, epoch: int
) -> None:
    """Compares a checkpoint with what is to go on with it; warns of what goes on differently.

    Args:
        saved: the checkpoint's manifest.
        num_train: training samples now.
        epoch: epochs that the checkpoint has begun.

    Raises:
        ValueError: something differs that the run cannot go on with.
    """
    if not isinstance(saved["config"].get("optim"), dict) or not isinstance(saved["config"].get("epochs"), int):
        raise ValueError(
            f"checkpoint: expected the config of a run in its manifest, got {str(saved['config'])[:200]}. {REMEDY}"
        )
    written, now = dict(_flat(saved["config"])), dict(_flat(config.to_dict()))
    before = dict(_flat(TrainConfig().to_dict())) | written  # an option that is newer than the run had its default
    before[_SAMPLES] = written[_SAMPLES] = saved.get("num_train", num_train)
    now[_SAMPLES] = num_train
    changed = [name for name in now if before.get(name) != now[name] and name not in _SILENT]
    for name in changed:
        if name in _FIXED or (name in written and name.startswith("data.") and name not in _FREE_DATA):
            raise ValueError(
                f"{name}: expected {before.get(name)!r} as in the run to resume, got {now[name]!r}. "
                "Give the same value, or start another run in another --run_dir."
            )
    if config.epochs < epoch:
        raise ValueError(
            f"epochs: expected at least {epoch}, which the run to resume has begun, got {config.epochs}. "
            "Give more, or start another run in another --run_dir."
        )
    for name in changed:
        logger.warning("resume: going on with another %s: %r, was %r", name, now[name], before.get(name))
    known = {field.name for field in fields(OptimConfig)}
    optim = OptimConfig(**{name: value for name, value in saved["config"]["optim"].items() if name in known})
    lr_before = Schedule(optim, steps_per_epoch, saved["config"]["epochs"])(saved["progress"]["step"])
    lr = Schedule(config.optim, steps_per_epoch, config.epochs)(saved["progress"]["step"])
    if lr != lr_before:
        logger.warning("resume: the next step's learning rate is %.4g; by the run's schedule: %.4g", lr, lr_before)


def _flat(config: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted name, value) of every option; an option that is a dict itself (model.options) stays one."""
    for name, value in config.items():
        if isinstance(value, dict) and not prefix:
            yield from _flat(value, f"{name}.")
        else:
            yield prefix + name, value
