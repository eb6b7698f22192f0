"""VGG with an exit after every convolution, as in the paper's training-efficiency experiments (section 4.4).

Block: conv3x3, ReLU, BatchNorm, and a 2x2 max pool at the end of a stage. The first convolution has a bias, the others
none.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dfs_engine.models.multi_exit import Block, MultiExitModel
from dfs_engine.models.registry import register_model
from dfs_engine.nn import ExitHead, Fork, Reading, apply_layer, produce_readings

# name -> convolutions per stage, width of each stage as a multiple of the first, image size
_CONFIGS = {
    "vgg7_64": ((2, 2, 2), (1, 2, 4), 32),
    "vgg16_64": ((2, 2, 3, 3, 3), (1, 2, 4, 8, 8), 224),
}


class VGGBlock(Block):
    """conv3x3, ReLU, BatchNorm, optional max pool: (N, in, H, W) -> (N, out, H, W) or (N, out, H // 2, W // 2)."""

    def __init__(self, in_channels: int, out_channels: int, *, bias: bool, pool: bool, device: Any, dtype: Any) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.conv = nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=bias, **dd)
        self.bn = nn.BatchNorm2d(out_channels, **dd)
        self.pool = pool

    def forward(self, input: Reading) -> Tensor:
        feature = self.bn(F.relu(apply_layer(self.conv, input), inplace=True))
        return F.max_pool2d(feature, 2) if self.pool else feature

    def produce(self, input: Reading, fork: Fork, is_last: bool) -> tuple[Reading, Reading]:
        if fork.variant != "dfs" or type(self.bn) is not nn.BatchNorm2d:  # e.g. converted to SyncBatchNorm
            return super().produce(input, fork, is_last)
        if isinstance(input, Tensor):  # the image: the kernels behind it want channels_last, and it is small
            input = fork.whole(input.contiguous(memory_format=torch.channels_last))
        return produce_readings(apply_layer(self.conv, input), self.bn, fork, pool=self.pool, is_last=is_last)

    def extra_repr(self) -> str:
        return f"pool={self.pool}"


def _create_vgg(
    name: str,
    *,
    num_classes: int,
    beta: float,
    variant: str,
    reference: bool,
    exit_gradient: str | None,
    backend: str | None,
    width: int = 64,
    in_channels: int = 3,
    device: Any = None,
    dtype: Any = None,
) -> MultiExitModel:
    """`width`: channels of the first stage. `in_channels`: of the image."""
    convs_per_stage, multiples, image_size = _CONFIGS[name]
    dd = {"device": device, "dtype": dtype}
    blocks: list[Block] = []
    exits: list[nn.Module] = []
    channels = in_channels
    for num_convs, multiple in zip(convs_per_stage, multiples, strict=True):
        for index in range(num_convs):
            is_last = index == num_convs - 1
            blocks.append(VGGBlock(channels, width * multiple, bias=not blocks, pool=is_last, **dd))
            channels = width * multiple
            exits.append(ExitHead(channels, num_classes, **dd))
    fork = Fork(beta, variant, reference=reference, exit_gradient=exit_gradient or "own", backend=backend)
    shape = (in_channels, image_size, image_size)
    return MultiExitModel(blocks, exits, fork, num_classes=num_classes, input_shape=shape)


@register_model
def vgg7_64(**kwargs: Any) -> MultiExitModel:
    """6 convolutions for 32 px images, 6 exits (the paper's CPU experiment)."""
    return _create_vgg("vgg7_64", **kwargs)


@register_model
def vgg16_64(**kwargs: Any) -> MultiExitModel:
    """13 convolutions for 224 px images, 13 exits (the paper's GPU experiment)."""
    return _create_vgg("vgg16_64", **kwargs)
