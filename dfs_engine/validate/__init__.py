"""Every op x backend x dtype x layout x slice against float64 reference PyTorch, on this machine: `dfs validate`."""

from dfs_engine.validate.config import ValidateConfig
from dfs_engine.validate.run import run

__all__ = ["ValidateConfig", "run"]
