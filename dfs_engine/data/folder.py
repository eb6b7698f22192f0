"""A folder of image files, one subfolder a class, as torchvision's ImageFolder reads it."""

import math
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from dfs_engine.data.config import Augmentation, DataConfig, Images, RawSplits
from dfs_engine.data.normalization import PRESETS

LAYOUT = "a folder with train/<class>/<image files> and val/<class>/<image files> (or test/)"
CROP_SCALE = (0.08, 1.0)
CROP_PCT = 224 / 256


class FolderImages:
    """Reads image files when they are asked for.

    Args:
        paths: one file an image.
        transform: PIL image -> uint8 (3, H, W), the same H and W for every image.
    """

    def __init__(self, paths: list[str], transform: Callable[..., Tensor]) -> None:
        self.paths = paths
        self.transform = transform

    def __getitem__(self, indices: list[int], /) -> Tensor:
        return torch.stack([self._read(self.paths[index]) for index in indices])

    def _read(self, path: str) -> Tensor:
        from torchvision.datasets.folder import pil_loader

        try:
            image = pil_loader(path)
        except (OSError, SyntaxError) as error:  # Pillow raises SyntaxError for a broken PNG
            raise ValueError(f"data.root: expected an image, got {path} ({error}). Replace or delete it.") from error
        return self.transform(image)


def load_folder(config: DataConfig, size: tuple[int, int]) -> RawSplits:
    """Random resized crops for training, resize and centre crop for testing."""
    from torchvision.datasets import ImageFolder
    from torchvision.transforms import v2

    root = config.folder(LAYOUT)
    train_folder = root / "train"
    test_folder = next((root / name for name in ("val", "test") if (root / name).is_dir()), root / "val")

    def part(folder: Path, *steps: v2.Transform) -> tuple[Images, list[str]]:
        try:
            found = ImageFolder(folder)
        except FileNotFoundError as error:
            raise FileNotFoundError(f"data.root: expected {LAYOUT}, got {folder} ({error}).") from error
        paths, labels = zip(*found.samples, strict=True)
        return Images(FolderImages(list(paths), v2.Compose([*steps, v2.PILToTensor()])), labels), found.classes

    resized = math.floor(min(size) / (config.crop_pct or CROP_PCT))
    as_test = (v2.Resize(resized), v2.CenterCrop(size))
    train, class_names = part(train_folder, v2.RandomResizedCrop(size, scale=config.crop_scale or CROP_SCALE))
    train_as_test, _ = part(train_folder, *as_test)
    test, test_class_names = part(test_folder, *as_test)
    if test_class_names != class_names:
        odd = sorted(set(class_names) ^ set(test_class_names))
        raise ValueError(
            f"data.root: expected the same class folders in {train_folder} and {test_folder}, got {', '.join(odd)} "
            f"in one of them only."
        )
    return RawSplits(
        train=train,
        test=test,
        class_names=class_names,
        description=f"image folder {root} ({len(train.labels)} train / {len(test.labels)} test)",
        normalization=PRESETS["imagenet"],
        augmentation=Augmentation(flip=True, policy="imagenet"),
        train_as_test=train_as_test.source,
    )
