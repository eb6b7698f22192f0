"""Datasets: real digits that need no files, CIFAR, GLUE, synthetic images, and images and texts of one's own."""

import logging
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

from torch.utils.data import Subset

from dfs_engine.data.cifar import load_cifar
from dfs_engine.data.config import DATASETS, TEXT_DATASETS, DataConfig, RawSplits
from dfs_engine.data.dataset import ImageDataset
from dfs_engine.data.digits import load_digits
from dfs_engine.data.draw import draw_share
from dfs_engine.data.folder import load_folder, load_image_parquet
from dfs_engine.data.glue import load_glue
from dfs_engine.data.normalization import Normalization
from dfs_engine.data.synthetic import load_synthetic
from dfs_engine.data.text import TextDataset
from dfs_engine.data.text_files import load_text_files
from dfs_engine.data.transforms import BatchTransform
from dfs_engine.evaluation.metrics import IMAGE_METRICS

__all__ = ["DATASETS", "DataConfig", "DataSplits", "ImageDataset", "TextDataset", "load_data"]

logger = logging.getLogger(__name__)

_LOADERS: dict[str, Callable[[DataConfig, tuple[int, int]], RawSplits]] = {
    "digits": load_digits,
    "cifar10": load_cifar,
    "cifar100": load_cifar,
    "image_folder": load_folder,
    "image_parquet": load_image_parquet,
    "synthetic": load_synthetic,
}


Samples = ImageDataset | TextDataset | Subset[Any]


class DataSplits(NamedTuple):
    """What the trainer learns from and is measured on. Items are (input, label), see `ImageDataset`, `TextDataset`."""

    train: Samples
    test: Samples
    num_classes: int
    """1: the labels are numbers, and the model is to predict them."""
    class_names: list[str]
    description: str
    """One line for logs and tables that says whether the data are real."""
    metrics: tuple[str, ...] = IMAGE_METRICS
    """What is measured (see `ExitMetrics`), the main one first."""
    normalization: Normalization | None = None
    """Of the images."""
    val: Samples | None = None
    """Kept out of training, seen as test samples are (`DataConfig.val_fraction`)."""
    further_tests: Mapping[str, Samples] = MappingProxyType({})
    """Test sets besides `test`, by a name that begins with "test_" (MNLI's mismatched one)."""

    @property
    def measured(self) -> dict[str, Samples]:
        """All that is measured after an epoch, by the names that the columns of metrics.csv begin with."""
        return {"test": self.test, **self.further_tests, **({} if self.val is None else {"val": self.val})}


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
    as_test = BatchTransform(size, *normalization)
    splits = DataSplits(
        train=ImageDataset(raw.train, BatchTransform(size, *normalization, augmentation)),
        test=ImageDataset(raw.test, as_test),
        num_classes=len(raw.class_names),
        class_names=raw.class_names,
        description=raw.description,
        normalization=normalization,
    )
    source = raw.train.source if raw.train_as_test is None else raw.train_as_test
    train_as_test = ImageDataset(raw.train._replace(source=source), as_test)
    return _with_val(splits, train_as_test, raw.train.labels, config)


def _load_text(config: DataConfig, longest: int) -> DataSplits:
    raw = (load_text_files if config.name == "text_files" else load_glue)(config, longest)
    logger.info("data: %s", raw.description)
    splits = DataSplits(
        train=raw.train,
        test=raw.test,
        num_classes=len(raw.class_names) or 1,
        class_names=raw.class_names,
        description=raw.description,
        metrics=raw.metrics,
        further_tests=raw.further_tests,
    )
    return _with_val(splits, raw.train, raw.train.labels, config)


def _with_val(splits: DataSplits, train_as_test: Samples, labels: Sequence[Any], config: DataConfig) -> DataSplits:
    """`splits` with the share of `train` as `val` that `config` asks for."""
    if config.val_fraction == 0:
        return splits
    kept, drawn = draw_share(labels, config.val_fraction, config.split_seed)
    if not drawn or not kept:
        raise ValueError(
            f"data.val_fraction: expected a share that leaves some of the {len(labels)} training samples on both "
            f"sides, got {config.val_fraction}, which is {len(drawn)} of them."
        )
    return splits._replace(
        train=Subset(splits.train, kept),
        val=Subset(train_as_test, drawn),
        description=f"{splits.description}, of train {len(drawn)} kept out as val",
    )
