"""mixup and CutMix as timm has them (Zhang et al., ICLR 2018; Yun et al., ICCV 2019)."""

import contextlib
from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dfs_engine.data.config import DataConfig
from dfs_engine.runtime.extras import needs


class Mixup:
    """timm's `Mixup`, whose draws are a pure function of seed, rank and step, as everything random about a batch is.

    Args:
        config: its fields `mixup`, `cutmix`, `mixup_prob`, `mixup_switch_prob` and `mixup_mode`.
        num_classes: of the target.
        seed: of the run.
        rank: of this process.

    Raises:
        ModuleNotFoundError: timm is not installed.
    """

    def __init__(self, config: DataConfig, num_classes: int, *, seed: int, rank: int = 0) -> None:
        with needs("vision"):
            from timm.data import Mixup as TimmMixup
        self.num_classes, self.seed, self.rank = num_classes, seed, rank
        self._mix = TimmMixup(
            mixup_alpha=config.mixup,
            cutmix_alpha=config.cutmix,
            prob=config.mixup_prob,
            switch_prob=config.mixup_switch_prob,
            mode=config.mixup_mode,
            label_smoothing=0.0,  # the loss has its own
            num_classes=num_classes,
        )

    def __call__(self, images: Tensor, target: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """Mixes each image with the one as far from the end of the batch as it is from the start.

        The last image of an odd batch stays as it is: timm wants pairs.

        Args:
            images: (N, C, H, W), floating point; not to be used any more.
            target: (N,) class indices.
            step: of the run.

        Returns:
            images of the same shape, and float32 (N, num_classes), the share of each class.
        """
        shares = F.one_hot(target, self.num_classes).float()
        even = len(images) // 2 * 2
        if even:
            with _numpy_seeded(np.random.SeedSequence(self.seed, spawn_key=(self.rank, step))):
                mixed, shares[:even] = self._mix(images[:even], target[:even])
            images = torch.cat([mixed, images[even:]]) if even < len(images) else mixed
        return images, shares


@contextlib.contextmanager
def _numpy_seeded(seed: np.random.SeedSequence) -> Iterator[None]:
    """NumPy's global generator, which timm draws from, seeded; afterwards it is as it was."""
    state = np.random.get_state()
    np.random.seed(seed.generate_state(4))
    try:
        yield
    finally:
        np.random.set_state(state)
