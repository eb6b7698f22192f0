"""Accuracy of every exit: after each epoch, and of saved weights (`dfs eval`)."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils.data import DataLoader

from dfs_engine.checks import check_choice, check_numbers
from dfs_engine.data import DataSplits, load_data
from dfs_engine.data.config import OWN_DATASETS, DataConfig
from dfs_engine.evaluation.metrics import IMAGE_METRICS, ExitMetrics
from dfs_engine.models.multi_exit import MultiExitModel, run_model
from dfs_engine.training.batches import eval_loader, to_device, worker_deaths
from dfs_engine.training.config import DEVICES, PRECISIONS

if TYPE_CHECKING:
    from accelerate import Accelerator

    from dfs_engine.training.signals import StopRequest


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """Which saved weights to measure, and on what."""

    path: Path
    """A run folder, or the model.safetensors of one."""
    data: DataConfig = field(default_factory=DataConfig)
    """The data. What is not given is as it was in the run, whatever default is named below."""
    batch_size: int = 256
    """Images or sentences of one batch."""
    precision: str = "fp32"
    """fp32, or autocast to bf16 or fp16."""
    channels_last: bool = True
    """Keep images and convolution weights in channels-last memory order."""
    device: str = "auto"
    """auto (an accelerator where there is one) or cpu."""
    num_threads: int | None = None
    """CPU threads. Default: torch's."""

    def __post_init__(self) -> None:
        check_choice("precision", self.precision, PRECISIONS)
        check_choice("device", self.device, DEVICES)
        check_numbers(self, "", {">= 1": ("batch_size", "num_threads")})


@torch.no_grad()
def evaluate(
    model: nn.Module,
    loader: DataLoader[Any],
    accelerator: "Accelerator",
    *,
    channels_last: bool,
    metrics: Sequence[str] = IMAGE_METRICS,
    stop: "StopRequest | None" = None,
) -> dict[str, Any]:
    """`ExitMetrics.compute` over the loaders of all processes together. Leaves the model in eval mode.

    After a signal that some process's `stop` received, it breaks off and returns an empty dict.
    """
    from accelerate.utils import gather_object

    model.eval()
    device = accelerator.device
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    found = ExitMetrics(accelerator.unwrap_model(model).num_exits, device, metrics)
    for input, target in loader:
        logits = run_model(model, to_device(input, device, memory_format))
        found.update(logits, target.to(device, non_blocking=True))
        if stop is not None and stop.received:
            break
    if stop is not None and stop.agreed():
        return {}
    found.counters = accelerator.reduce(found.counters, "sum")
    found.predictions = gather_object([batch.cpu() for batch in found.predictions])
    return found.compute()


def run(config: EvalConfig) -> dict[str, Any]:
    """Measures saved weights on the test data of `config.data`.

    Returns:
        `ExitMetrics.compute` of the test data, under "further" that of whatever else `DataSplits.measured` names, and
        under "model", "data", "normalization" (of images) and "epoch" what was measured.

    Raises:
        FileNotFoundError, ValueError: the weights or the data cannot be read, or do not fit each other.
    """
    from dfs_engine.models.weights import load_model, read_description
    from dfs_engine.training.build import accelerator_for
    from dfs_engine.training.out_of_memory import batch_in_memory

    if config.num_threads is not None:
        torch.set_num_threads(config.num_threads)
    model, description = load_model(config.path), read_description(config.path)
    data = load_data(_as_trained_on(config.data, description["data"]), input_shape=model.input_shape)
    _check_classes(config, data, model, description)
    accelerator = accelerator_for(config.device, config.precision)
    model.to(accelerator.device)
    if config.channels_last:
        model.to(memory_format=torch.channels_last)
    prepared = accelerator.prepare_model(model, evaluation_mode=True)
    on_gpu = accelerator.device.type == "cuda"
    options = {"num_workers": config.data.num_workers, "pin_memory": on_gpu}
    found = {}
    for name, samples in data.measured.items():
        loader = eval_loader(samples, config.batch_size, **options)
        with worker_deaths([loader]), batch_in_memory("batch_size", config.batch_size):
            found[name] = evaluate(
                prepared, loader, accelerator, channels_last=config.channels_last, metrics=data.metrics
            )
    return {
        **found.pop("test"),
        "further": found,
        "model": description["model"],
        "data": data.description,
        "normalization": data.normalization and data.normalization._asdict(),
        "epoch": description["epoch"],
    }


def _as_trained_on(config: DataConfig, trained_on: dict[str, Any]) -> DataConfig:
    """With the normalisation that the weights were trained with, unless another is asked for."""
    if config.mean is not None:
        return config
    kept: dict[str, Any] = {
        name: tuple(trained_on[name]) for name in ("mean", "std") if isinstance(trained_on.get(name), list)
    }
    return replace(config, **kept)


def _check_classes(config: EvalConfig, data: DataSplits, model: MultiExitModel, description: dict[str, Any]) -> None:
    """Raises ValueError unless the data have the classes that the weights were trained on."""
    if data.num_classes != model.num_classes:
        raise ValueError(
            f"data: expected {model.num_classes} classes as in {config.path}, got {data.num_classes} in "
            f"{data.description}. Give the --data flags of the run."
        )
    names = description.get("class_names", data.class_names)
    if config.data.name in OWN_DATASETS and names != data.class_names:
        raise ValueError(
            f"data: expected the classes of {config.path}, {', '.join(names)}, got {', '.join(data.class_names)} in "
            f"{data.description}. They are those of its training samples: give data with the same."
        )
