"""CIFAR-10 and CIFAR-100 from either layout in which people have them, decoded once to uint8 in memory."""

import pickle
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from dfs_engine.data.config import Augmentation, DataConfig, Images, RawSplits
from dfs_engine.data.encoded import report_skipped
from dfs_engine.data.normalization import PRESETS
from dfs_engine.data.tables import Table, take

SIZE = 32


class Layout(NamedTuple):
    """What tells the two datasets apart on disk."""

    title: str
    num_classes: int
    folder: str
    train_files: tuple[str, ...]
    test_file: str
    meta_file: str
    label_key: str
    names_key: str
    columns: tuple[str, ...]

    @property
    def expected(self) -> str:
        return (
            f"{self.title} either in torchvision's layout ({self.folder}/{self.train_files[0]}, ...) or as Hugging "
            f"Face parquet files (train*.parquet and test*.parquet with columns img or image, and "
            f"{' or '.join(self.columns)})"
        )


LAYOUTS = {
    "cifar10": Layout(
        title="CIFAR-10",
        num_classes=10,
        folder="cifar-10-batches-py",
        train_files=tuple(f"data_batch_{index}" for index in range(1, 6)),
        test_file="test_batch",
        meta_file="batches.meta",
        label_key="labels",
        names_key="label_names",
        columns=("label",),
    ),
    "cifar100": Layout(
        title="CIFAR-100",
        num_classes=100,
        folder="cifar-100-python",
        train_files=("train",),
        test_file="test",
        meta_file="meta",
        label_key="fine_labels",
        names_key="fine_label_names",
        columns=("fine_label", "label"),
    ),
}


def load_cifar(config: DataConfig, size: tuple[int, int]) -> RawSplits:
    """Reads the dataset `config.name` below `config.root`."""
    layout = LAYOUTS[config.name]
    root = config.folder(layout.expected)
    if (root / layout.folder).is_dir():
        train, test, class_names = _read_pickles(root / layout.folder, layout)
    elif any(root.glob("*.parquet")):
        train, test, class_names = _read_parquet(root, layout, config)
    else:
        raise FileNotFoundError(f"data.root: expected {layout.expected}, got {root}, which holds neither.")
    return RawSplits(
        train=train,
        test=test,
        class_names=class_names,
        description=f"{layout.title} (real, {len(train.labels)} train / {len(test.labels)} test)",
        normalization=PRESETS[config.name],
        augmentation=Augmentation(crop_padding=4, crop_fill=128, flip=True, autoaugment=True, cutout=16),
    )


def _corrupt(path: Path, problem: object, layout: Layout) -> ValueError:
    return ValueError(f"data.root: expected {layout.expected}, got a file that cannot be used: {path}: {problem}.")


def _checked(path: Path, images: Tensor, labels: list[int], layout: Layout) -> Images:
    """`images` (N, 3, 32, 32) with their labels, once every label is known to be a class."""
    if len(images) != len(labels):
        raise _corrupt(path, f"{len(images)} images but {len(labels)} labels", layout)
    wrong = [label for label in labels if not (isinstance(label, int) and 0 <= label < layout.num_classes)]
    if wrong:
        raise _corrupt(path, f"label {wrong[0]} is outside 0..{layout.num_classes - 1}", layout)
    return Images(images, labels)


def _joined(parts: list[Images]) -> Images:
    sources: Any = [part.source for part in parts]
    return Images(torch.cat(sources), [label for part in parts for label in part.labels])


# torchvision's layout


class _ArrayUnpickler(pickle.Unpickler):
    """Loads NumPy arrays and plain containers only: unpickling anything else could run code from the file."""

    ALLOWED = ("numpy._reconstruct", "numpy._frombuffer", "numpy.ndarray", "numpy.dtype", "_codecs.encode")

    def find_class(self, module: str, name: str) -> Any:
        package = module.split(".")[0]  # NumPy has moved these between its modules
        if f"{package}.{name}" in self.ALLOWED:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it contains {module}.{name}, which no CIFAR file does")


def _unpickle(path: Path, key: str, layout: Layout) -> dict[str, Any]:
    """The dictionary in `path`, which must have `key`."""
    try:
        with path.open("rb") as file:
            content = _ArrayUnpickler(file, encoding="latin1").load()
    except FileNotFoundError:
        raise FileNotFoundError(f"data.root: expected {layout.expected}, got no file {path}.") from None
    except Exception as error:  # a damaged pickle can raise anything
        raise _corrupt(path, error, layout) from error
    if not isinstance(content, dict) or key not in content:
        raise _corrupt(path, f"no entry {key!r}", layout)
    return content


def _read_pickles(folder: Path, layout: Layout) -> tuple[Images, Images, list[str]]:
    def read(name: str) -> Images:
        path = folder / name
        content = _unpickle(path, layout.label_key, layout)
        pixels = content.get("data")
        if not isinstance(pixels, np.ndarray) or pixels.dtype != np.uint8 or pixels.shape[1:] != (3 * SIZE * SIZE,):
            raise _corrupt(path, f"'data' is not a uint8 array of shape (N, {3 * SIZE * SIZE})", layout)
        images = torch.from_numpy(pixels).view(-1, 3, SIZE, SIZE)
        return _checked(path, images, content[layout.label_key], layout)

    train = _joined([read(name) for name in layout.train_files])
    class_names = _unpickle(folder / layout.meta_file, layout.names_key, layout)[layout.names_key]
    return train, read(layout.test_file), class_names


# Hugging Face parquet files


def _read_parquet(root: Path, layout: Layout, config: DataConfig) -> tuple[Images, Images, list[str]]:
    def read(split: str) -> tuple[Images, list[str]]:
        paths = sorted(root.glob(f"{split}*.parquet"))
        if not paths:
            raise FileNotFoundError(f"data.root: expected {layout.expected}, got no {split}*.parquet in {root}.")
        parts, names = zip(*(_read_parquet_file(path, layout, config) for path in paths), strict=True)
        return _joined(list(parts)), names[0]

    train, class_names = read("train")
    return train, read("test")[0], class_names


def _read_parquet_file(path: Path, layout: Layout, config: DataConfig) -> tuple[Images, list[str]]:
    """The images and labels of one file, and the class names that its metadata gives (else their numbers)."""
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise _corrupt(path, error, layout) from error
    image_names = ("img", "image") if config.image_column is None else (config.image_column,)
    label_names = layout.columns if config.label_column is None else (config.label_column,)
    image_column = next((name for name in image_names if name in table.column_names), None)
    label_column = next((name for name in label_names if name in table.column_names), None)
    if image_column is None or label_column is None:
        columns = ", ".join(table.column_names)
        remedy = "name others with data.image_column and data.label_column"
        raise _corrupt(path, f"its columns are {columns}; {remedy}", layout)
    class_names = Table(table, []).class_names(label_column) or [str(label) for label in range(layout.num_classes)]
    cells = (cell for chunk in table[image_column].chunks for cell in chunk.to_pylist())
    images, broken = _decode(path, cells, table.num_rows, layout, config)
    labels = table[label_column].to_pylist()
    if broken:
        report_skipped([f"row {row} of {path}" for row in broken], table.num_rows, path.name)
        kept = sorted(set(range(table.num_rows)) - set(broken))
        images, labels = images[kept], take(labels, kept)
    return _checked(path, images, labels, layout), class_names


def _decode(
    path: Path, cells: Iterable[Any], num_images: int, layout: Layout, config: DataConfig
) -> tuple[Tensor, list[int]]:
    """uint8 (num_images, 3, 32, 32) from the encoded image (JPEG, PNG, ...) in each cell, and rows to skip."""
    from torchvision.io import ImageReadMode, decode_image

    images = torch.empty(num_images, 3, SIZE, SIZE, dtype=torch.uint8)
    broken: list[int] = []
    # disable=None: no bar where nobody watches.
    for row, cell in enumerate(tqdm(cells, total=num_images, desc=f"decoding {path.name}", unit="img", disable=None)):
        try:
            encoded = torch.frombuffer(bytearray(cell["bytes"]), dtype=torch.uint8)
            image = decode_image(encoded, ImageReadMode.RGB)
        except (RuntimeError, ValueError, TypeError) as error:  # damaged, empty, null
            if config.skip_broken:
                broken.append(row)
                continue
            remedy = "replace it, or leave out all such images: --data.skip_broken true"
            raise _corrupt(path, f"row {row}: {error}; {remedy}", layout) from error
        if image.shape != images.shape[1:]:
            found = f"the image has {image.shape[2]}x{image.shape[1]} pixels, not 32x32"
            raise _corrupt(path, f"row {row}: {found}; data.name image_parquet takes any size", layout)
        images[row] = image
    return images, broken
