"""MSDNet's structure as published, and that a frozen channel costs nothing in any layer of a block."""

import math

import pytest
import torch
from torch import nn

from dfs_engine import create_model
from dfs_engine.evaluation.flops import count_flops
from dfs_engine.validate.tolerances import assert_close

FACTORS = (1, 2, 4, 4)


@pytest.mark.parametrize(
    ("name", "num_tensors", "head_channels", "layers"),
    [
        ("msdnet_cifar", 782, [320, 448, 320, 448, 576, 384, 512], [4, 2, 2, 2, 2, 2, 2]),
        ("msdnet_imagenet", 1127, [384, 384, 352, 304, 560], [4, 4, 4, 4, 4]),
        ("msdnet_cifar_lin_grow", None, [88, 136, 104, 200, 208], [1, 2, 3, 4, 5]),
    ],
)
def test_published_structure(name, num_tensors, head_channels, layers):
    model = create_model(name, device="meta")
    assert [exit.convs[0].conv.in_channels for exit in model.exits] == head_channels
    kinds = [[type(layer).__name__ for layer in block.layers] for block in model.blocks]
    assert [names.count("DenseLayer") for names in kinds] == layers
    num_scales = len(model.blocks[0].layers[0].scales)
    assert sum(names.count("Transition") for names in kinds) == num_scales - 1
    assert num_tensors in (None, len(model.state_dict()))
    assert len(model.blocks[-1].layers[-1].scales) == 1  # nothing is made that no exit reads
    has_bias = [conv.bias is not None for conv in model.modules() if isinstance(conv, nn.Conv2d)]
    assert has_bias == [name == "msdnet_imagenet", *[False] * (len(has_bias) - 1)]
    assert all(exit.dropout.p == 0.5 for exit in model.exits)


class Tally:
    """FLOPs of a step, layer by layer: convolutions and linears."""

    def __init__(self, batch: int, reference: bool) -> None:
        self.batch, self.reference = batch, reference
        self.forward = self.backward = 0

    def conv(self, channels: list[bool], out: int, kernel: int, size: int) -> list[bool]:
        """`channels`: which of the input's get a gradient. Returns the same of the output, which is new."""
        per_channel = 2 * self.batch * out * kernel**2 * size**2
        live = sum(channels)
        read = len(channels) if self.reference or channels == IMAGE else live
        self.forward += per_channel * read
        self.backward += per_channel * (read + live)
        return [True] * out


IMAGE = [False] * 3


def count_by_hand(options: dict, size: int, batch: int, beta: float, reference: bool, exit_gradient: str) -> Tally:
    """The published net, written out once more over lists of which channels are live."""
    tally, growth = Tally(batch, reference), options["growth"]
    num_scales, factors = options["num_scales"], FACTORS[: options["num_scales"]]
    scales, sizes = [IMAGE], [size << 1]
    for scale in range(num_scales):
        sizes.append(size >> scale)
        scales.append(tally.conv(scales[-1], options["channels"] * factors[scale], 3, sizes[-1]))
    scales, sizes = scales[1:], sizes[1:]

    def path(source: int, out: int, stride: int = 1) -> list[bool]:
        offset = num_scales - len(scales)
        channels = scales[source]
        if options.get("bottleneck", True):
            width = min(len(channels), factors[offset + source] * out)
            channels = tally.conv(channels, width, 1, sizes[source])
        return tally.conv(channels, out, 3, sizes[source] // stride)

    per_block = [options["base"]] + [options["step"]] * (options["num_exits"] - 1)
    total, made = sum(per_block), 0
    interval = math.ceil(total / num_scales)
    for index, num_layers in enumerate(per_block):
        for _ in range(num_layers):
            made += 1
            kept = num_scales - (made - 1) // interval
            dropped, extended = len(scales) - kept, []
            for scale in range(dropped, len(scales)):
                added = growth * factors[num_scales - len(scales) + scale]
                if scale == 0:
                    extended.append(scales[0] + path(0, added))
                else:
                    extended.append(scales[scale] + path(scale - 1, added // 2, 2) + path(scale, added // 2))
            scales, sizes = extended, sizes[dropped:]
            if dropped:
                scales = [tally.conv(scale, len(scale) // 2, 1, sizes[i]) for i, scale in enumerate(scales)]
        *finer, feature = scales
        reads = feature
        if index < options["num_exits"] - 1:
            k = round(beta * len(feature))
            if exit_gradient == "own" or not reference:
                reads = [live and channel >= k for channel, live in enumerate(feature)]
            scales = [*finer, [live and channel < k for channel, live in enumerate(feature)]]
        width, reduced = options["head_width"], sizes[-1]
        for channels in (reads, [True] * width):
            reduced //= 2
            tally.conv(channels, width, 3, reduced)
        tally.conv([True] * width, 10, 1, 1)
    return tally


@pytest.mark.parametrize(("beta", "bottleneck"), [(0.1, True), (0.5, True), (0.9, True), (0.7, False)])
@pytest.mark.parametrize("reference", [True, False], ids=["reference", "no-reference"])
@pytest.mark.parametrize("exit_gradient", ["own", "whole"])
def test_no_layer_computes_a_gradient_for_frozen_channels(beta, reference, exit_gradient, bottleneck):
    """Counted while a step runs. Two blocks lie between two drops of a scale, so that frozen channels pile up."""
    options = {"num_exits": 6, "base": 2, "step": 1, "channels": 8, "growth": 6, "num_scales": 2, "head_width": 9}
    options["bottleneck"] = bottleneck
    routing = {"beta": beta, "reference": reference, "exit_gradient": exit_gradient}
    expected = count_by_hand(options, 16, 3, **routing)
    for variant in ("dfs", "split"):
        model = create_model("msdnet_cifar", variant=variant, **routing, **options)
        count = count_flops(model, torch.randn(3, 3, 16, 16))
        assert (count.forward, count.backward) == (expected.forward, expected.backward)
    whole = count_by_hand(options, 16, 3, beta=1.0, reference=True, exit_gradient="whole")
    stock = count_flops(create_model("msdnet_cifar", variant="detach", **routing, **options), torch.randn(3, 3, 16, 16))
    assert stock.forward == whole.forward >= expected.forward
    assert stock.backward > expected.backward


def test_dropout_is_an_option():
    images = torch.randn(2, 3, 16, 16)
    tiny = {"num_exits": 2, "base": 1, "step": 1, "num_scales": 1, "channels": 4, "growth": 4, "head_width": 8}
    model = create_model("msdnet_cifar", dropout=0.0, **tiny).eval()
    dropping = create_model("msdnet_cifar", **tiny).eval()
    dropping.load_state_dict(model.state_dict())
    for index, (left, right) in enumerate(zip(model(images), dropping(images), strict=True)):
        assert_close(f"logits {index}", left, right.detach())
    dropping.exits.train()
    assert any(not torch.equal(left, right) for left, right in zip(model(images), dropping(images), strict=True))


@pytest.mark.parametrize("variant", ["dense", "dfs"])
def test_evaluation_uses_running_statistics(variant):
    tiny = {"num_exits": 3, "base": 1, "step": 1, "num_scales": 2, "channels": 4, "growth": 4}
    model = create_model("msdnet_imagenet", variant=variant, dtype=torch.float64, **tiny)
    images = torch.randn(5, 3, 32, 40, dtype=torch.float64)
    model(images)
    assert all(norm.num_batches_tracked == 1 for norm in model.modules() if isinstance(norm, nn.BatchNorm2d))
    model.eval()
    together = model(images)
    alone = [model(image[None]) for image in images]
    for index, logits in enumerate(together):
        assert_close(f"logits {index}", torch.cat([one[index] for one in alone]), logits)


@pytest.mark.parametrize("num_scales", [0, 5])
def test_number_of_scales(num_scales):
    with pytest.raises(ValueError, match=f"num_scales: expected 1 to 4, got {num_scales}"):
        create_model("msdnet_imagenet", num_scales=num_scales)
