"""FLOPs are counted from what runs: the formulas below are the arithmetic of a convolution."""

import pytest
import torch
from torch import nn

from dfs_engine.evaluation.flops import count_flops
from dfs_engine.ops import partitioned_conv2d, partitioned_linear
from dfs_engine.runtime import backend as backends


class TwoLayers(nn.Module):
    """A stock convolution, a partitioned one, and a partitioned linear."""

    def __init__(self, backend: str, stop: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.conv = nn.Conv2d(16, 8, 3, padding=1, bias=False)
        self.head = nn.Linear(8, 5)
        self.backend, self.stop = backend, stop

    def forward(self, x):
        options = {"start": 0, "backend": self.backend}
        x = partitioned_conv2d(self.stem(x), self.conv.weight, padding=1, stop=self.stop, **options)
        return [partitioned_linear(x.mean((2, 3)), self.head.weight, self.head.bias, stop=self.stop // 2, **options)]


@pytest.mark.parametrize("backend", ["aten", "cpp"])
@pytest.mark.parametrize("stop", [4, 16])
def test_counts_are_the_arithmetic_of_each_layer(backend, stop):
    reason = backends.unavailable_reason(backend)
    if reason is not None:
        pytest.skip(reason)
    batch, size = 2, 10
    pixels = 2 * 9 * batch * size * size
    stem, conv, head = pixels * 3 * 16, pixels * 16 * 8, 2 * batch * 8 * 5
    count = count_flops(TwoLayers(backend, stop), torch.randn(batch, 3, size, size))
    assert count.forward == stem + conv + head
    # Weight gradients in full, input gradients of the slice; nobody asks for the images' gradient.
    conv_input, head_input = pixels * stop * 8, 2 * batch * (stop // 2) * 5
    assert count.backward == stem + conv + head + conv_input + head_input
    assert count.total == count.forward + count.backward


def test_gradients_are_left_as_they_were():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten())
    count = count_flops(model, torch.randn(2, 3, 5, 5))
    assert all(parameter.grad is None for parameter in model.parameters())
    assert count.forward == count.backward == 2 * 9 * 2 * 3 * 3 * 3 * 4
    assert torch.is_grad_enabled()


class Attention(nn.Module):
    def __init__(self, **dd) -> None:
        super().__init__()
        self.qkv = nn.Linear(8, 24, bias=False, **dd)

    def forward(self, x):
        query, key, value = self.qkv(x).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        return nn.functional.scaled_dot_product_attention(query, key, value)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_attention_counts_as_its_products_on_every_device(device):
    batch, tokens = 3, 5
    count = count_flops(Attention(device=device), torch.randn(batch, tokens, 8, device=device))
    linear, products = 2 * batch * tokens * 8 * 24, 2 * (2 * batch * 2 * tokens * tokens * 4)
    assert count.forward == linear + products
    assert count.backward == linear + 2 * products  # nobody asks for the input's gradient


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("groups", [1, 2, 6])
def test_a_grouped_convolution_is_not_a_dense_one(groups, transposed):
    kind = nn.ConvTranspose2d if transposed else nn.Conv2d
    first = nn.Conv2d(3, 6, 1, bias=False)
    layer = kind(6, 12, 3, groups=groups, bias=False)
    count = count_flops(nn.Sequential(first, layer), torch.randn(2, 3, 8, 7))
    pixels = 8 * 7 if transposed else 6 * 5  # a transposed one multiplies at each pixel that it reads
    once, first_once = 2 * 2 * pixels * (6 // groups) * 12 * 9, 2 * 2 * 8 * 7 * 3 * 6
    assert count.forward == once + first_once
    assert count.backward == 2 * once + first_once  # the image needs no gradient
