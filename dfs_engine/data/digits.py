"""scikit-learn's 1,797 real handwritten digits (UCI, 8x8 pixels): the dataset that needs no files."""

import numpy as np
import torch

from dfs_engine.data.config import Augmentation, DataConfig, Images, RawSplits
from dfs_engine.data.normalization import Normalization

NUM_CLASSES = 10


def is_test(labels: np.ndarray) -> np.ndarray:
    """The fixed split: in each class every fifth image, in file order. No generator, so it can never change."""
    test = np.zeros(len(labels), dtype=bool)
    for label in range(NUM_CLASSES):
        test[np.flatnonzero(labels == label)[2::5]] = True
    return test


def load_digits(config: DataConfig, size: tuple[int, int]) -> RawSplits:
    """The digits in 3 equal channels; they stay 8x8 here, and grow to the model's size batch by batch."""
    from sklearn.datasets import load_digits as load_from_sklearn

    digits = load_from_sklearn()
    grey = np.round(digits.images * (255 / 16)).astype(np.uint8)  # the values are 0..16
    images = torch.from_numpy(grey)[:, None].repeat(1, 3, 1, 1)
    test = is_test(digits.target)

    def part(chosen: np.ndarray) -> Images:
        return Images(images[torch.from_numpy(chosen)], digits.target[chosen].tolist())

    return RawSplits(
        train=part(~test),
        test=part(test),
        class_names=[str(digit) for digit in range(NUM_CLASSES)],
        description=f"scikit-learn digits (real, {np.sum(~test)} train / {np.sum(test)} test)",
        normalization=Normalization((0.3053,) * 3, (0.3757,) * 3),
        augmentation=Augmentation(crop_padding=1),  # a mirrored digit is not a digit
    )
