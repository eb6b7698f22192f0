"""The layers that read a split feature in the models of the paper, at the sizes they are trained with."""

import fnmatch
from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar


@dataclass(frozen=True, slots=True)
class ConvShape:
    """A square convolution without bias on (batch, channels, size, size); padding keeps the size before striding."""

    op: ClassVar[str] = "conv2d"
    family: str
    batch: int
    channels: int
    out_channels: int
    size: int
    kernel: int = 3
    stride: int = 1
    groups: int = 1

    def __str__(self) -> str:
        groups = f"g{self.groups}" if self.groups > 1 else ""
        geometry = f"k{self.kernel}s{self.stride}{groups}"
        return f"{self.batch}x{self.channels}x{self.size}x{self.size}->{self.out_channels},{geometry}"

    @property
    def out_size(self) -> int:
        return (self.size - 1) // self.stride + 1

    @property
    def flops(self) -> int:
        """Of the forward; each full gradient costs the same."""
        macs = self.batch * self.out_channels * self.out_size**2 * self.kernel**2 * self.channels // self.groups
        return 2 * macs

    @property
    def elements(self) -> int:
        """Numbers that every pass has to touch: input, output and weight."""
        pixels = self.batch * (self.channels * self.size**2 + self.out_channels * self.out_size**2)
        return pixels + self.out_channels * self.channels // self.groups * self.kernel**2


@dataclass(frozen=True, slots=True)
class LinearShape:
    """A linear layer with bias on (batch, tokens, channels)."""

    op: ClassVar[str] = "linear"
    family: str
    batch: int
    tokens: int
    channels: int
    out_channels: int

    def __str__(self) -> str:
        return f"{self.batch}x{self.tokens}x{self.channels}->{self.out_channels}"

    @property
    def flops(self) -> int:
        """Of the forward; each full gradient costs the same."""
        return 2 * self.batch * self.tokens * self.channels * self.out_channels

    @property
    def elements(self) -> int:
        """Numbers that every pass has to touch: input, output and weight."""
        rows = self.batch * self.tokens
        return rows * (self.channels + self.out_channels) + self.channels * self.out_channels


@dataclass(frozen=True, slots=True)
class BlockShape:
    """ReLU, batch normalisation and optional 2x2 max pool on a convolution's output (batch, channels, size, size)."""

    op: ClassVar[str] = "norm_act"
    family: str
    batch: int
    channels: int
    size: int
    pool: bool
    flops: ClassVar[int] = 0  # nothing that counts as arithmetic

    def __str__(self) -> str:
        return f"{self.batch}x{self.channels}x{self.size}x{self.size}{',pool' if self.pool else ''}"

    @property
    def elements(self) -> int:
        """Numbers that every pass has to touch: input and output."""
        return self.batch * self.channels * self.size**2 * (5 if self.pool else 8) // 4


Shape = ConvShape | LinearShape | BlockShape


def matching(shapes: Iterable[Shape], patterns: str) -> list[Shape]:
    """Those whose family/shape matches one of the comma-separated patterns."""
    wanted = [pattern.strip() for pattern in patterns.split(",")]
    return [shape for shape in shapes if any(fnmatch.fnmatch(f"{shape.family}/{shape}", one) for one in wanted)]


def _vgg(family: str, batch: int, stages: tuple[tuple[int, int, int, bool], ...]) -> list[Shape]:
    """From (channels read, channels, pixels, whether a pool follows) of each layer that reads a split feature."""
    convs: list[Shape] = [ConvShape(family, batch, before, width, size) for before, width, size, _ in stages]
    blocks: list[Shape] = [BlockShape(family, batch, width, size, pool) for _, width, size, pool in stages]
    return convs + blocks


# The image's own convolution needs no grad_input and is not listed; nor is a repeated shape.
SHAPES: tuple[Shape, ...] = (
    *_vgg("vgg7", 100, (
        (64, 64, 32, True), (64, 128, 16, False), (128, 128, 16, True), (128, 256, 8, False), (256, 256, 8, True),
    )),
    *_vgg("vgg16", 8, (
        (64, 64, 224, True), (64, 128, 112, False), (128, 128, 112, True), (128, 256, 56, False), (256, 256, 56, True),
        (256, 512, 28, False), (512, 512, 28, True), (512, 512, 14, True),
    )),
    # First convolution and shortcut of stages 2, 3, 4, and the first, depthwise one of an exit.
    *(ConvShape("resnet18", 64, width, 2 * width, size, 3, 2) for width, size in ((64, 32), (128, 16), (256, 8))),
    *(ConvShape("resnet18", 64, width, 2 * width, size, 1, 2) for width, size in ((64, 32), (128, 16), (256, 8))),
    *(ConvShape("resnet18", 64, width, width, size, 3, 2, width) for width, size in ((64, 32), (128, 16), (256, 8))),
    # Bottlenecks on the coarsest scale of the CIFAR-100 net, the 3x3 behind them, and the first convolution of an exit.
    *(ConvShape("msdnet", 64, width, 128, 8, 1) for width in (320, 448, 576)),
    ConvShape("msdnet", 64, 128, 32, 8),
    *(ConvShape("msdnet", 64, width, 128, 8, 3, 2) for width in (320, 576)),
    *(LinearShape("vit_tiny", 8, 197, *widths) for widths in ((192, 576), (192, 192), (192, 768), (768, 192))),
    *(LinearShape("bert", 16, 128, *widths) for widths in ((384, 1152), (384, 384), (384, 1536), (1536, 384))),
)  # fmt: skip
