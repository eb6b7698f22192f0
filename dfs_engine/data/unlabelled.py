"""Images and texts without labels, seen as the test samples of a dataset are: what a trained network is to classify."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from dfs_engine.data.config import OWN_DATASETS, TEXT_DATASETS, DataConfig, Images
from dfs_engine.data.dataset import ImageDataset
from dfs_engine.data.encoded import DecodedImages, ImageFiles, crops, readable
from dfs_engine.data.glue import TASKS
from dfs_engine.data.normalization import Normalization
from dfs_engine.data.tables import FORMATS, read_table
from dfs_engine.data.text import TextDataset, check_texts, load_tokenizer
from dfs_engine.data.transforms import BatchTransform, resize

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
"""Of the files that a folder of images is searched for: those of torchvision's ImageFolder."""


class Unlabelled(NamedTuple):
    """What is to be classified.

    Attributes:
        samples: items are (input, position).
        names: of each, what a person knows it by: its path, or the text.
        num_skipped: how many more there are, which cannot be read.
    """

    samples: ImageDataset | TextDataset
    names: list[str]
    num_skipped: int


def load_unlabelled(
    path: Path, config: DataConfig, *, input_shape: tuple[int, ...], skip_broken: bool = False
) -> Unlabelled:
    """Reads an image file or a folder of them, or a file of texts, for a model that was trained on `config`.

    Args:
        config: with the mean and std that the model was trained with.
        input_shape: of the model's input, as in `load_data`.
        skip_broken: leave out images that cannot be decoded, and say how many.

    Raises:
        FileNotFoundError: nothing there. ValueError: it is none of these; the message names the file.
    """
    path = path.expanduser()
    if not path.exists():
        raise FileNotFoundError(f"input: expected a file or a folder, got {path} (nothing there).")
    if config.name in TEXT_DATASETS:
        return _load_texts(path, config, *input_shape)
    return _load_images(path, config, input_shape, skip_broken)


def _load_images(path: Path, config: DataConfig, input_shape: tuple[int, ...], skip_broken: bool) -> Unlabelled:
    if config.mean is None:
        raise ValueError(
            "data.mean: expected the mean and std that the weights were trained with, got none, and the weights do not "
            "say. Give --data.mean, as numbers or by a preset's name."
        )
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if _is_image(file))
    if not files:
        raise FileNotFoundError(f"input: expected images ({', '.join(IMAGE_SUFFIXES)}), got none in {path}.")
    encoded = ImageFiles([str(file) for file in files], "input", "skip_broken")
    rows = readable(encoded, skip_broken, str(path))
    _, height, width = input_shape
    size = (height, width) if config.image_size is None else (config.image_size, config.image_size)
    transform = crops(config, size)[1] if config.name in OWN_DATASETS else _centre_of(size)
    normalization = config.normalization(Normalization((0.0,) * 3, (1.0,) * 3))
    images = Images(DecodedImages(encoded, rows, transform), range(len(rows)))
    samples = ImageDataset(images, BatchTransform(size, *normalization))
    return Unlabelled(samples, [encoded.paths[row] for row in rows], len(files) - len(rows))


def _is_image(file: Path) -> bool:
    return file.suffix.lower() in IMAGE_SUFFIXES and file.is_file()


def _centre_of(size: tuple[int, int]) -> Callable[[Any], Tensor]:
    """PIL image -> uint8 (3, *size): the largest part of that shape, from the centre, resized as the dataset's are.

    An image of the dataset's own shape stays whole, so that it is what it was in training.
    """

    def transform(image: Any) -> Tensor:
        scale = min(image.height / size[0], image.width / size[1])
        height, width = (max(1, round(scale * side)) for side in size)
        top, left = (image.height - height) // 2, (image.width - width) // 2
        pixels = torch.from_numpy(np.array(image.crop((left, top, left + width, top + height))))
        return resize(pixels.permute(2, 0, 1)[None].contiguous(), size)[0]

    return transform


def _load_texts(path: Path, config: DataConfig, longest: int) -> Unlabelled:
    columns = config.text_columns() or (TASKS[config.name].columns if config.name in TASKS else ("text",))
    expected = (
        f"a text in each line of a .txt file{' (two, with a tab between)' if len(columns) > 1 else ''}, or a file with "
        f"columns {', '.join(columns)} ({', '.join(FORMATS)}; JSON by lines)"
    )
    tokenizer = load_tokenizer(config, longest)
    if path.suffix in FORMATS and path.is_file():
        table = read_table([path], columns, expected, text=columns, argument="input")
        texts = [table.columns[column].to_pylist() for column in columns]
        check_texts(texts, table.where)
    elif path.suffix == ".txt" and path.is_file():
        texts = _read_lines(path, len(columns), expected)
    else:
        raise ValueError(f"input: expected {expected}, got {path}.")
    if not texts[0]:
        raise ValueError(f"input: expected {expected}, got {path} without any.")
    positions = range(len(texts[0]))
    samples = TextDataset(tokenizer, texts, positions, max_tokens=config.max_tokens, title="tokenising")
    return Unlabelled(samples, ["\t".join(each) for each in zip(*texts, strict=True)], 0)


def _read_lines(path: Path, num_columns: int, expected: str) -> list[list[str]]:
    """The texts of each column; empty lines are none."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"input: expected {expected}, in UTF-8, got {path} ({error}).") from None
    rows = []
    for number, line in enumerate(lines, start=1):
        cells = line.split("\t") if num_columns > 1 else [line]
        if len(cells) != num_columns and line.strip():
            raise ValueError(f"input: expected {expected}, got {len(cells)} in line {number} of {path}.")
        if line.strip():
            rows.append(cells)
    return [[row[column] for row in rows] for column in range(num_columns)]
