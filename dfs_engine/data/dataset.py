"""The dataset that the trainer reads: a split's images through a batch transform."""

from collections.abc import Sequence

from torch import Tensor
from torch.utils.data import Dataset

from dfs_engine.data.config import Images
from dfs_engine.data.transforms import BatchTransform


class ImageDataset(Dataset[tuple[Tensor, int]]):
    """Items are (float32 (3, H, W), label). A DataLoader fetches whole batches through `__getitems__`."""

    def __init__(self, images: Images, transform: BatchTransform) -> None:
        self.images = images
        self.transform = transform

    def __len__(self) -> int:
        return len(self.images.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[tuple[Tensor, int]]:
        batch = self.transform(self.images.source[list(indices)])
        return [(image, self.images.labels[index]) for image, index in zip(batch, indices, strict=True)]
