"""Datasets: real digits that need no files, CIFAR, image folders, synthetic images, and GLUE's sentences."""

import logging
from collections.abc import Callable
from typing import NamedTuple

from dfs_engine.data.cifar import load_cifar
from dfs_engine.data.config import DATASETS, TEXT_DATASETS, DataConfig, RawSplits
from dfs_engine.data.dataset import ImageDataset
from dfs_engine.data.digits import load_digits
from dfs_engine.data.folder import load_folder
from dfs_engine.data.glue import load_glue
from dfs_engine.data.normalization import Normalization
from dfs_engine.data.synthetic import load_synthetic
from dfs_engine.data.text import TextDataset
from dfs_engine.data.transforms import BatchTransform
from dfs_engine.evaluation.metrics import IMAGE_METRICS

__all__ = ["DATASETS", "DataConfig", "DataSplits", "ImageDataset", "TextDataset", "load_data"]

logger = logging.getLogger(__name__)

_LOADERS: dict[str, Callable[[DataConfig, tuple[int, int]], RawSplits]] = {
    "digits": load_digits,
    "cifar10": load_cifar,
    "cifar100": load_cifar,
    "image_folder": load_folder,
    "synthetic": load_synthetic,
}


class DataSplits(NamedTuple):
    """What the trainer learns from and is measured on. Items are (input, label), see `ImageDataset`, `TextDataset`."""

    train: ImageDataset | TextDataset
    test: ImageDataset | TextDataset
    num_classes: int
    """1: the labels are numbers, and the model is to predict them."""
    class_names: list[str]
    description: str
    """One line for logs and tables that says whether the data are real."""
    metrics: tuple[str, ...] = IMAGE_METRICS
    """What is measured (see `ExitMetrics`), the main one first."""
    normalization: Normalization | None = None
    """Of the images."""


def load_data(config: DataConfig, *, input_shape: tuple[int, ...]) -> DataSplits:
    """Loads the dataset that `config` names.

    Args:
        config: `config.image_size` overrides the height and width of `input_shape`.
        input_shape: of the model's input: (3, height, width), or (tokens,) at most.

    Raises:
        FileNotFoundError, ValueError: the dataset is missing, empty or corrupt; the message names the file.
    """
    reads_tokens = len(input_shape) == 1
    if reads_tokens != (config.name in TEXT_DATASETS):
        wanted = TEXT_DATASETS if reads_tokens else tuple(_LOADERS)
        raise ValueError(f"data.name: expected one of {', '.join(wanted)} for this model, got {config.name}.")
    return _load_text(config, *input_shape) if reads_tokens else _load_images(config, input_shape)


def _load_images(config: DataConfig, input_shape: tuple[int, ...]) -> DataSplits:
    channels, height, width = input_shape
    if channels != 3:
        raise ValueError(f"input_shape: expected 3 channels, got {input_shape}.")
    size = (height, width) if config.image_size is None else (config.image_size, config.image_size)
    raw = _LOADERS[config.name](config, size)
    augmentation = config.augmentation(raw.augmentation)
    normalization = config.normalization(raw.normalization)
    logger.info("data: %s; training images: %s; normalised by %s", raw.description, augmentation, normalization)
    return DataSplits(
        train=ImageDataset(raw.train, BatchTransform(size, *normalization, augmentation)),
        test=ImageDataset(raw.test, BatchTransform(size, *normalization)),
        num_classes=len(raw.class_names),
        class_names=raw.class_names,
        description=raw.description,
        normalization=normalization,
    )


def _load_text(config: DataConfig, longest: int) -> DataSplits:
    train, test, task, description = load_glue(config, longest)
    logger.info("data: %s", description)
    return DataSplits(
        train=train,
        test=test,
        num_classes=len(task.class_names) or 1,
        class_names=list(task.class_names),
        description=description,
        metrics=task.metrics,
    )
