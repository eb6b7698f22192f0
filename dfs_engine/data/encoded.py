"""Image files, or encoded images in a table, decoded when they are asked for; crops bring them to one size."""

import io
import logging
import math
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

import torch
from torch import Tensor
from tqdm import tqdm

from dfs_engine.data.config import DataConfig
from dfs_engine.data.tables import Table

CROP_SCALE = (0.08, 1.0)
CROP_PCT = 224 / 256
CHECKED_AT_ONCE = 50_000
"""Up to so many images are looked at before training, which takes seconds; of more, only at the user's wish."""

logger = logging.getLogger(__name__)


class BrokenImageError(ValueError):
    """An image that cannot be decoded; the message says which, and what to do."""


class Encoded(Protocol):
    """Encoded images by position.

    Attributes:
        argument: which one gave them, for errors. skip_flag: what leaves out those that cannot be decoded.
    """

    argument: str
    skip_flag: str

    def __len__(self) -> int: ...

    def open(self, index: int) -> "str | io.BytesIO":
        """What Pillow opens."""
        ...

    def where(self, index: int) -> str:
        """The words that tell a person which image it is."""
        ...


class ImageFiles:
    """One path an image."""

    def __init__(self, paths: Sequence[str], argument: str = "data.root", skip_flag: str = "data.skip_broken") -> None:
        self.paths, self.argument, self.skip_flag = paths, argument, skip_flag

    def __len__(self) -> int:
        return len(self.paths)

    def open(self, index: int) -> str:
        return self.paths[index]

    def where(self, index: int) -> str:
        return self.paths[index]


class ImageCells:
    """The column of a table: binary cells, or Hugging Face's {"bytes": ..., "path": ...}."""

    argument = "data.root"
    skip_flag = "data.skip_broken"

    def __init__(self, table: Table, column: str) -> None:
        import pyarrow
        from pyarrow import compute

        cells = table.columns[column]
        if pyarrow.types.is_struct(cells.type) and cells.type.get_field_index("bytes") >= 0:
            cells = compute.struct_field(cells, "bytes")
        if not (pyarrow.types.is_binary(cells.type) or pyarrow.types.is_large_binary(cells.type)):
            raise ValueError(
                f"data.image_column: expected encoded images (PNG, JPEG, ...) in {column}, as bytes or as Hugging "
                f"Face's struct with bytes, got {cells.type}. Name another column."
            )
        self.cells = cells
        self.table = table

    def __len__(self) -> int:
        return len(self.cells)

    def open(self, index: int) -> io.BytesIO:
        return io.BytesIO(self.cells[index].as_py() or b"")

    def where(self, index: int) -> str:
        return self.table.where(index)


class DecodedImages:
    """An `ImageSource` of encoded images.

    Args:
        encoded: all images.
        rows: positions in `encoded` of the images that this source has.
        transform: PIL image -> uint8 (3, H, W), the same H and W for every image.
    """

    def __init__(self, encoded: Encoded, rows: Sequence[int], transform: Callable[..., Tensor]) -> None:
        self.encoded = encoded
        self.rows = rows
        self.transform = transform

    def __getitem__(self, indices: list[int], /) -> Tensor:
        return torch.stack([self.transform(decode(self.encoded, self.rows[index])) for index in indices])


def decode(encoded: Encoded, index: int) -> Any:
    """The PIL image at a position, in RGB.

    Raises:
        BrokenImageError: it cannot be decoded.
    """
    return _opened(encoded, index, lambda image: image.convert("RGB"))


def _opened(encoded: Encoded, index: int, use: Callable[[Any], Any]) -> Any:
    from PIL import Image

    try:
        with Image.open(encoded.open(index)) as image:
            return use(image)
    except MemoryError:
        raise
    except Exception as error:  # the decoders of damaged files raise anything
        raise BrokenImageError(
            f"{encoded.argument}: expected an image, got {encoded.where(index)} ({error or type(error).__name__}). "
            f"Replace or delete it, or leave out all such images: --{encoded.skip_flag} true."
        ) from error


def readable(encoded: Encoded, skip_broken: bool, title: str) -> list[int]:
    """Positions of the images to use: all, or with `skip_broken` those that can be decoded, and says how many.

    Raises:
        ValueError: nothing is left; or, without skip_broken, an image whose first bytes are not one's.
    """
    positions = range(len(encoded))
    if not skip_broken:
        if len(encoded) <= CHECKED_AT_ONCE:
            for index in tqdm(positions, desc=f"checking {title}", unit="img", disable=None, leave=False):
                _opened(encoded, index, lambda image: None)
        return list(positions)

    def broken(index: int) -> str | None:
        try:
            decode(encoded, index)
        except BrokenImageError:
            return encoded.where(index)
        return None

    with ThreadPoolExecutor(os.cpu_count()) as threads:  # Pillow decodes without Python's lock
        found = threads.map(broken, positions)
        named = list(tqdm(found, desc=f"decoding {title}", total=len(encoded), unit="img", disable=None))
    kept = [index for index, where in enumerate(named) if where is None]
    broken_ones = [where for where in named if where is not None]
    report_skipped(broken_ones, len(encoded), title, argument=encoded.argument, flag=encoded.skip_flag)
    return kept


def report_skipped(
    broken: Sequence[str], count: int, title: str, *, argument: str = "data.root", flag: str = "data.skip_broken"
) -> None:
    """Says which images `flag` leaves out of those that `argument` gave. Raises ValueError if those are all."""
    if len(broken) == count:
        raise ValueError(
            f"{argument}: expected images in {title}, got {count} that cannot be decoded, {broken[:1]} first."
        )
    if broken:
        others = f" and {len(broken) - 5} others" if len(broken) > 5 else ""
        logger.warning(
            "%s: left out %d of %d images of %s, which cannot be decoded: %s%s",
            flag,
            len(broken),
            count,
            title,
            ", ".join(broken[:5]),
            others,
        )


def crops(config: DataConfig, size: tuple[int, int]) -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
    """What brings training images, and test images, of any size to `size`: random resized crops, and the centre."""
    from torchvision.transforms import v2

    resized = math.floor(min(size) / (config.crop_pct or CROP_PCT))
    train = v2.RandomResizedCrop(size, scale=config.crop_scale or CROP_SCALE)
    return (
        v2.Compose([train, v2.PILToTensor()]),
        v2.Compose([v2.Resize(resized), v2.CenterCrop(size), v2.PILToTensor()]),
    )
