"""Saved weights made ready to run: the model on its device, and the data that it was trained on."""

import logging
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dfs_engine.checks import check_choice, check_numbers
from dfs_engine.data import DataSplits, load_data
from dfs_engine.data.config import OWN_DATASETS, DataConfig
from dfs_engine.data.text import TextDataset
from dfs_engine.evaluation.operations import count_operations
from dfs_engine.models import MultiExitModel, create_model, load_model, read_description
from dfs_engine.training.batches import eval_loader, to_device, worker_deaths
from dfs_engine.training.config import DEVICES, PRECISIONS
from dfs_engine.training.out_of_memory import batch_in_memory

if TYPE_CHECKING:
    from accelerate import Accelerator

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class SavedRunConfig:
    """Which saved weights to run, and how."""

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
    progress: bool = True
    """Show progress bars, where there is a terminal."""

    def __post_init__(self) -> None:
        check_choice("precision", self.precision, PRECISIONS)
        check_choice("device", self.device, DEVICES)
        check_numbers(self, "", {">= 1": ("batch_size", "num_threads")})


class SavedRun:
    """The model of saved weights, in eval mode on its device.

    Raises:
        FileNotFoundError, ValueError: the weights cannot be read, or the data are not to be seen as is asked for.
    """

    def __init__(self, config: SavedRunConfig) -> None:
        from dfs_engine.training.build import accelerator_for

        if config.num_threads is not None:
            torch.set_num_threads(config.num_threads)
        self.config = config
        self.model, self.description = load_model(config.path), read_description(config.path)
        self.data_config = _as_trained_on(config.data, self.description["data"])
        self.accelerator: Accelerator = accelerator_for(config.device, config.precision)
        self.model.to(self.accelerator.device).eval()
        self.memory_format = torch.channels_last if config.channels_last else torch.contiguous_format
        if config.channels_last:
            self.model.to(memory_format=torch.channels_last)

    def load_data(self) -> DataSplits:
        """The run's data.

        Raises:
            FileNotFoundError, ValueError: they cannot be read, or are not those of the weights.
        """
        _check_same_held_out(self.data_config, self.description["data"])
        data = load_data(self.data_config, input_shape=self.model.input_shape)
        _check_classes(self.config.path, self.data_config, data, self.model, self.description)
        return data

    def operations(self, data: DataSplits) -> list[int] | None:
        """Of each exit, as `dfs info` counts them, of an image of the test data, or of a text of their mean length.

        None, which the log explains, of a model with an operator that nobody has counted.
        """
        stock = create_model(**{**self.model.get_config(), "variant": "dense", "backend": None}, device="meta")
        test = data.test
        if isinstance(test, TextDataset):
            stock.input_shape = (round(float(test.starts[-1]) / len(test)),)
        else:
            stock.input_shape = tuple(test[0][0].shape)
        try:
            return [cost.operations for cost in count_operations(stock)]
        except NotImplementedError as error:
            logger.warning("operations: not counted, the number of blocks stands for them (%s)", error)
            return None

    def loader(self, samples: Any, batch_size: int | None = None) -> Any:
        """Batches of samples, in order."""
        options = {
            "num_workers": self.config.data.num_workers,
            "pin_memory": self.accelerator.device.type == "cuda",
        }
        return eval_loader(samples, batch_size or self.config.batch_size, **options)

    def batches(self, samples: Any, batch_size: int | None = None) -> Iterator[tuple[Any, Tensor]]:
        """(input, label) of each batch, the input on the device. Errors about memory and workers say what to do."""
        loader = self.loader(samples, batch_size)
        with worker_deaths([loader]), batch_in_memory("batch_size", batch_size or self.config.batch_size):
            for input, target in loader:
                yield to_device(input, self.accelerator.device, self.memory_format), target


def data_of(path: Path | str, **options: Any) -> DataConfig:
    """The data that weights were trained on, with `options` in place of theirs."""
    options = read_description(path)["data"] | options
    given: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in options.items()
    }
    return DataConfig(**given)


def _as_trained_on(config: DataConfig, trained_on: dict[str, Any]) -> DataConfig:
    """With the normalisation that the weights were trained with, unless another is asked for."""
    if config.mean is not None:
        return config
    kept: dict[str, Any] = {
        name: tuple(trained_on[name]) for name in ("mean", "std") if isinstance(trained_on.get(name), list)
    }
    return replace(config, **kept)


def _check_same_held_out(config: DataConfig, trained_on: dict[str, Any]) -> None:
    """Raises ValueError if what `config` keeps out may be what the weights were trained on."""
    name = trained_on.get("name", config.name)  # weights from elsewhere do not say, and saw all training samples
    then = {"val_fraction": trained_on.get("val_fraction", 0.0), "split_seed": trained_on.get("split_seed", 0)}
    now = {option: getattr(config, option) for option in then}
    if config.name == name and config.val_fraction > 0 and now != then:
        wanted, given = (", ".join(f"data.{key}={value}" for key, value in each.items()) for each in (then, now))
        raise ValueError(
            f"data.val_fraction: expected {wanted} as the weights were trained with, got {given}, which would keep out "
            "samples that were trained on. Leave the flags out, or train anew with them."
        )


def _check_classes(
    path: Path, config: DataConfig, data: DataSplits, model: MultiExitModel, description: dict[str, Any]
) -> None:
    """Raises ValueError unless the data have the classes that the weights were trained on."""
    if data.num_classes != model.num_classes:
        raise ValueError(
            f"data: expected {model.num_classes} classes as in {path}, got {data.num_classes} in "
            f"{data.description}. Give the --data flags of the run."
        )
    names = description.get("class_names", data.class_names)
    if config.name in OWN_DATASETS and names != data.class_names:
        raise ValueError(
            f"data: expected the classes of {path}, {', '.join(names)}, got {', '.join(data.class_names)} in "
            f"{data.description}. They are those of its training samples: give data with the same."
        )
