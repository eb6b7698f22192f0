"""Datasets: real digits that need no files, CIFAR, image folders, and synthetic images."""

import logging
from collections.abc import Callable
from typing import NamedTuple

from dfs_engine.data.cifar import load_cifar
from dfs_engine.data.config import DATASETS, DataConfig, RawSplits
from dfs_engine.data.dataset import ImageDataset
from dfs_engine.data.digits import load_digits
from dfs_engine.data.folder import load_folder
from dfs_engine.data.synthetic import load_synthetic
from dfs_engine.data.transforms import BatchTransform

__all__ = ["DATASETS", "DataConfig", "DataSplits", "ImageDataset", "load_data"]

logger = logging.getLogger(__name__)

_LOADERS: dict[str, Callable[[DataConfig, tuple[int, int]], RawSplits]] = {
    "digits": load_digits,
    "cifar10": load_cifar,
    "cifar100": load_cifar,
    "image_folder": load_folder,
    "synthetic": load_synthetic,
}


class DataSplits(NamedTuple):
    """What the trainer learns from and is measured on."""

    train: ImageDataset
    test: ImageDataset
    num_classes: int
    class_names: list[str]
    description: str
    """One line for logs and tables that says whether the images are real."""


def load_data(config: DataConfig, *, input_shape: tuple[int, int, int]) -> DataSplits:
    """Loads the dataset that `config` names.

    Args:
        config: `config.image_size` overrides the height and width of `input_shape`.
        input_shape: (3, height, width) of the model's input.

    Raises:
        FileNotFoundError, ValueError: the dataset is missing, empty or corrupt; the message names the file.
    """
    channels, height, width = input_shape
    if channels != 3:
        raise ValueError(f"input_shape: expected 3 channels, got {input_shape}.")
    size = (height, width) if config.image_size is None else (config.image_size, config.image_size)
    raw = _LOADERS[config.name](config, size)
    augmentation = config.augmentation(raw.augmentation)
    logger.info("data: %s, %s", raw.description, augmentation)
    return DataSplits(
        train=ImageDataset(raw.train, BatchTransform(size, raw.mean, raw.std, augmentation)),
        test=ImageDataset(raw.test, BatchTransform(size, raw.mean, raw.std)),
        num_classes=len(raw.class_names),
        class_names=raw.class_names,
        description=raw.description,
    )
