"""Augmentation and normalisation of a whole uint8 batch at once, each image with its own random draws.

All randomness comes from torch's global generator, so that seeding it, or restoring its state, repeats every batch.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from dfs_engine.data.config import Augmentation


def random_crop(images: Tensor, padding: int, fill: int) -> Tensor:
    """Each (3, H, W) image shifted by up to `padding` pixels a side; the border reads as `fill`."""
    num_images, _, height, width = images.shape
    padded = F.pad(images, (padding,) * 4, value=fill)
    windows = padded.unfold(2, height, 1).unfold(3, width, 1)  # a view: (N, 3, 2p + 1, 2p + 1, H, W)
    top, left = torch.randint(2 * padding + 1, (2, num_images))
    return windows[torch.arange(num_images), :, top, left]


def random_flip(images: Tensor) -> Tensor:
    """Mirrors each image left to right with probability 1/2."""
    flipped = torch.rand(len(images)) < 0.5
    return torch.where(flipped[:, None, None, None], images.flip(-1), images)


def random_cutout(images: Tensor, size: int) -> Tensor:
    """Blacks out one `size` x `size` square an image, centred anywhere and clipped at the border (DeVries & Taylor)."""
    num_images, _, height, width = images.shape
    top = torch.randint(height, (num_images, 1)) - size // 2
    left = torch.randint(width, (num_images, 1)) - size // 2
    rows, columns = torch.arange(height), torch.arange(width)
    in_rows = (rows >= top) & (rows < top + size)
    in_columns = (columns >= left) & (columns < left + size)
    hole = in_rows[:, None, :, None] & in_columns[:, None, None, :]
    return images.masked_fill(hole, 0)


def resize(images: Tensor, size: tuple[int, int]) -> Tensor:
    """uint8 (N, 3, H, W) -> (N, 3, *size), bilinearly, as torchvision does."""
    if images.shape[-2:] == size:
        return images
    return F.interpolate(images, size, mode="bilinear", antialias=True)


class BatchTransform:
    """uint8 (N, 3, H, W) -> float32 (N, 3, *size): augmented, resized bilinearly if needed, normalised."""

    def __init__(
        self,
        size: tuple[int, int],
        mean: tuple[float, ...],
        std: tuple[float, ...],
        augmentation: Augmentation | None = None,
    ) -> None:
        self.size = size
        self.augmentation = augmentation or Augmentation()
        self._mean = torch.tensor(mean).mul(255).view(-1, 1, 1)
        self._inverse_std = torch.tensor(std).mul(255).reciprocal().view(-1, 1, 1)
        if self.augmentation.autoaugment:
            from torchvision.transforms import v2

            policy = v2.AutoAugmentPolicy(self.augmentation.policy)
            self._autoaugment = v2.AutoAugment(policy, fill=self.augmentation.crop_fill)
        if self.augmentation.color_jitter:
            from torchvision.transforms import v2

            self._color_jitter = v2.ColorJitter(*[self.augmentation.color_jitter] * 3)

    def __call__(self, images: Tensor) -> Tensor:
        augmentation = self.augmentation
        if augmentation.crop_padding:
            images = random_crop(images, augmentation.crop_padding, augmentation.crop_fill)
        if augmentation.flip:
            images = random_flip(images)
        if augmentation.autoaugment:
            # One call on the batch would draw one policy for all of it.
            images = torch.stack([self._autoaugment(image) for image in images])
        if augmentation.color_jitter:
            images = torch.stack([self._color_jitter(image) for image in images])
        if augmentation.cutout:
            images = random_cutout(images, augmentation.cutout)
        images = resize(images, self.size)
        return images.to(torch.float32).sub_(self._mean).mul_(self._inverse_std)
