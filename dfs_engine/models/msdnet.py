"""MSDNet: dense layers on several scales at once, an exit behind every block (Huang et al., ICLR 2018).

The published nets of the paper's accuracy tables. What a block makes and reads is a list of scales, fine to coarse,
(N, C_s, H / 2**s, W / 2**s). Its feature is the coarsest one: that alone is split, and its exit reads nothing else. The
finer scales carry the deeper exits' whole gradient.

A layer concatenates to each scale what it makes of that scale and of the next finer one. As the net gets deeper the
finest scales are dropped, each time with 1x1 convolutions behind that halve the channels of those that are left.
"""

import math
from collections.abc import Iterator
from itertools import pairwise
from typing import Any, NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from dfs_engine.models.multi_exit import Block, MultiExitModel
from dfs_engine.models.registry import register_models
from dfs_engine.nn import (
    ConvNormReLU,
    Exit,
    Fork,
    Reading,
    concat,
    flat,
    fork_concat,
    global_avg_pool,
    readings,
    whole,
)


class _Config(NamedTuple):
    """A published net, for images of `image_size` pixels.

    Attributes:
        base, step: layers of the first block, and of each other one; with `lin_grow` step * k + 1 of block k.
        channels, growth: of the finest scale: its first ones, and those that a layer adds.
        head_width: channels of an exit's convolutions; None: as many as its feature has.
        large_stem: the first convolution is 7x7 with stride 2, and a max pool follows it.
    """

    num_exits: int
    base: int
    step: int
    lin_grow: bool
    channels: int
    growth: int
    num_scales: int
    head_width: int | None
    large_stem: bool
    image_size: int


_CIFAR = _Config(
    num_exits=7,
    base=4,
    step=2,
    lin_grow=False,
    channels=16,
    growth=16,
    num_scales=3,
    head_width=128,
    large_stem=False,
    image_size=32,
)
_CONFIGS = {
    # The paper's CIFAR-100 table: 16 layers.
    "msdnet_cifar": _CIFAR,
    # L2W-DEN's and IMTA's CIFAR net: 15 layers in growing blocks.
    "msdnet_cifar_lin_grow": _CIFAR._replace(num_exits=5, base=1, step=1, lin_grow=True, growth=6),
    # The paper's ImageNet table: 20 layers.
    "msdnet_imagenet": _CIFAR._replace(
        num_exits=5, step=4, channels=32, num_scales=4, head_width=None, large_stem=True, image_size=224
    ),
}
# Of each scale: its channels as a multiple of the finest one's, and a bottleneck's as a multiple of what follows it.
_FACTORS = (1, 2, 4, 4)


class Path(nn.Module):
    """1x1 convolution to `bottleneck` channels, unless None, and 3x3 convolution."""

    def __init__(self, in_channels: int, out_channels: int, bottleneck: int | None, stride: int = 1, **dd: Any) -> None:
        super().__init__()
        self.bottleneck = None if bottleneck is None else ConvNormReLU(in_channels, bottleneck, 1, **dd)
        self.spatial = ConvNormReLU(bottleneck or in_channels, out_channels, 3, stride, **dd)

    def forward(self, *input: Any) -> Tensor:
        return self.spatial(*input) if self.bottleneck is None else self.spatial(self.bottleneck(*input))


class DenseScale(nn.Module):
    """One scale of a layer: itself, what `down` makes of the next finer scale, and what `normal` makes of itself."""

    def __init__(self, down: Path | None, normal: Path) -> None:
        super().__init__()
        self.down, self.normal = down, normal

    def forward(self, *scales: Any) -> Reading:
        """Args: a reading of this scale, and, with `down`, one of the next finer scale before it."""
        *finer, own = readings(scales)
        new = [] if self.down is None else [(self.down(*finer[0]),)]
        return concat(own, *new, (self.normal(*own),))


class Stem(nn.Module):
    """The image at every scale, each made of the next finer one; `large` as in `_Config`."""

    def __init__(self, in_channels: int, widths: list[int], *, large: bool, **dd: Any) -> None:
        super().__init__()
        first = (7, 2, True) if large else (3, 1)
        self.scales = nn.ModuleList([ConvNormReLU(in_channels, widths[0], *first, **dd)])
        self.scales.extend(ConvNormReLU(*pair, 3, 2, **dd) for pair in pairwise(widths))
        self.large = large

    def forward(self, image: Tensor) -> tuple:
        """The readings of the scales, one after the other; so in the modules below."""
        first, *coarser = self.scales
        scale = first(image)
        scales = [F.max_pool2d(scale, 3, 2, 1) if self.large else scale]
        for unit in coarser:
            scales.append(unit(scales[-1]))
        return tuple(scales)


class DenseLayer(nn.Module):
    """Extends every scale that it keeps; the finest ones that it has no `DenseScale` for end here."""

    def __init__(self, scales: list[DenseScale]) -> None:
        super().__init__()
        self.scales = nn.ModuleList(scales)

    def forward(self, *input: Any) -> tuple:
        scales = readings(input)
        num_dropped = len(scales) - len(self.scales)
        finer = [(), *scales]
        return flat(
            scale(*(finer[index] if scale.down is not None else ()), *scales[index])
            for index, scale in enumerate(self.scales, start=num_dropped)
        )


class Transition(nn.Module):
    """A 1x1 convolution on each scale, to half its channels."""

    def __init__(self, widths: list[int], **dd: Any) -> None:
        super().__init__()
        self.scales = nn.ModuleList(ConvNormReLU(width, width // 2, 1, **dd) for width in widths)

    def forward(self, *input: Any) -> tuple:
        return tuple(unit(*scale) for unit, scale in zip(self.scales, readings(input), strict=True))


class MSDNetBlock(Block):
    """The layers between two exits: what it reads of every scale (of the image, for the first) -> every scale."""

    def __init__(self, layers: list[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def make(self, *input: Any) -> list[Reading]:
        *finer, coarsest = self._scales(input)
        return [*finer, (whole(coarsest),)]

    def produce(self, input: tuple, fork: Fork, is_last: bool, **context: Any) -> tuple[Reading, ...]:
        return self.route(self._scales(input), fork, is_last)

    def _scales(self, input: tuple) -> list[Reading]:
        for layer in self.layers:
            input = layer(*input)
        return readings(input)

    def route(self, made: list[Reading], fork: Fork, is_last: bool) -> tuple[Reading, ...]:
        *finer, coarsest = made
        deeper, exit = (coarsest, coarsest) if is_last else fork_concat(coarsest, fork)
        return (*finer, deeper, exit)

    def feature_of(self, made: list[Reading]) -> Tensor:
        return whole(made[-1])


class MSDNetExit(Exit):
    """Two 3x3 convolutions with stride 2, global average pool, dropout, linear."""

    def __init__(self, in_channels: int, width: int, num_classes: int, dropout: float, **dd: Any) -> None:
        super().__init__()
        self.convs = nn.Sequential(ConvNormReLU(in_channels, width, 3, 2, **dd), ConvNormReLU(width, width, 3, 2, **dd))
        self.dropout = nn.Dropout(dropout)
        self.linear = nn.Linear(width, num_classes, **dd)

    def feature(self, reading: Reading) -> Reading:
        """Of a feature (N, in_channels, H, W): (N, width)."""
        first, second = self.convs
        return global_avg_pool((second(first(*reading)),))

    def classify(self, feature: Reading) -> Tensor:
        return self.linear(self.dropout(*feature))


def _dense_layer(
    widths: list[int], num_kept: int, factors: tuple[int, ...], growth: int, bottleneck: bool, dd: dict[str, Any]
) -> tuple[DenseLayer, list[int]]:
    """The layer that reads scales of these widths and keeps the coarsest `num_kept`, and their widths behind it."""

    def path(source: int, out_channels: int, stride: int = 1) -> Path:
        narrow = min(widths[source], factors[source] * out_channels) if bottleneck else None
        return Path(widths[source], out_channels, narrow, stride, **dd)

    scales, extended = [], []
    for index in range(len(widths) - num_kept, len(widths)):
        added = growth * factors[index]
        if index == 0:
            scales.append(DenseScale(None, path(0, added)))
        else:  # half of them from the next finer scale
            scales.append(DenseScale(path(index - 1, added // 2, stride=2), path(index, added // 2)))
        extended.append(widths[index] + added)
    return DenseLayer(scales), extended


def _make_blocks(
    config: _Config, in_channels: int, bottleneck: bool, dd: dict[str, Any]
) -> Iterator[tuple[MSDNetBlock, int]]:
    """Block after block, with the channels of its feature."""
    factors = _FACTORS[: config.num_scales]
    widths = [config.channels * factor for factor in factors]
    layers: list[nn.Module] = [Stem(in_channels, widths, large=config.large_stem, **dd)]
    sizes = [config.step * k + 1 if config.lin_grow else config.step for k in range(config.num_exits)]
    sizes[0] = config.base
    interval = math.ceil(sum(sizes) / config.num_scales)  # layers between two drops
    num_layers = 0
    for size in sizes:
        for _ in range(size):
            num_kept = config.num_scales - num_layers // interval
            is_drop = num_kept < len(widths)
            layer, widths = _dense_layer(widths, num_kept, factors[-len(widths) :], config.growth, bottleneck, dd)
            layers.append(layer)
            if is_drop:
                layers.append(Transition(widths, **dd))
                widths = [width // 2 for width in widths]
            num_layers += 1
        yield MSDNetBlock(layers), widths[-1]
        layers = []


@register_models(_CONFIGS, "whole")
def _create_msdnet(
    name: str,
    fork: Fork,
    *,
    num_classes: int,
    bottleneck: bool = True,
    dropout: float = 0.5,
    in_channels: int = 3,
    device: Any = None,
    dtype: Any = None,
    **sizes: Any,
) -> MultiExitModel:
    """The published net of `_CONFIGS`, except for what is given here.

    Args:
        bottleneck: whether a 1x1 convolution precedes each 3x3 one.
        dropout: before each exit's linear layer; the original MSDNet has none.
        in_channels: of the image.
        sizes: other fields of `_Config`; None: as published.
    """
    unknown = sizes.keys() - set(_Config._fields)
    if unknown:
        raise TypeError(f"{name}: expected options of an MSDNet, got {', '.join(sorted(unknown))}.")
    config = _CONFIGS[name]._replace(**{key: value for key, value in sizes.items() if value is not None})
    if not 1 <= config.num_scales <= len(_FACTORS):
        raise ValueError(f"num_scales: expected 1 to {len(_FACTORS)}, got {config.num_scales}.")
    dd = {"device": device, "dtype": dtype}
    blocks: list[Block] = []
    exits: list[nn.Module] = []
    for block, width in _make_blocks(config, in_channels, bottleneck, dd):
        blocks.append(block)
        exits.append(MSDNetExit(width, config.head_width or width, num_classes, dropout, **dd))
    shape = (in_channels, config.image_size, config.image_size)
    return MultiExitModel(blocks, exits, fork, num_classes=num_classes, input_shape=shape)
