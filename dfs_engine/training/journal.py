"""What a run tells people while it trains: log lines, a progress bar, TensorBoard's events, metrics.csv and a plot."""

import contextlib
import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import yaml
from tqdm import tqdm

from dfs_engine.data import DataSplits
from dfs_engine.evaluation.metrics import TITLES
from dfs_engine.models import MultiExitModel
from dfs_engine.runtime.backend import select
from dfs_engine.runtime.files import write_text
from dfs_engine.training import report, run_folder
from dfs_engine.training.config import TrainConfig
from dfs_engine.training.progress import Progress

if TYPE_CHECKING:
    from accelerate import Accelerator

logger = logging.getLogger(__name__)


class Journal:
    """Of one run. Only its main process is to call what writes; the progress bar shows itself there alone."""

    def __init__(
        self, config: TrainConfig, run_dir: Path, accelerator: "Accelerator", model: MultiExitModel, data: DataSplits
    ) -> None:
        self.config, self.run_dir, self.accelerator, self.model, self.data = config, run_dir, accelerator, model, data
        self._events: Any = None

    @contextlib.contextmanager
    def opened(self, step: int) -> Iterator[None]:
        """Writes TensorBoard's events in the block, of a run that has done `step` steps."""
        is_written = self.config.tensorboard and self.accelerator.is_main_process
        with report.event_writer(self.run_dir / "tensorboard" if is_written else None, step) as self._events:
            yield

    def begin(self, num_in_epoch: int, num_phases: int = 1) -> None:
        """Writes what the run is and what it runs on.

        Args:
            num_in_epoch: samples that a pass sees. num_phases: passes of an epoch.
        """
        config, accelerator = self.config, self.accelerator
        write_text(self.run_dir / "config.yaml", yaml.safe_dump(config.to_dict(), sort_keys=False))
        environment = {
            **report.environment(accelerator.device, accelerator.num_processes),
            "backend": self._backend(),
            "data": self.data.description,
            "model": self.model.get_config(),
            "process": run_folder.this_process(),
        }
        write_text(self.run_dir / run_folder.ENVIRONMENT_FILE, yaml.safe_dump(environment, sort_keys=False))
        logger.info(
            "training: %s with %s for %s of %s%d samples in batches of %d, on %s",
            report.title(environment["model"]),
            report.counted(self.model.num_exits, "exit"),
            report.counted(config.epochs, "epoch"),
            f"{num_phases} passes over " if num_phases > 1 else "",
            num_in_epoch,
            config.batch_size,
            self.data.description,
        )
        logger.info(
            "machine: %s, %s, %s, backend %s",
            environment["device"],
            report.counted(environment["num_threads"], "thread"),
            config.precision,
            environment["backend"],
        )
        logger.info("results: %s", self.run_dir)

    def _backend(self) -> str:
        if self.model.variant != "dfs":
            return "stock"
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.config.precision, torch.float32)
        op = "partitioned_conv2d" if self.model.fork.dim == 1 else "partitioned_linear"
        return select(op, self.accelerator.device, dtype, self.config.model.backend)

    def progress_bar(self, progress: Progress, num_steps: int) -> "tqdm[Any]":
        shown = self.config.progress and self.accelerator.is_main_process and sys.stderr.isatty()
        return tqdm(
            total=num_steps,
            initial=progress.step_in_epoch,
            desc=f"epoch {progress.epoch + 1}/{self.config.epochs}",
            unit="step",
            leave=False,
            disable=not shown,
        )

    def begin_phase(self, progress: Progress, name: str, bar: "tqdm[Any]") -> None:
        """Says which pass of the epoch begins, of a method whose passes have names."""
        if name:
            bar.set_description(f"epoch {progress.epoch + 1}/{self.config.epochs}, {name}")

    def log_step(self, progress: Progress, loss: float, lr: float, bar: "tqdm[Any]") -> None:
        bar.set_postfix(loss=f"{loss:.3f}")
        self._write_scalars({"step/train_loss": loss, "step/lr": lr}, progress.step)
        if bar.disable:  # no terminal: lines instead of a bar
            done = f"{progress.step_in_epoch}/{bar.total}"
            logger.info("epoch %d, step %s: training loss %.4f", progress.epoch + 1, done, loss)

    def end_epoch(self, rows: list[report.Row]) -> None:
        """Writes the metrics of the epochs so far, and says those of the last."""
        row, metric = rows[-1], self.data.metrics[0]
        report.write_csv(self.run_dir / "metrics.csv", rows)
        title = f"{report.title(self.model.get_config())}\n{self.data.description}"
        report.plot_metric(self.run_dir / "accuracy_per_exit.png", rows, metric, title=title)
        scalars = {f"epoch/{name}": value for name, value in row.items() if name not in ("epoch", "step")}
        self._write_scalars(scalars, int(row["step"]))
        measured = []
        for split in self.data.measured:
            exits = [f"{row[f'{split}_{metric}_exit{index}']:.2f}" for index in range(1, self.model.num_exits + 1)]
            ensemble = row[f"{split}_{metric}_ensemble"]
            measured.append(f"{split} {TITLES[metric]} of the exits {' '.join(exits)} %, ensemble {ensemble:.2f} %")
        logger.info(
            "epoch %d/%d: training loss %.4f, %s, %.0f samples/s",
            row["epoch"],
            self.config.epochs,
            row["train_loss"],
            ", ".join(measured),
            row["samples_per_second"],
        )

    def _write_scalars(self, scalars: dict[str, float], step: int) -> None:
        if self._events is not None:
            for name, value in scalars.items():
                self._events.add_scalar(name, value, step)
