"""Training: config, trainer, schedules and checkpoints.

`Trainer` needs accelerate, so it is imported from `dfs_engine.training.trainer`.
"""

from dfs_engine.training.config import ModelConfig, OptimConfig, TrainConfig
from dfs_engine.training.idle_columns import hold_idle_columns

__all__ = ["ModelConfig", "OptimConfig", "TrainConfig", "hold_idle_columns"]
