"""VGG with an exit after every convolution, as in the paper's training-efficiency experiments (section 4.4).

Block: conv3x3, ReLU, BatchNorm, and a 2x2 max pool at the end of a stage. The first convolution has a bias, the others
none.

The published network has each layer behind a fork in two, of f+ and of f-, in its runs without surgery too. Here
it is one layer; what that leaves to be told apart is its start and its columns that nobody trains.
"""

import math
from collections.abc import Iterator
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dfs_engine.checks import check_choice
from dfs_engine.models.multi_exit import Block, Distillation, MultiExitModel
from dfs_engine.models.registry import register_models
from dfs_engine.nn import (
    Affine,
    ConvAct,
    ExitHead,
    Fork,
    NormAct2d,
    Reading,
    apply_layer,
    can_fix,
    is_fixed_norm,
    produce_from,
)
from dfs_engine.partition import ChannelSlice, Partition

# name -> convolutions per stage, width of each stage as a multiple of the first, image size, pixels a side of what
# feature distillation compares
_CONFIGS = {
    # The paper's CPU experiment: 6 exits.
    "vgg7_64": ((2, 2, 2), (1, 2, 4), 32, 4),
    # The paper's GPU experiment: 13 exits.
    "vgg16_64": ((2, 2, 3, 3, 3), (1, 2, 4, 8, 8), 224, 1),
}
INITS = ("published", "torch")


class VGGBlock(Block):
    """conv3x3, ReLU, BatchNorm, optional max pool: (N, in, H, W) -> (N, out, H, W) or (N, out, H // 2, W // 2)."""

    def __init__(self, in_channels: int, out_channels: int, *, bias: bool, pool: bool, device: Any, dtype: Any) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.conv = nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=bias, **dd)
        self.bn = nn.BatchNorm2d(out_channels, **dd)
        self.pool = pool

    def make(self, *input: Any) -> Tensor:
        feature = self.bn(F.relu(apply_layer(self.conv, input), inplace=True))
        return F.max_pool2d(feature, 2) if self.pool else feature

    def produce(self, input: tuple, fork: Fork, is_last: bool, **context: Any) -> tuple[Reading, ...]:
        # Not `dfs`, or e.g. converted to SyncBatchNorm; and torch.export wants stock operators one by one.
        if not isinstance(self.bn, NormAct2d) or torch.compiler.is_exporting():
            return super().produce(input, fork, is_last)
        return produce_from(self.conv, self.bn, input, fork, pool=self.pool, is_last=is_last)

    def for_inference(self) -> nn.Module:
        """See `dfs_engine.inference.prepare`."""
        return FixedVGGBlock(self) if can_fix(self.conv) and is_fixed_norm(self.bn) else self

    def extra_repr(self) -> str:
        return f"pool={self.pool}"


class FixedVGGBlock(Block):
    """A `VGGBlock` in evaluation, in one pass, which gives the exit its average too."""

    def __init__(self, block: VGGBlock) -> None:
        super().__init__()
        backend = getattr(block.conv, "backend", None)
        self.conv = ConvAct(block.conv, relu=True, affine=Affine.of(block.bn), pool=block.pool, backend=backend)

    def make(self, *input: Any) -> Tensor:
        return self.conv(*input)

    def produce(self, input: tuple, fork: Fork, is_last: bool, **context: Any) -> tuple[Reading, ...]:
        feature, average = self.conv.with_average(*input)
        if is_last:
            return (feature,), (average,)
        deeper, _ = fork(feature)
        _, exit = fork(average)
        return deeper, exit


class VGG(MultiExitModel):
    """A chain of `VGGBlock`s, each with an `ExitHead`."""

    def idle_columns(self) -> Iterator[tuple[nn.Parameter, ChannelSlice]]:
        if self.fork.reference or self.fork.variant == "dense":
            return
        *split, _ = (cast(VGGBlock, block).conv.out_channels for block in self.blocks)
        for index, channels in enumerate(split):
            num_shared, exit_start = self.fork.live_channels(channels)
            deeper, exit = cast(VGGBlock, self.blocks[index + 1]), cast(ExitHead, self.exits[index])
            yield cast(nn.Parameter, deeper.conv.weight), ChannelSlice(num_shared, channels)
            yield cast(nn.Parameter, exit.linear.weight), ChannelSlice(0, exit_start)


@torch.no_grad()
def _draw_as_published(blocks: list[Block], exits: list[nn.Module], beta: float) -> None:
    """torch's own start, of each layer that the published code has: at one seed, the very numbers that it draws."""
    for index, (block, exit) in enumerate(zip(blocks, exits, strict=True)):
        conv, linear = cast(VGGBlock, block).conv, cast(ExitHead, exit).linear
        if index == 0:
            conv.reset_parameters()
        else:
            parts = Partition(conv.in_channels, beta)
            _draw_parts(conv.weight, parts.shared, parts.exit)
        parts = Partition(linear.in_features, beta)
        _draw_parts(linear.weight, parts.exit, parts.shared)


def _draw_parts(weight: Tensor, *parts: ChannelSlice) -> None:
    """Draws each slice of input columns as that of a layer of its own, whose fan-in it is."""
    for columns in parts:
        if columns.width > 0:
            view = columns.of(weight, 1)
            drawn = torch.empty_like(view, memory_format=torch.contiguous_format)
            view.copy_(nn.init.kaiming_uniform_(drawn, a=math.sqrt(5)))


@register_models(_CONFIGS, "own")
def _create_vgg(
    name: str,
    fork: Fork,
    *,
    num_classes: int,
    init: str = "published",
    width: int = 64,
    in_channels: int = 3,
    device: Any = None,
    dtype: Any = None,
) -> MultiExitModel:
    """The published net of `_CONFIGS`.

    Args:
        init: "published": a layer behind a fork starts as two layers of their own, of the columns of f+ and of f-, each
            with its own fan-in; the same in every variant, as published. "torch": as one layer.
        width: channels of the first stage.
        in_channels: of the image.
    """
    check_choice("init", init, INITS)
    convs_per_stage, multiples, image_size, distilled_size = _CONFIGS[name]
    dd = {"device": device, "dtype": dtype}
    blocks: list[Block] = []
    exits: list[nn.Module] = []
    channels = in_channels
    with torch.random.fork_rng(devices=[], enabled=init == "published"):  # which draws anew, and nothing else
        for num_convs, multiple in zip(convs_per_stage, multiples, strict=True):
            for index in range(num_convs):
                is_last = index == num_convs - 1
                blocks.append(VGGBlock(channels, width * multiple, bias=not blocks, pool=is_last, **dd))
                channels = width * multiple
                exits.append(ExitHead(channels, num_classes, **dd))
    if init == "published":
        _draw_as_published(blocks, exits, fork.beta)
    shape = (in_channels, image_size, image_size)
    model = VGG(blocks, exits, fork, num_classes=num_classes, input_shape=shape)
    model.options = {"init": init}
    model.distillation = Distillation("blocks", distilled_size, bias=False)
    return model
