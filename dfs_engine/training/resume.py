"""Whether a saved run may go on with the config of now, and what that changes."""

import logging
from collections.abc import Iterator
from dataclasses import fields, replace
from typing import Any

from dfs_engine.models.weights import REMEDY
from dfs_engine.training.config import OptimConfig, TrainConfig
from dfs_engine.training.schedules import Schedule

logger = logging.getLogger(__name__)

# No option, but what they come to.
_SAMPLES = "data: number of training samples"
# With another value of these a resumed run would be another run, or could not take over the optimizer's state.
_FIXED = ("method", "batch_size", "seed", "optim.name", "optim.decay_norm_and_bias", "optim.ema_decay", _SAMPLES)
# Methods' options that their state is shaped by.
_SHAPES = ("wpn.input", "wpn.hidden", "meta_gf.granularity", "dr_mgf.average")
# These say where the data are and how they are read, not what they are.
FREE_DATA = ("data.root", "data.tokenizer", "data.num_workers")
# These change nothing of the run.
_SILENT = (
    "run_dir", "progress", "tensorboard", "wandb", "log_every_steps", "checkpoint_every_steps", "conflicts_every",
)  # fmt: skip


def check_same_run(
    saved: dict[str, Any], config: TrainConfig, *, num_train: int, schedule: Schedule, epoch: int
) -> None:
    """Compares a checkpoint with what is to go on with it; warns of what goes on differently.

    Args:
        saved: the checkpoint's manifest.
        num_train: training samples now. schedule: of now.
        epoch: epochs that the checkpoint has begun.

    Raises:
        ValueError: something differs that the run cannot go on with.
    """
    if not isinstance(saved["config"].get("optim"), dict) or not isinstance(saved["config"].get("epochs"), int):
        raise ValueError(
            f"checkpoint: expected the config of a run in its manifest, got {str(saved['config'])[:200]}. {REMEDY}"
        )
    written = {*dict(flat(saved["config"])), _SAMPLES}
    changed = changed_options(saved["config"], config.to_dict())
    if saved.get("num_train", num_train) != num_train:
        changed[_SAMPLES] = saved["num_train"], num_train
    for name, (before, now) in changed.items():
        if name in _FIXED + _SHAPES or (name in written and name.startswith("data.") and name not in FREE_DATA):
            raise ValueError(
                f"{name}: expected {before!r} as in the run to resume, got {now!r}. "
                "Give the same value, or start another run in another --run_dir."
            )
    if config.epochs < epoch:
        raise ValueError(
            f"epochs: expected at least {epoch}, which the run to resume has begun, got {config.epochs}. "
            "Give more, or start another run in another --run_dir."
        )
    for name, (before, now) in changed.items():
        logger.warning("resume: going on with another %s: %r, was %r", name, now, before)
    known = {field.name for field in fields(OptimConfig)}
    optim = OptimConfig(**{name: value for name, value in saved["config"]["optim"].items() if name in known})
    lr_before = replace(schedule, config=optim, epochs=saved["config"]["epochs"])(saved["progress"]["step"])
    lr = schedule(saved["progress"]["step"])
    if lr != lr_before:
        logger.warning("resume: the next step's learning rate is %.4g; by the run's schedule: %.4g", lr, lr_before)


def changed_options(before: dict[str, Any], now: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """By its dotted name, each option's two values where they differ, but for options that change nothing of the run.

    Args:
        before, now: as `TrainConfig.to_dict`; an option that is newer than `before` had its default.
    """
    old = dict(flat(TrainConfig().to_dict())) | dict(flat(before))
    return {name: (old.get(name), value) for name, value in flat(now) if old.get(name) != value and name not in _SILENT}


def flat(config: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted name, value) of every option; an option that is a dict itself (model.options) stays one."""
    for name, value in config.items():
        if isinstance(value, dict) and not prefix:
            yield from flat(value, f"{name}.")
        else:
            yield prefix + name, value
