"""`dfs eval`: what saved weights are worth, exit by exit: accuracy, confidence, cost, and accuracy for a budget."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dfs_engine.checks import check_choice, check_numbers
from dfs_engine.data import DataSplits
from dfs_engine.evaluation.calibration import calibrated_confidence, calibration_error, fit_temperature
from dfs_engine.inference.exit_times import time_exits
from dfs_engine.inference.figure import read_curves
from dfs_engine.inference.per_sample import (
    HELD_OUT,
    OutputCollector,
    Outputs,
    Saved,
    is_per_sample_file,
    load_per_sample,
)
from dfs_engine.inference.report import summarize, write_report
from dfs_engine.inference.saved_run import SavedRun, SavedRunConfig
from dfs_engine.models.weights import weights_path
from dfs_engine.runtime.machine import cpu_and_instructions
from dfs_engine.runtime.progress_bar import progress_bar
from dfs_engine.training.batches import worker_deaths
from dfs_engine.training.evaluate import evaluate
from dfs_engine.training.out_of_memory import batch_in_memory
from dfs_engine.training.report import title

_NO_HELD_OUT = (
    "temperatures and budgeted batch classification need samples kept out of training, and this run kept none "
    "(data.val_fraction 0); train with --data.val_fraction 0.1 to have them"
)
_NO_CLASSES = "the network predicts numbers, which have no confidence"


@dataclass(frozen=True, kw_only=True)
class EvalConfig(SavedRunConfig):
    """Which saved weights to measure, on what, and what to write."""

    output: Path | None = None
    """Folder for the results: eval.json, exits.csv, budgeted.csv, accuracy.png and per_sample.safetensors. Default:
    eval, beside the weights."""
    thresholds: str = HELD_OUT
    """val (temperatures, and thresholds for budgeted batch classification, come from the samples that the run's
    data.val_fraction kept out of training) or none (neither is found). Test samples are refused."""
    curve: Path | None = None
    """CSV file with somebody's curves to draw beside this one's: columns operations (as in budgeted.csv) or FLOPs (in
    millions, as papers print them), and accuracy."""
    time_batch_size: int | None = None
    """Also time every exit on this machine, on batches of so many test samples."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.thresholds.startswith("test"):
            raise ValueError(
                f"thresholds: expected {HELD_OUT} or none, got {self.thresholds}. Thresholds chosen on test samples "
                "would flatter the network: train with --data.val_fraction 0.1, which keeps a tenth of the training "
                "samples out, and leave this flag out."
            )
        check_choice("thresholds", self.thresholds, (HELD_OUT, "none"))
        check_numbers(self, "", {">= 1": ("time_batch_size",)})


def run(config: EvalConfig) -> dict[str, Any]:
    """Measures saved weights on the test data of `config.data`, and writes `config.output`.

    Returns:
        See `report.summarize`; under "files" what was written.

    Raises:
        FileNotFoundError, ValueError: the weights or the data cannot be read, or do not fit each other. OSError: the
            results cannot be written.
    """
    curves = [] if config.curve is None else read_curves(config.curve.expanduser())
    is_from_file = is_per_sample_file(config.path)
    folder = _output_folder(config, is_from_file)
    saved = load_per_sample(config.path) if is_from_file else _Measurement(config).run()
    summary = summarize(saved, thresholds=config.thresholds == HELD_OUT)
    files = write_report(folder, saved, summary, curves)
    return {**summary, "files": [str(file) for file in files]}


def _output_folder(config: EvalConfig, is_from_file: bool) -> Path:
    """Where the results go, once it is known that they can."""
    beside = config.path.parent if is_from_file else weights_path(config.path).parent / "eval"
    folder = (config.output or beside).expanduser()
    existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    if not (existing.is_dir() and os.access(existing, os.W_OK | os.X_OK)):
        raise PermissionError(
            f"output: expected a folder that can be written, got {folder}, where {existing} cannot. Give another "
            "--output."
        )
    return folder


class _Measurement:
    """What needs the network: it runs once over each set of samples, the held-out ones first."""

    def __init__(self, config: EvalConfig) -> None:
        self.config = config
        self.saved_run = SavedRun(config)
        self.data = self.saved_run.load_data()
        _check_num_test(config, self.data)
        self.model = self.saved_run.model
        self.prepared = self.saved_run.accelerator.prepare_model(self.model, evaluation_mode=True)
        self.has_classes = self.data.num_classes > 1

    def run(self) -> Saved:
        data, description = self.data, self.saved_run.description
        outputs, metrics = {}, {}
        temperatures: list[float] | None = None
        errors: dict[str, list[float]] = {}
        for split in sorted(data.measured, key=lambda name: name != HELD_OUT):
            collector = OutputCollector(split, temperatures=temperatures, keep_logits=split == HELD_OUT)
            metrics[split] = self._evaluate(split, collector)
            if not self.has_classes:
                continue
            outputs[split] = found = collector.outputs
            calibrated = collector.calibrated
            if split == HELD_OUT and self.config.thresholds == HELD_OUT:
                temperatures = [fit_temperature(logits, found.labels) for logits in collector.logits]
                calibrated = calibrated_confidence(collector.logits, temperatures)
            if calibrated is not None:
                errors[split] = _errors(calibrated, found)
        return Saved(
            {split: outputs[split] for split in data.measured if split in outputs},
            {
                "model": description["model"],
                "title": title(description["model"]),
                "data": data.description,
                "normalization": data.normalization and data.normalization._asdict(),
                "epoch": description["epoch"],
                "class_names": data.class_names,
                "num_exits": self.model.num_exits,
                "operations": self.saved_run.operations(data),
                **self._times(),
                "temperatures": temperatures,
                "calibrated_errors": {split: errors[split] for split in data.measured if split in errors},
                "metrics": {split: metrics[split] for split in data.measured},
                "left_out": self._left_out(),
            },
        )

    def _left_out(self) -> str | None:
        if not self.has_classes:
            return _NO_CLASSES
        return _NO_HELD_OUT if self.data.val is None else None

    def _evaluate(self, split: str, collector: OutputCollector) -> dict[str, Any]:
        config, samples = self.config, self.data.measured[split]
        loader = self.saved_run.loader(samples)
        with (
            worker_deaths([loader]),
            batch_in_memory("batch_size", config.batch_size),
            progress_bar(len(samples), "sample", config.progress) as bar,
        ):
            bar.set_description(f"measuring {split}")

            def observe(logits: list[torch.Tensor], target: torch.Tensor) -> None:
                if self.has_classes:
                    collector(logits, target)
                bar.update(len(target))

            return evaluate(
                self.prepared,
                loader,
                self.saved_run.accelerator,
                channels_last=config.channels_last,
                metrics=self.data.metrics,
                observe=observe,
            )

    def _times(self) -> dict[str, Any]:
        size = self.config.time_batch_size
        device = self.saved_run.accelerator.device
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_and_instructions()
        found: dict[str, Any] = {"seconds": None, "time_batch_size": size, "device": name}
        if size is not None:
            input, _ = next(self.saved_run.batches(self.data.test, size))
            passes = time_exits(self.prepared, input, self.model.num_exits, progress=self.config.progress)
            found["seconds"] = [each / size for each in passes]
            found["device"] = f"{name}, {torch.get_num_threads()} threads, {self.config.precision}"
        return found


def _check_num_test(config: EvalConfig, data: DataSplits) -> None:
    if (config.time_batch_size or 0) > len(data.test):
        raise ValueError(
            f"time_batch_size: expected at most the {len(data.test)} test samples, got {config.time_batch_size}."
        )


def _errors(calibrated: torch.Tensor, outputs: Outputs) -> list[float]:
    return [calibration_error(*each) for each in zip(calibrated, outputs.is_right, strict=True)]
