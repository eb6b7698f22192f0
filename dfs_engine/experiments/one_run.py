"""The work of a run's process: training, and what the table needs besides metrics.csv."""

import logging
import resource
import sys
import traceback
from dataclasses import replace

import torch

from dfs_engine.checks import one_line
from dfs_engine.evaluation.operations import ExitCost, count_operations
from dfs_engine.experiments.budget import budget_curve
from dfs_engine.experiments.record import BUDGET_FILE, METRICS_FILE, Outcome
from dfs_engine.models.weights import WEIGHTS_FILE
from dfs_engine.training import checkpoint
from dfs_engine.training.build import build_model
from dfs_engine.training.config import TrainConfig
from dfs_engine.training.report import write_csv
from dfs_engine.training.trainer import Trainer

logger = logging.getLogger(__name__)

# What the user's options or data cause, which a message tells; anything else keeps its traceback in the log.
_TOLD = (ValueError, FileNotFoundError, ImportError, MemoryError, OSError)


def train(config: TrainConfig) -> Outcome:
    """Trains in config.run_dir, from its checkpoint where there is one; never raises for what a run can end by."""
    try:
        outcome = _train(config)
    except KeyboardInterrupt as error:
        outcome = Outcome(status="stopped", error=str(error))
    except BlockingIOError as error:
        return Outcome(status="busy", error=str(error))
    except FloatingPointError as error:
        outcome = Outcome(status="diverged", error=one_line(error, 500))
    except Exception as error:
        traceback.print_exc()
        kind = "" if isinstance(error, _TOLD) else f"{type(error).__name__}: "
        outcome = Outcome(status="failed", error=kind + one_line(error, 500))
    return replace(outcome, peak_memory_mib=_peak_memory_mib())


def _train(config: TrainConfig) -> Outcome:
    assert config.run_dir is not None
    has_checkpoint = checkpoint.last(config.run_dir) is not None
    if not has_checkpoint:  # of a process that was killed while it wrote the first one
        for name in (METRICS_FILE, WEIGHTS_FILE):
            (config.run_dir / name).unlink(missing_ok=True)
    trainer = Trainer(replace(config, resume=has_checkpoint))
    costs = _costs(config, trainer)
    trainer.fit()
    curve = budget_curve(trainer, costs) if costs else []
    if curve:
        write_csv(config.run_dir / BUDGET_FILE, curve)
    return Outcome(
        status="finished",
        operations=[cost.operations for cost in costs],
        parameters=[cost.parameters for cost in costs],
    )


def _costs(config: TrainConfig, trainer: Trainer) -> list[ExitCost]:
    """Of the model without surgery, which computes the same; none where an operator is not known."""
    stock = replace(config.model, variant="dense", backend=None)
    try:
        return count_operations(build_model(stock, trainer.data.num_classes, device="meta"))
    except NotImplementedError as error:  # on the meta device too, where a model looks at values
        logger.warning("operations are not counted: %s", one_line(error))
        return []


def _peak_memory_mib() -> float:
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return round(torch.cuda.max_memory_allocated() / 2**20, 1)
    unit = 1 if sys.platform == "darwin" else 2**10  # of ru_maxrss, in bytes
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20, 1)
