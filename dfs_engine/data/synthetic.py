"""Synthetic images that can be learned: a colour pattern for each class under strong noise."""

import torch
import torch.nn.functional as F
from torch import Tensor

from dfs_engine.data.config import Augmentation, DataConfig, Images, RawSplits
from dfs_engine.data.normalization import Normalization

PATTERN_LEVELS = 128
"""Patterns take values below this and the noise the rest of 0..255, so that their sum never overflows uint8."""


def load_synthetic(config: DataConfig, size: tuple[int, int]) -> RawSplits:
    """Images of `size`, equally many of each class; one generator of its own, so the caller's random state is kept."""
    generator = torch.Generator().manual_seed(config.synthetic_seed)
    coarse = torch.rand(config.synthetic_classes, 3, 4, 4, generator=generator) * PATTERN_LEVELS
    patterns = F.interpolate(coarse, size=size, mode="bilinear").to(torch.uint8)

    def part(num_images: int) -> Images:
        labels = torch.arange(num_images) % config.synthetic_classes
        noise: Tensor = torch.randint(
            256 - PATTERN_LEVELS, (num_images, 3, *size), dtype=torch.uint8, generator=generator
        )
        return Images(noise.add_(patterns[labels]), labels.tolist())

    return RawSplits(
        train=part(config.synthetic_train),
        test=part(config.synthetic_test),
        class_names=[f"pattern {index}" for index in range(config.synthetic_classes)],
        description=f"synthetic patterns (not real, {config.synthetic_train} train / {config.synthetic_test} test)",
        normalization=Normalization((0.5,) * 3, (0.2,) * 3),
        augmentation=Augmentation(),
    )
