"""ResNet (He et al., CVPR 2016) with an exit after every stage, as in self-distillation (Zhang et al., TPAMI 2021).

Block k is a stage, the first one with the stem in front. Of a split feature the next stage's first residual block reads
twice, on its main path and in its shortcut, and the exit reads twice, in its gate and in the product with it.
"""

from itertools import pairwise
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from dfs_engine.checks import check_choice
from dfs_engine.models.multi_exit import Block, MultiExitModel
from dfs_engine.models.registry import register_models
from dfs_engine.nn import (
    ConvAct,
    ConvNormReLU,
    Exit,
    ExitHead,
    Fork,
    Reading,
    apply_layer,
    apply_norm_relu,
    can_fix,
    global_avg_pool,
    multiply,
    whole,
)

# kernel sizes of a residual block's convolutions, width of its last one as a multiple of the others
_BASIC = ((3, 3), 1)
_BOTTLENECK = ((1, 3, 1), 4)
# name -> residual block, residual blocks per stage
_CONFIGS = {
    # The paper's comparison with BYOT.
    "resnet18": (_BASIC, (2, 2, 2, 2)),
    "resnet34": (_BASIC, (3, 4, 6, 3)),
    "resnet50": (_BOTTLENECK, (3, 4, 6, 3)),
}
# stem -> image size
_STEMS = {"cifar": 32, "imagenet": 224}


class Stem(ConvNormReLU):
    """3x3, or, for `large` images, 7x7 with stride 2 and a max pool with stride 2 behind it."""

    def __init__(self, in_channels: int, out_channels: int, *, large: bool, **dd: Any) -> None:
        super().__init__(in_channels, out_channels, *((7, 2) if large else (3, 1)), **dd)
        self.large = large

    def forward(self, *input: Any, residual: Tensor | None = None) -> Tensor:
        output = super().forward(*input, residual=residual)
        return F.max_pool2d(output, 3, 2, 1) if self.large else output

    def for_inference(self) -> nn.Module:
        """See `dfs_engine.inference.prepare`."""
        fixed = super().for_inference()
        return nn.Sequential(fixed, nn.MaxPool2d(3, 2, 1)) if self.large and fixed is not self else fixed


class ResidualBlock(nn.Module):
    """Convolutions, the last one with the shortcut as its residual: (N, in, H, W) -> (N, out, H / stride, W / stride).

    Args:
        in_channels: of the input.
        width: channels behind every convolution but the last, which has `expansion` times as many.
        kernel_sizes: of the convolutions; the first 3x3 one has the stride.
    """

    def __init__(
        self, in_channels: int, width: int, kernel_sizes: tuple[int, ...], expansion: int, stride: int, **dd: Any
    ) -> None:
        super().__init__()
        widths = [in_channels, *[width] * (len(kernel_sizes) - 1), width * expansion]
        strides = [1] * len(kernel_sizes)
        strides[kernel_sizes.index(3)] = stride
        layers = zip(widths, widths[1:], kernel_sizes, strides, strict=False)
        self.layers = nn.ModuleList(ConvNormReLU(*layer, **dd) for layer in layers)
        self.shortcut_conv = self.shortcut_bn = None
        if stride != 1 or in_channels != widths[-1]:
            self.shortcut_conv = nn.Conv2d(in_channels, widths[-1], 1, stride, bias=False, **dd)
            self.shortcut_bn = nn.BatchNorm2d(widths[-1], **dd)

    def forward(self, *input: Any) -> Tensor:
        if self.shortcut_conv is None or self.shortcut_bn is None:
            shortcut = whole(input)
        else:
            shortcut = self.shortcut_bn(apply_layer(self.shortcut_conv, input))
        *layers, last = self.layers
        for layer in layers:
            input = (layer(*input),)
        return last(*input, residual=shortcut)

    def for_inference(self) -> nn.Module:
        """See `dfs_engine.inference.prepare`."""
        if self.shortcut_conv is not None and can_fix(self.shortcut_conv, self.shortcut_bn):
            backend = getattr(self.shortcut_conv, "backend", None)
            fixed = ConvAct(self.shortcut_conv, self.shortcut_bn, backend=backend)
            for name, layer in (("shortcut_conv", fixed), ("shortcut_bn", nn.Identity())):
                setattr(self, name, layer)
        return self


class Stage(Block):
    """The residual blocks of one size, behind the stem if it is the first: the feature that its exit reads."""

    def __init__(self, stem: Stem | None, residual_blocks: list[ResidualBlock]) -> None:
        super().__init__()
        self.stem, self.residual_blocks = stem, nn.ModuleList(residual_blocks)

    def make(self, *input: Any) -> Tensor:
        for layer in self.residual_blocks if self.stem is None else [self.stem, *self.residual_blocks]:
            input = (layer(*input),)
        return whole(input)


class SepConv(nn.Module):
    """Depthwise 3x3, 1x1, BN, ReLU, twice: (N, in, H, W) -> (N, out, ceil(H / 2), ceil(W / 2))."""

    def __init__(self, in_channels: int, out_channels: int, **dd: Any) -> None:
        super().__init__()
        depthwise: Any = {"padding": 1, "groups": in_channels, "bias": False, **dd}
        self.depthwise1 = nn.Conv2d(in_channels, in_channels, 3, stride=2, **depthwise)
        self.pointwise1 = ConvNormReLU(in_channels, in_channels, 1, **dd)
        self.depthwise2 = nn.Conv2d(in_channels, in_channels, 3, **depthwise)
        self.pointwise2 = ConvNormReLU(in_channels, out_channels, 1, **dd)

    def forward(self, *input: Any) -> Tensor:
        hidden = self.pointwise1(apply_layer(self.depthwise1, input))
        return self.pointwise2(self.depthwise2(hidden))


class AttentionExit(Exit):
    """The feature times a gate made of it, separable convolutions, global average pool, linear.

    Args:
        in_channels: channels of the feature.
        num_sep_convs: each halves the size and doubles the channels, up to those of the last stage.
        num_classes: width of the logits.
    """

    def __init__(self, in_channels: int, num_sep_convs: int, num_classes: int, **dd: Any) -> None:
        super().__init__()
        self.gate, self.gate_bn = SepConv(in_channels, in_channels, **dd), nn.BatchNorm2d(in_channels, **dd)
        widths = [in_channels << index for index in range(num_sep_convs + 1)]
        self.sep_convs = nn.Sequential(*(SepConv(*pair, **dd) for pair in pairwise(widths)))
        self.linear = nn.Linear(widths[-1], num_classes, **dd)

    def feature(self, reading: Reading) -> Reading:
        """Of a feature (N, in_channels, H, W): (N, channels of the last stage)."""
        gate = apply_norm_relu(self.gate_bn, self.gate(*reading))
        # Twice the size, of an odd one almost.
        gate = F.interpolate(gate, reading[0].shape[2:], mode="bilinear").sigmoid()
        return global_avg_pool((self.sep_convs(multiply(reading, gate)),))

    def classify(self, feature: Reading) -> Tensor:
        return apply_layer(self.linear, feature)


@register_models(_CONFIGS, "own")
def _create_resnet(
    name: str,
    fork: Fork,
    *,
    num_classes: int,
    stem: str = "cifar",
    width: int = 64,
    in_channels: int = 3,
    device: Any = None,
    dtype: Any = None,
) -> MultiExitModel:
    """`stem`: "cifar" (32 px) or "imagenet" (224 px). `width`: of the first stage. `in_channels`: of the image."""
    (kernel_sizes, expansion), blocks_per_stage = _CONFIGS[name]
    image_size = _STEMS[check_choice("stem", stem, _STEMS)]
    dd = {"device": device, "dtype": dtype}
    blocks: list[Block] = []
    exits: list[nn.Module] = []
    channels, last = width, len(blocks_per_stage) - 1
    for index, num_blocks in enumerate(blocks_per_stage):
        residual_blocks = []
        for position in range(num_blocks):
            stride = 2 if index > 0 and position == 0 else 1
            residual_blocks.append(ResidualBlock(channels, width << index, kernel_sizes, expansion, stride, **dd))
            channels = (width << index) * expansion
        in_front = Stem(in_channels, width, large=stem == "imagenet", **dd) if index == 0 else None
        blocks.append(Stage(in_front, residual_blocks))
        if index < last:
            exits.append(AttentionExit(channels, last - index, num_classes, **dd))
        else:
            exits.append(ExitHead(channels, num_classes, bias=True, **dd))
    shape = (in_channels, image_size, image_size)
    model = MultiExitModel(blocks, exits, fork, num_classes=num_classes, input_shape=shape)
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return model
