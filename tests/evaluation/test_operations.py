"""What exits cost: the published figures of MSDNet, and hand-counted small nets."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dfs_engine import create_model
from dfs_engine.evaluation.operations import count_operations
from dfs_engine.models.multi_exit import Block, MultiExitModel
from dfs_engine.nn import Fork


# The tables of MSDNet, Meta-GF and DFS, in millions.
@pytest.mark.parametrize(
    ("name", "num_classes", "operations", "parameters"),
    [
        (
            "msdnet_cifar",
            100,
            "56.43 101.00 155.31 198.10 249.53 298.05 340.64",
            "0.90 1.84 2.80 3.76 4.92 6.10 7.36",
        ),
        ("msdnet_imagenet", 1000, "339.90 685.46 1008.16 1254.47 1360.53", "4.24 8.77 13.07 16.75 23.96"),
    ],
)
def test_msdnet_costs_what_was_published(name, num_classes, operations, parameters):
    costs = count_operations(create_model(name, num_classes=num_classes, variant="dense", device="meta"))
    assert [f"{cost.operations / 1e6:.2f}" for cost in costs] == operations.split()
    assert [f"{cost.parameters / 1e6:.2f}" for cost in costs] == parameters.split()


def test_vgg_by_hand():
    """vgg7_64: convolutions, ReLUs, 2x2 pools at the ends of stages, global pools, linears without a bias."""
    width, classes = 5, 7
    costs = count_operations(create_model("vgg7_64", width=width, num_classes=classes, variant="dense"))
    channels, size, blocks, heads = 3, 32, 0, 0
    for index, (out, is_last) in enumerate((width * m, last) for m in (1, 2, 4) for last in (False, True)):
        blocks += 9 * channels * out * size**2 + out * size**2
        if is_last:
            size //= 2
            blocks += 4 * out * size**2
        head = out * size**2 + out * classes
        heads += head
        assert costs[index].operations == blocks + heads
        assert costs[index].operations_alone == blocks + head
        channels = out


class ConvBlock(Block):
    """A strided, grouped convolution and whatever `behind` does."""

    def __init__(self, in_channels: int, behind=F.relu, **dd) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, 4, 3, stride=2, groups=2, **dd)
        self.behind = behind

    def make(self, input):
        return self.behind(self.conv(input))


def two_exits(*behind, device: str) -> MultiExitModel:
    dd = {"device": device}
    blocks = [ConvBlock(channels, function, **dd) for channels, function in zip((2, 4), behind, strict=True)]
    exits = [nn.Sequential(nn.AvgPool2d(2), nn.Flatten(), nn.LazyLinear(3, **dd)) for _ in blocks]
    model = MultiExitModel(blocks, exits, Fork(variant="dense"), num_classes=3, input_shape=(2, 12, 11))
    model(model.example_input())  # settles the lazy linears
    return model


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_two_exits_by_hand(device):
    model = two_exits(lambda f: F.relu(f).mean((2, 3), keepdim=True).expand_as(f), nn.BatchNorm2d(4), device="cpu")
    model.to(device).train()
    first, second = count_operations(model)
    # 12 x 11 -> 5 x 5 -> 2 x 2; a pool, then a linear with its bias.
    block1, head1 = 9 * 2 * 4 * 25 // 2 + 4 * 25 + 4 * 25, 4 * 4 * 4 + 16 * 3 + 3
    block2, head2 = 9 * 4 * 4 * 4 // 2, 4 * 4 + 4 * 3 + 3
    assert first.operations == first.operations_alone == block1 + head1
    assert second.operations == block1 + head1 + block2 + head2
    assert second.operations_alone == block1 + block2 + head2
    linear1, linear2 = 16 * 3 + 3, 4 * 3 + 3
    conv1, conv2 = 9 * 4 + 4, 9 * 2 * 4 + 4 + 8  # the second with its normalisation
    assert (first.parameters, first.parameters_alone) == (conv1 + linear1, conv1 + linear1)
    assert second.parameters == conv1 + linear1 + conv2 + linear2
    assert second.parameters_alone == conv1 + conv2 + linear2
    assert model.training
    assert not any(exit._forward_hooks or exit._forward_pre_hooks for exit in model.exits)


def test_an_operator_that_nobody_has_counted_raises():
    model = two_exits(lambda f: f.cumsum(1), F.relu, device="cpu")
    with pytest.raises(NotImplementedError, match=r"expected operators that it knows, got aten\.cumsum"):
        count_operations(model)
    assert not any(exit._forward_hooks or exit._forward_pre_hooks for exit in model.exits)


def test_attention_is_counted():
    class Attend(nn.Module):
        def forward(self, f):
            tokens = f.flatten(2).transpose(1, 2)
            return F.scaled_dot_product_attention(tokens, tokens, tokens).transpose(1, 2).view_as(f)

    plain = count_operations(two_exits(nn.Identity(), nn.Identity(), device="cpu"))
    attending = count_operations(two_exits(Attend(), nn.Identity(), device="cpu"))
    assert attending[0].operations - plain[0].operations == 2 * 25 * 25 * 4
    assert torch.is_grad_enabled()
