"""The attainable limit is counted as a person would by hand."""

import pytest
import torch
from torch import nn

from dfs_engine import create_model
from dfs_engine.benchmarks.attainable import Product, Speeds, Work, count_work
from dfs_engine.evaluation.flops import count_flops


class ThreeLayers(nn.Module):
    """A strided convolution, one that Winograd's algorithm serves, and a linear layer."""

    def __init__(self):
        super().__init__()
        self.strided = nn.Conv2d(3, 16, 3, stride=2, padding=1, bias=False)
        self.plain = nn.Conv2d(16, 32, 3, padding=1, bias=False)
        self.head = nn.Linear(32, 10, bias=False)

    def forward(self, images):
        hidden = self.plain(self.strided(images).relu())
        return [self.head(hidden.relu().mean((2, 3)))]


def test_three_layers_by_hand():
    with torch.device("meta"):
        work = count_work(ThreeLayers(), torch.empty(2, 3, 9, 9))  # 2 images; 5 x 5 pixels behind the first layer
    image, small, large, pooled, logits = 2 * 3 * 81, 2 * 16 * 25, 2 * 32 * 25, 2 * 32, 2 * 10
    strided, plain, head = 16 * 3 * 9, 32 * 16 * 9, 32 * 10
    strided_flops, plain_flops, head_flops = 2 * 2 * 25 * strided, 2 * 2 * 25 * plain, 2 * 2 * head
    tiles = 2 * 2 * 2  # of 4 x 4 pixels, to cover 5 x 5 of each image
    winograd = 2 * tiles * 36 * 16 * 32
    assert sorted(work.products) == sorted(
        [
            *2 * [Product(strided_flops, None, image + strided + small)],  # nobody wants the image's gradient
            *3 * [Product(plain_flops, winograd, small + plain + large)],
            *3 * [Product(head_flops, None, pooled + head + logits)],
        ]
    )
    # Read forward and for the weight's gradient: what both ReLUs and the mean make. Read for both gradients: those of
    # the second convolution's result and of the logits. The first one's result serves one product.
    assert work.shared == small + pooled + large + logits
    assert work.parameters == strided + plain + head
    assert work.flops == sum(product.flops for product in work.products)


def test_seconds_take_the_faster_algorithm():
    products = [Product(800, 100, 10), Product(800, 300, 10), Product(800, None, 10)]
    work = Work(products, shared=6, parameters=4, optimizer_states=1)
    for dtype, speed, arithmetic in (
        (torch.float32, 100.0, 100 / 100 + 300 / 100 + 800 / 100),
        (torch.bfloat16, 400.0, 100 / 100 + 800 / 400 + 800 / 400),
    ):
        num_bytes = (30 + 6) * dtype.itemsize + 4 * 3 * 4  # parameter, gradient and momentum stay float32
        seconds = work.seconds(dtype, Speeds(products_fp32=100.0, products=speed, copy=8.0))
        assert seconds == pytest.approx(arithmetic + num_bytes / 8)


@pytest.mark.parametrize("name", ["vgg7_64", "msdnet_cifar", "vit_tiny_patch16_224"])
def test_what_is_sliced_away_does_not_count(name):
    if name.startswith("vit"):
        pytest.importorskip("timm")

    def model(variant, beta=0.5):
        return create_model(name, num_classes=10, variant=variant, beta=beta, backend="aten", device="meta").train()

    images = model("dense").example_input(3).to("meta")
    dfs, dense = count_work(model("dfs"), images), count_work(model("dense"), images)
    assert (
        dfs.flops == count_flops(model("dfs"), images).total < dense.flops == count_flops(model("dense"), images).total
    )
    assert dfs.num_bytes(torch.float32) < dense.num_bytes(torch.float32)
    assert count_work(model("dfs", 0.1), images).flops < dfs.flops


def test_a_view_is_no_tensor_of_its_own():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(8, 4, bias=False), nn.Linear(8, 4, bias=False)

        def forward(self, x):
            hidden = x.exp()
            return [self.first(hidden), self.second(hidden.view(-1, 8))]

    with torch.device("meta"):
        work = count_work(Twice(), torch.empty(5, 8))
    assert work.shared == 5 * 8 + 2 * 5 * 4 - 2 * 5 * 4, "hidden, once; the logits' gradients serve one product each"
