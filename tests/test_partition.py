"""beta -> channels, and the routing of the two gradients that reach a feature."""

import pytest
import torch
from torch.utils import _pytree as pytree

from dfs_engine import ChannelSlice, Partition, PartitionedFeature, partition
from dfs_engine.partition import check_beta, dense_memory_format
from dfs_engine.validate.tolerances import assert_close

pytestmark = pytest.mark.usefixtures("poison")


@pytest.mark.parametrize(
    ("num_channels", "beta", "num_shared"),
    [
        (64, 0.5, 32),
        (5, 0.5, 2),  # 2.5: half to even, as the published code
        (7, 0.5, 4),  # 3.5
        (1, 0.5, 0),
        (3, 0.5, 2),
        (10, 0.25, 2),
        (64, 0, 0),
        (64, 1, 64),
        (64, 0.0, 0),
        (64, 1.0, 64),
        (65, 0.9, 58),
        (0, 0.5, 0),
    ],
)
def test_num_shared_rounds_half_to_even(num_channels, beta, num_shared):
    parts = Partition(num_channels, beta)
    assert parts.num_shared == num_shared
    assert parts.shared == ChannelSlice(0, num_shared)
    assert parts.exit == ChannelSlice(num_shared, num_channels)
    assert parts.shared.width + parts.exit.width == num_channels


@pytest.mark.parametrize("beta", ["0.5", None, True, [0.5], 0.5j, torch.tensor(0.5)])
def test_beta_that_is_not_a_number(beta):
    with pytest.raises(TypeError, match=r"^beta: expected a number in \[0, 1\], got"):
        check_beta(beta)


@pytest.mark.parametrize("beta", [-0.1, 1.0001, 2, float("nan"), float("inf"), -float("inf")])
def test_beta_out_of_range(beta):
    with pytest.raises(ValueError, match=r"^beta: expected a number in \[0, 1\], got"):
        Partition(8, beta)


def test_slice_of_is_a_view():
    tensor = torch.randn(2, 6, 3)
    part = ChannelSlice(1, 4).of(tensor, 1)
    assert torch.equal(part, tensor[:, 1:4])
    assert part.data_ptr() == tensor[:, 1:4].data_ptr()


@pytest.mark.parametrize(
    ("beta", "exit_gradient", "reference", "expected"),
    [
        (0.5, "own", True, (4, 8)),
        (0.5, "whole", True, (0, 8)),
        (0.5, "whole", False, (4, 8)),  # it sees f- only
        (1, "whole", True, (8, 8)),  # sg(f): it trains nothing
        (1, "own", True, (8, 8)),
        (0, "whole", True, (0, 8)),
        (0, "own", True, (0, 8)),
    ],
)
def test_exit_live(beta, exit_gradient, reference, expected):
    assert Partition(8, beta).exit_live(exit_gradient, reference) == expected


def test_unknown_exit_gradient():
    with pytest.raises(
        ValueError, match=r"exit_gradient: expected one of own, whole, got 'hole'\. Did you mean 'whole'\?"
    ):
        partition(torch.randn(1, 4), 0.5, exit_gradient="hole")


@pytest.mark.parametrize("beta", [0, 0.1, 0.5, 0.9, 1])
@pytest.mark.parametrize("exit_gradient", ["own", "whole"])
@pytest.mark.parametrize(
    ("shape", "dim"), [((3, 17, 5, 4), 1), ((2, 3, 17), -1), ((4, 1), 1), ((0, 6, 2, 2), 1)], ids=str
)
def test_values_and_joined_gradient(beta, exit_gradient, shape, dim):
    feature = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    parts = partition(feature, beta, dim=dim, exit_gradient=exit_gradient)
    k = round(beta * shape[dim])
    start = 0 if exit_gradient == "whole" and beta < 1 else k
    assert isinstance(parts, PartitionedFeature)
    assert not parts.full.requires_grad
    assert torch.equal(parts.full, feature)
    assert torch.equal(parts.shared, feature.narrow(dim, 0, k))
    assert torch.equal(parts.exit, feature.narrow(dim, start, shape[dim] - start))

    grads = torch.randn_like(parts.shared), torch.randn_like(parts.exit)
    expected = torch.zeros_like(feature)
    expected.narrow(dim, 0, k).add_(grads[0])
    expected.narrow(dim, start, shape[dim] - start).add_(grads[1])
    (grad,) = torch.autograd.grad(parts[1:], feature, grads, retain_graph=True)
    assert torch.equal(grad, expected)
    (again,) = torch.autograd.grad(parts[1:], feature, grads)
    assert torch.equal(grad, again)


@pytest.mark.parametrize("reader", ["shared", "exit"])
def test_the_part_that_nobody_used_gets_zeros(reader):
    feature = torch.randn(2, 6, 3, 3, requires_grad=True)
    (grad,) = torch.autograd.grad(getattr(partition(feature, 0.5), reader).sum(), feature)
    expected = torch.zeros_like(feature)
    expected[:, slice(0, 3) if reader == "shared" else slice(3, 6)] = 1
    assert torch.equal(grad, expected)


@pytest.mark.parametrize("exit_gradient", ["own", "whole"])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_the_joined_gradient_keeps_the_layout(layout, exit_gradient):
    feature = torch.randn(2, 6, 4, 4).to(memory_format=layout).requires_grad_()
    parts = partition(feature, 0.5, exit_gradient=exit_gradient)
    for part in parts:
        assert part.data_ptr() in (feature.data_ptr(), feature[:, 3:].data_ptr())  # nothing was copied
    # Contiguous and stride-0 gradients: neither has the feature's layout.
    grads = torch.randn(parts.shared.shape), torch.randn(2, parts.exit.size(1), 1, 1).expand(parts.exit.shape)
    (grad,) = torch.autograd.grad(parts[1:], feature, grads)
    assert grad.is_contiguous(memory_format=layout)


def test_gradients_are_not_written_to():
    feature = torch.randn(2, 6, 3, 3, requires_grad=True)
    parts = partition(feature, 0.5, exit_gradient="whole")
    grads = torch.randn_like(parts.shared), torch.randn_like(parts.exit)
    before = [grad.clone() for grad in grads]
    torch.autograd.grad(parts[1:], feature, grads)
    assert all(torch.equal(grad, copy) for grad, copy in zip(grads, before, strict=True))
    assert feature._version == 0


def test_double_backward():
    feature = torch.randn(2, 5, 2, 2, dtype=torch.float64, requires_grad=True)
    grads = [torch.randn_like(part, requires_grad=True) for part in partition(feature, 0.5, exit_gradient="whole")[1:]]
    inner = partition(feature, 0.5, exit_gradient="whole")
    loss = sum((part**3 * grad).sum() for part, grad in zip(inner[1:], grads, strict=True))
    (grad,) = torch.autograd.grad(loss, feature, create_graph=True)
    (second,) = torch.autograd.grad(grad.square().sum(), feature)
    weight = grads[1].clone()
    weight[:, :2] += grads[0]
    assert_close("second derivative", second, 36 * weight.square() * feature**3)


def test_no_grad_and_pytree():
    feature = torch.randn(2, 4, requires_grad=True)
    with torch.no_grad():
        parts = partition(feature * 2, 0.5)
    assert not any(part.requires_grad for part in parts)
    leaves, structure = pytree.tree_flatten(parts)
    assert isinstance(pytree.tree_unflatten(leaves, structure), PartitionedFeature)


def test_dense_memory_format():
    image = torch.randn(2, 4, 3, 3)
    assert dense_memory_format(image) is torch.contiguous_format
    assert dense_memory_format(image.to(memory_format=torch.channels_last)) is torch.channels_last
    # Dense in both orders, or in none: contiguous.
    assert dense_memory_format(torch.randn(2, 4, 1, 1)) is torch.contiguous_format
    assert dense_memory_format(image[:, 1:]) is torch.contiguous_format
    assert dense_memory_format(torch.randn(2, 4)) is torch.contiguous_format
