"""Dense concatenation in every variant against `cat` + `detach`, and the order in which its channels lie."""

import copy
import random

import pytest
import torch
from torch import nn

from dfs_engine.nn import (
    Fork,
    add,
    apply_layer,
    concat,
    convert_layers,
    fork_concat,
    global_avg_pool,
    multiply,
    whole,
)
from dfs_engine.nn.channel_order import ChannelOrder
from dfs_engine.partition import ChannelSlice
from dfs_engine.validate.tolerances import assert_close

pytestmark = pytest.mark.usefixtures("poison")

WIDTHS = (11, 4, 1, 3, 6)


def random_order(num_channels: int) -> ChannelOrder:
    cuts = sorted(random.sample(range(1, num_channels), random.randint(0, 4)))
    ranges = [ChannelSlice(*pair) for pair in zip([0, *cuts], [*cuts, num_channels], strict=True)]
    return ChannelOrder(tuple(random.sample(ranges, len(ranges))))


def channels(order: ChannelOrder) -> list[int]:
    return [channel for start, stop in order.ranges for channel in range(start, stop)]


def test_orders_against_lists_of_channels():
    for _ in range(100):
        num_channels = random.randint(5, 12)
        order = random_order(num_channels)
        held = channels(order)
        position = random.randint(0, num_channels)
        head, tail = order.cut(position)
        assert (channels(head), channels(tail)) == (held[:position], held[position:])
        assert all(part.width > 0 for part in (*head.ranges, *tail.ranges))
        new = ChannelOrder.ascending(num_channels, num_channels + 3)
        assert channels(head.followed_by(new, tail)) == held[:position] + channels(new) + held[position:]
        assert channels(head.followed_by(tail)) == held
        assert head.num_channels == position
        assert head.num_below(4) == sum(channel < 4 for channel in held[:position])
        weight, stored = torch.randn(2, num_channels, 3), torch.randn(2, num_channels, 3)
        assert torch.equal(order.columns_of(weight), weight[:, held])
        assert torch.equal(order.restore(stored, 1)[:, held], stored)


def test_neighbours_become_one():
    head, tail = ChannelOrder.ascending(0, 9).cut(4)
    assert head.followed_by(tail) == ChannelOrder.ascending(0, 9)
    assert head.followed_by(ChannelOrder.ascending(7, 7), tail) == ChannelOrder.ascending(0, 9)


class Chain(nn.Module):
    """Two forks with concatenations behind each, and a reader of everything on the way."""

    def __init__(self) -> None:
        super().__init__()
        sums = [sum(WIDTHS[:count]) for count in (1, 2, 4, 4, 5)]
        dd = {"dtype": torch.float64}
        kinds = [{"kernel_size": 1}, {"kernel_size": 3, "padding": 1}, {"kernel_size": 3, "stride": 2}]
        self.convs = nn.ModuleList(nn.Conv2d(width, 5, **kinds[index % 3], **dd) for index, width in enumerate(sums))
        self.linear = nn.Linear(sums[-1], 4, **dd)
        self.depthwise = nn.Conv2d(sums[-1], sums[-1], 3, groups=sums[-1], **dd)

    def forward(self, fork: Fork, features: list[torch.Tensor]) -> list[torch.Tensor]:
        x, *new = [(feature,) for feature in features]
        deeper, _ = fork_concat(x, fork)
        readings = [deeper, concat(deeper, new[0])]
        readings.append(concat(readings[-1], new[1], new[2]))
        deeper, exit = fork_concat(readings[-1], fork)
        readings += [exit, concat(deeper, new[3])]
        outputs = [apply_layer(conv, reading) for conv, reading in zip(self.convs, readings, strict=True)]
        last = readings[-1]
        outputs += [apply_layer(self.linear, global_avg_pool(last)), apply_layer(self.depthwise, last)]
        seen = whole(last)
        return [*outputs, add(last, seen.detach()), multiply(last, seen.detach()), seen]


@pytest.mark.parametrize("beta", [0, 0.1, 0.5, 0.9, 1])
@pytest.mark.parametrize("reference", [True, False], ids=["reference", "no-reference"])
@pytest.mark.parametrize("exit_gradient", ["own", "whole"])
def test_against_cat_and_detach(beta, reference, exit_gradient):
    features = [torch.randn(2, width, 5, 4, dtype=torch.float64) for width in WIDTHS]
    stock, grads = Chain(), None

    def run(variant, memory_format=torch.contiguous_format):
        nonlocal grads
        chain = copy.deepcopy(stock)
        convert_layers(chain, variant, "aten")
        fork = Fork(beta, variant, reference=reference, exit_gradient=exit_gradient, backend="aten")
        inputs = [feature.to(memory_format=memory_format, copy=True).requires_grad_() for feature in features]
        outputs = chain(fork, inputs)
        grads = grads or [torch.randn_like(output) for output in outputs]
        wanted = [*inputs, *chain.parameters()]
        gradients = torch.autograd.grad(outputs, wanted, grads, materialize_grads=True)
        # Of `whole` the gradient reaches what is live and nothing else.
        (seen,) = torch.autograd.grad(chain(fork, inputs)[-1].sum(), inputs[0], materialize_grads=True)
        return [*outputs, *gradients, seen]

    expected = run("detach")
    live = round(beta * WIDTHS[0])
    assert expected[-1][:, :live].all()
    assert not expected[-1][:, live:].any()
    for options in (
        {"variant": "split"},
        {"variant": "dfs"},
        {"variant": "dfs", "memory_format": torch.channels_last},
    ):
        for index, (actual, truth) in enumerate(zip(run(**options), expected, strict=True)):
            assert_close(f"{options}, result {index}", actual, truth)


def test_nothing_is_rearranged():
    """Channels stay innermost, in the data and in the gradients, however many are frozen."""
    seen = []
    fork = Fork(0.5, "dfs")
    leaves = [torch.randn(2, width, 5, 4).to(memory_format=torch.channels_last).requires_grad_() for width in WIDTHS]
    x, *new = (((leaf * 1).requires_grad_(),) for leaf in leaves)
    new[0][0].register_hook(seen.append)
    deeper, _ = fork_concat(x, fork)
    first = concat(deeper, new[0], new[1])
    deeper, exit = fork_concat(first, fork)
    second = concat(deeper, new[2])
    for live, full, _ in (first, second):
        assert full.is_contiguous(memory_format=torch.channels_last)
        assert live.data_ptr() == full.data_ptr()
    assert exit[1] is first[1]
    conv = nn.Conv2d(16, 3, 3)
    convert_layers(conv, "dfs")
    apply_layer(conv, exit).sum().backward()
    assert seen[0].stride(1) == 1


def test_compiled():
    chain, fork = Chain(), Fork(0.5, "dfs", backend="aten")
    convert_layers(chain, "dfs", "aten")
    features = [torch.randn(2, width, 5, 4, dtype=torch.float64, requires_grad=True) for width in WIDTHS]
    grads = [
        torch.autograd.grad(sum(output.square().sum() for output in run(fork, features)), features)
        for run in (chain, torch.compile(chain, backend="aot_eager", fullgraph=True))
    ]
    for index, (eager, compiled) in enumerate(zip(*grads, strict=True)):
        assert_close(f"gradient {index}", compiled, eager)
