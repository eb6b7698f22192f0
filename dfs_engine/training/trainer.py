"""The training loop: one epoch after another, each ending in an evaluation, a report and a checkpoint."""

import contextlib
import logging
import os
import signal
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import set_seed
from torch import Tensor, nn
from tqdm import tqdm

from dfs_engine.data import DataSplits, load_data
from dfs_engine.evaluation.conflicts import check_has_conflicts
from dfs_engine.models import MultiExitModel
from dfs_engine.models.weights import WEIGHTS_FILE, save_model
from dfs_engine.runtime import memory
from dfs_engine.training import checkpoint, report, run_folder
from dfs_engine.training.adapters import save_adapters
from dfs_engine.training.batches import EpochBatches, eval_loader, to_device, train_loader, worker_deaths
from dfs_engine.training.build import (
    build_ema,
    build_method,
    build_model,
    build_optimizer,
    input_shape,
    train_accelerator,
)
from dfs_engine.training.config import TrainConfig
from dfs_engine.training.conflicts import record_epoch
from dfs_engine.training.evaluate import evaluate
from dfs_engine.training.journal import Journal
from dfs_engine.training.out_of_memory import batch_in_memory
from dfs_engine.training.progress import Progress
from dfs_engine.training.resume import check_same_run
from dfs_engine.training.schedules import Schedule
from dfs_engine.training.signals import Interrupted, StopRequest
from dfs_engine.training.step import OptimizerStep

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainResult:
    """How a run ended."""

    run_dir: Path
    rows: list[report.Row]
    """One per epoch, the columns of metrics.csv."""
    metrics: dict[str, Any]
    """`ExitMetrics.compute` of the test data after the last epoch."""
    further_metrics: dict[str, dict[str, Any]] = field(default_factory=dict)
    """The same of whatever else `DataSplits.measured` names: val, further test sets."""


class Trainer:
    """Trains a multi-exit model as `config` says.

    The constructor checks and loads everything and writes nothing; `fit` writes the run folder.

    Args:
        model: trained instead of the one that `config.model` names: with exits attached to a backbone, or of a class of
            one's own. To resume, give it again.
        data: used instead of what `config.data` names.

    Raises:
        ValueError, FileNotFoundError: something in the config, the data or the checkpoint to resume from is wrong.
        FileExistsError: the run folder already holds a run. BlockingIOError: a run is writing to it.
        NotADirectoryError, PermissionError: it cannot be made or written.
    """

    def __init__(
        self, config: TrainConfig, *, model: MultiExitModel | None = None, data: DataSplits | None = None
    ) -> None:
        self.config = config
        self.is_custom = model is not None
        if config.num_threads is not None:
            torch.set_num_threads(config.num_threads)
        if config.deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS asks for it
            torch.use_deterministic_algorithms(True)
        if config.run_dir is not None:
            run_folder.check_usable(config.run_dir, resume=config.resume)
        set_seed(config.seed)
        self._load(model, data)
        config = self.config
        if config.conflicts_every:
            check_has_conflicts(self.raw_model)
        self.raw_method = build_method(config, self.raw_model)
        self.accelerator = train_accelerator(config, self.raw_model, self.raw_method)
        self.run_dir = config.run_dir or run_folder.default_path(config.data.name, self.raw_model.get_config())
        self._make_loaders()
        self._prepare()
        self.step = OptimizerStep(config, self.accelerator, self.model, self.method, self.optimizer)
        unreached = [epoch for epoch in config.optim.milestones if epoch >= config.epochs]
        if unreached:
            logger.warning("optim.milestones: %s come after the last of %d epochs", unreached, config.epochs)
        num_phases = self.raw_method.num_phases
        self.steps_per_epoch = self.batches.num_batches * num_phases
        self.samples_per_epoch = self.batches.num_in_epoch * num_phases
        self.schedule = Schedule(config.optim, self.batches.num_batches, config.epochs, num_phases)
        self.journal = Journal(config, self.run_dir, self.accelerator, self.raw_model, self.data)
        self.progress = Progress()
        self.loss_sums = self._zero_losses()
        self.last_checkpoint: Path | None = None
        self._saved_at: tuple[int, int] | None = None
        self._stop = StopRequest(self.accelerator)
        set_seed(config.seed + self.accelerator.process_index)  # every process draws its own dropout
        if config.resume:
            self._resume()

    def _load(self, model: MultiExitModel | None, data: DataSplits | None) -> None:
        """The data, and a model for them."""
        config = self.config
        shape = input_shape(config.model) if model is None else model.input_shape
        self.data = data or load_data(config.data, input_shape=shape)
        if self.data.normalization is not None:  # the numbers themselves: a preset, or the default, may change
            self.config = replace(config, data=replace(config.data, **self.data.normalization._asdict()))
        self.raw_model = model or build_model(config.model, self.data.num_classes)
        if self.raw_model.num_classes != self.data.num_classes:
            raise ValueError(
                f"model: expected one of {self.data.num_classes} classes, as in {self.data.description}, got one of "
                f"{self.raw_model.num_classes}."
            )

    def _make_loaders(self) -> None:
        config, device = self.config, self.accelerator.device
        share = {"rank": self.accelerator.process_index, "num_processes": self.accelerator.num_processes}
        options: dict[str, Any] = {"num_workers": config.data.num_workers, "pin_memory": device.type == "cuda"}
        self.batches = EpochBatches(
            len(self.data.train), config.batch_size, config.seed, max_samples=config.data.max_train, **share
        )
        self.train_loader = train_loader(self.data.train, self.batches, **options)
        self.eval_loaders = {
            name: eval_loader(samples, config.eval_batch_size, **share, **options)
            for name, samples in self.data.measured.items()
        }

    def _prepare(self) -> None:
        """Model, method and optimizer on their device, in the run's precision."""
        config = self.config
        self.memory_format = torch.channels_last if config.channels_last else torch.contiguous_format
        self.raw_model.to(self.accelerator.device).to(memory_format=self.memory_format)
        self.ema = build_ema(self.raw_model, config.optim)  # a copy, hence before `prepare` ties `forward` to the model
        if config.compile:
            self.raw_model.compile()  # in place: the state_dict's names stay
        self.raw_method.to(self.accelerator.device)
        trained = nn.ModuleList([self.raw_model, self.raw_method])
        self.model, self.optimizer = self.accelerator.prepare(self.raw_model, build_optimizer(trained, config.optim))
        has_state = bool(self.raw_method.state_dict())  # then it is part of the checkpoint
        is_trained = any(parameter.requires_grad for parameter in self.raw_method.parameters())
        self.method: nn.Module = self.raw_method
        if has_state:  # DistributedDataParallel takes no module that it has nothing to do for
            self.method = self.accelerator.prepare_model(self.raw_method, evaluation_mode=not is_trained)
        if self.ema is not None:  # a part of the checkpoint, and evaluated in the run's precision
            self.accelerator.prepare_model(self.ema.module, evaluation_mode=True)

    def fit(self) -> TrainResult:
        """Trains until the last epoch.

        Raises:
            FloatingPointError: the loss or a gradient is not finite. MemoryError: the batch does not fit. OSError: the
                disk is full, a worker process of the data loader died, or another process changed the run folder. The
                last checkpoint stays as it was.
            Interrupted: SIGINT (Ctrl-C) or SIGTERM; a checkpoint was saved first. A second one raises it at once.
        """
        with run_folder.locked(self.run_dir, self.accelerator), self._stop.caught():
            if checkpoint.last(self.run_dir) != self.last_checkpoint:
                raise FileExistsError(
                    f"run_dir: expected {self.run_dir} as this run left it, got another run's checkpoint in it."
                )
            with self._says_how_to_go_on(), worker_deaths([self.train_loader, *self.eval_loaders.values()]):
                return self._fit()

    def _fit(self) -> TrainResult:
        config, progress = self.config, self.progress
        if self.accelerator.is_main_process:
            self.journal.begin(self.batches.num_in_epoch, self.raw_method.num_phases)
        metrics: dict[str, dict[str, Any]] | None = None
        caches = config.caching_allocator and self.accelerator.device.type == "cpu" and memory.is_available()
        with self.journal.opened(progress.step), memory.caching_allocator(caches):
            while progress.epoch < config.epochs:
                self._train_epoch()
                metrics = self._finish_epoch()
        if metrics is None:  # resumed after the last epoch
            metrics = self.evaluate()
        test, further = metrics["test"], {name: found for name, found in metrics.items() if name != "test"}
        self.accelerator.wait_for_everyone()
        return TrainResult(self.run_dir, progress.rows, test, further)

    def train_step(self, input: Tensor | Mapping[str, Tensor], target: Tensor) -> Tensor:
        """One optimizer step; returns each exit's loss, (num_exits,)."""
        try:
            losses = self.step(input, target, self.progress.step)
        except FloatingPointError as error:
            where = self._where(self.progress.step + 1)
            raise FloatingPointError(
                f"training: expected finite losses and gradients, got at {where}: {error}. "
                f"Lower --optim.lr, add --optim.warmup_epochs, or use --precision fp32. {self._kept()}"
            ) from None
        if self.ema is not None:
            self.ema.update(self.raw_model, step=self.progress.step + 1)
        return losses

    def evaluate(self) -> dict[str, dict[str, Any]]:
        """Metrics of every exit and of the ensemble on each of `DataSplits.measured`, "test" first."""
        options: dict[str, Any] = {"channels_last": self.config.channels_last, "metrics": self.data.metrics}
        model = self.model if self.ema is None else self.ema.module
        found = {}
        for name, loader in self.eval_loaders.items():
            with batch_in_memory("eval_batch_size", self.config.eval_batch_size):
                found[name] = evaluate(model, loader, self.accelerator, stop=self._stop, **options)
            self._stop_if_asked()
        return found

    def _stop_if_asked(self) -> None:
        """Between two steps: saves and raises Interrupted if a process got a signal."""
        signum = self._stop.agreed()
        if signum is not None:
            if self._saved_at != self._position():
                self._save_checkpoint()
            raise Interrupted(signum)

    def _position(self) -> tuple[int, int]:
        return self.progress.epoch, self.progress.step_in_epoch

    @contextlib.contextmanager
    def _says_how_to_go_on(self) -> Iterator[None]:
        """Adds to what ended the run from outside: the checkpoint that there is, and the command that resumes it."""
        try:
            yield
        except Interrupted as error:
            where = f"stopped by {signal.Signals(error.signum).name} after {self._where(self.progress.step)}"
            raise Interrupted(error.signum, f"{where}. {self._kept()}") from None
        except OSError as error:
            raise OSError(
                f"training stopped after {self._where(self.progress.step)}: {error} {self._kept()}"
            ) from error
        except MemoryError as error:
            raise MemoryError(f"{error} {self._kept()}") from error

    def _where(self, step: int) -> str:
        return f"step {step} (epoch {max(step - 1, 0) // self.steps_per_epoch + 1})"

    def _kept(self) -> str:
        if self.last_checkpoint is None:
            return "No checkpoint was saved yet: start again in another --run_dir."
        command = run_folder.resume_command(self.run_dir, self.accelerator.num_processes)
        how = "Trainer(config, model=...) with the same model and resume=True" if self.is_custom else command
        return f"The last good checkpoint is {self.last_checkpoint}. Go on with: {how}"

    def _train_epoch(self) -> None:
        config, progress = self.config, self.progress
        self.model.train()
        self.schedule.apply(self.optimizer, progress.step)
        self._stop_if_asked()
        size = config.micro_batch_size or self.batches.batch_size // self.batches.num_processes
        remedy = f", or add --micro_batch_size {max(size // 2, 1)}, which computes the same in pieces"
        with (
            self.journal.progress_bar(progress, self.steps_per_epoch) as bar,
            batch_in_memory("batch_size", config.batch_size, remedy),
        ):
            while progress.step_in_epoch < self.steps_per_epoch:
                self._train_phase(bar)

    def _train_phase(self, bar: "tqdm[Any]") -> None:
        """A pass over the data, or what is left of it: all of an epoch, unless the method makes several."""
        config, progress, device = self.config, self.progress, self.accelerator.device
        phase, start = divmod(progress.step_in_epoch, self.batches.num_batches)
        self.batches.epoch, self.batches.start = progress.epoch * self.raw_method.num_phases + phase, start
        self.step.epoch, self.step.phase = progress.epoch, phase
        self.journal.begin_phase(progress, self.raw_method.phase_name(phase), bar)
        started = time.perf_counter() - progress.seconds
        if start == 0:
            self.raw_method.begin_phase(self.step)
        for input, target in self.train_loader:
            target = target.to(device, non_blocking=True)
            losses = self.train_step(to_device(input, device, self.memory_format), target)
            self.loss_sums += losses.double() * len(target)
            start += 1
            if start == self.batches.num_batches:
                self.raw_method.end_phase(self.step)
            progress.step += 1
            progress.step_in_epoch += 1
            progress.seconds = time.perf_counter() - started
            self.schedule.apply(self.optimizer, progress.step)
            bar.update()
            if config.log_every_steps and progress.step % config.log_every_steps == 0:
                loss = losses.sum().item()
                if self.accelerator.is_main_process:
                    self.journal.log_step(progress, loss, self.schedule(progress.step - 1), bar)
            every = config.checkpoint_every_steps
            if every and progress.step % every == 0 and progress.step_in_epoch < self.steps_per_epoch:
                self._save_checkpoint()
            self._stop_if_asked()

    def _finish_epoch(self) -> dict[str, dict[str, Any]]:
        """Evaluates, reports and saves; moves on to the next epoch."""
        progress = self.progress
        metrics = self.evaluate()
        train_losses = [loss_sum / self.samples_per_epoch for loss_sum in self._total_losses()]
        progress.epoch += 1
        row: report.Row = {
            "epoch": progress.epoch,
            "step": progress.step,
            "lr": self.schedule(progress.step - 1),
            "train_loss": sum(train_losses),
            **report.metrics_row(metrics, train_losses),
            "seconds": round(progress.seconds, 3),
            "samples_per_second": round(self.samples_per_epoch / progress.seconds, 1),
        }
        progress.rows.append(row)
        progress.step_in_epoch, progress.seconds, self.loss_sums = 0, 0.0, self._zero_losses()
        with checkpoint.together(self.accelerator, self.run_dir):
            if self.accelerator.is_main_process:
                self.journal.end_epoch(progress.rows)
                every = self.config.conflicts_every
                if every and progress.epoch % every == 0:
                    record_epoch(self.config, self.raw_model, self.data, self.run_dir, progress.epoch)
        self._save_checkpoint()
        return metrics

    def _save_checkpoint(self) -> None:
        progress = self.progress
        progress.loss_sums = self._total_losses()
        config = self.config.to_dict()
        file = self.run_dir / WEIGHTS_FILE
        with checkpoint.together(self.accelerator, file):
            if self.accelerator.is_main_process:
                model, weights = (self.raw_model, "last") if self.ema is None else (self.ema.module, "ema")
                at = {"epoch": progress.epoch, "step": progress.step, "weights": weights}
                extras = {"data": config["data"], "class_names": self.data.class_names, **at}
                save_model(model, file, extras)
                save_adapters(file, dict(self.raw_method.named_parameters()))
        description = {
            "model": self.raw_model.get_config(),
            "config": config,
            "num_train": len(self.data.train),
            "progress": vars(progress),
        }
        self.last_checkpoint = checkpoint.save(
            self.accelerator, self.run_dir, step=progress.step, description=description
        )
        self._saved_at = self._position()

    def _resume(self) -> None:
        folder, saved = checkpoint.latest(self.run_dir, self.raw_model.get_config())
        progress = Progress.load(saved["progress"], self.raw_model.num_exits)
        epoch = progress.epoch + (progress.step_in_epoch > 0)
        check_same_run(saved, self.config, num_train=len(self.data.train), schedule=self.schedule, epoch=epoch)
        settings = [{**group, "params": None} for group in self.optimizer.param_groups]
        checkpoint.restore(self.accelerator, folder)
        for group, setting in zip(self.optimizer.param_groups, settings, strict=True):
            group.update({**setting, "params": group["params"]})  # of now, not of the run before
        self.progress = progress
        if self.accelerator.is_main_process:  # it alone continues the sum over all processes
            self.loss_sums += torch.tensor(progress.loss_sums, dtype=torch.float64)
        self.last_checkpoint, self._saved_at = folder, self._position()
        logger.info("resume: %s, %s", folder, self._where(progress.step))

    def _zero_losses(self) -> Tensor:
        """On the device, so that adding to it does not wait for the step."""
        return torch.zeros(self.raw_model.num_exits, dtype=torch.float64, device=self.accelerator.device)

    def _total_losses(self) -> tuple[float, ...]:
        return tuple(self.accelerator.reduce(self.loss_sums.clone(), "sum").tolist())
