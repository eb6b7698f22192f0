"""apply_norm_relu: a batch norm, a residual and ReLU, in the `dfs` variant one op."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dfs_engine.nn import NormAct2d, apply_norm_relu, convert_layers
from dfs_engine.ops import norm_relu
from dfs_engine.validate.tolerances import assert_close

pytestmark = pytest.mark.usefixtures("poison")

SHAPE = (3, 17, 5, 4)
RESIDUAL = pytest.mark.parametrize("with_residual", [False, True], ids=["plain", "residual"])


def inputs(with_residual, dtype=torch.float64, layout=torch.contiguous_format, shape=SHAPE):
    """z and perhaps a residual, whose sum with the normalised z stays clear of ReLU's zero."""
    z = torch.randn(shape, dtype=torch.float64)
    bn = nn.BatchNorm2d(shape[1], dtype=torch.float64)
    nn.init.uniform_(bn.weight, 0.5, 1.5)
    if not with_residual:
        normalised = F.batch_norm(z, None, None, bn.weight, None, True)
        z = torch.where(normalised.abs() < 1e-2, z + 0.1, z).detach()
    total = torch.randn(shape, dtype=torch.float64)
    total = total + 0.1 * total.sign() - F.batch_norm(z, None, None, bn.weight, bn.bias, True).detach()
    leaves = [z, total] if with_residual else [z]
    return bn.to(dtype), [leaf.to(dtype).to(memory_format=layout).requires_grad_() for leaf in leaves]


@pytest.mark.parametrize("variant", ["detach", "dfs"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@RESIDUAL
@pytest.mark.parametrize("momentum", [0.1, None], ids=["moving", "cumulative"])
def test_equals_the_stock_modules(variant, training, with_residual, momentum):
    bn, leaves = inputs(with_residual)
    bn.momentum = momentum
    stock = copy.deepcopy(bn)
    convert_layers(bn, variant)
    for module in (bn, stock):
        module.train(training)
    for _ in range(2):  # statistics move
        output = apply_norm_relu(bn, *leaves)
        expected = F.relu(sum([stock(leaves[0]), *leaves[1:]]))
    assert_close("output", output, expected)
    grad = torch.randn(SHAPE, dtype=torch.float64)
    found = torch.autograd.grad(output, [*leaves, *bn.parameters()], grad)
    truth = torch.autograd.grad(expected, [*leaves, *stock.parameters()], grad)
    for index, pair in enumerate(zip(found, truth, strict=True)):
        assert_close(f"gradient {index}", *pair)
    for (name, buffer), other in zip(bn.named_buffers(), stock.buffers(), strict=True):
        assert_close(name, buffer.double(), other.double())


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@RESIDUAL
@pytest.mark.parametrize("shape", [SHAPE, (2, 33, 23, 14), (1, 16, 1, 7)], ids=str)
@pytest.mark.parametrize("grad_is_slice", [False, True], ids=["dense", "slice"])
def test_norm_relu_in_float32(layout, with_residual, shape, grad_is_slice, backend):
    bn, leaves = inputs(with_residual, torch.float32, layout, shape)
    wide = [leaf.detach().double().requires_grad_() for leaf in leaves]
    output = norm_relu(leaves[0], bn.weight, bn.bias, None, None, residual=[*leaves, None][1], backend=backend)
    weight, bias = (parameter.detach().double().requires_grad_() for parameter in bn.parameters())
    expected = F.relu(sum([F.batch_norm(wide[0], None, None, weight, bias, True), *wide[1:]]))
    assert_close("output", output, expected)
    grad = torch.randn(shape)
    if grad_is_slice:  # as a concatenation's backward gives it
        wide_grad = F.pad(grad, (0, 0, 0, 0, 3, 5), value=float("nan"))
        grad = wide_grad.contiguous(memory_format=layout)[:, 3:-5]
    found = torch.autograd.grad(output, [*leaves, *bn.parameters()], grad)
    truth = torch.autograd.grad(expected, [*wide, weight, bias], grad.double())
    scale = max(gradient.abs().max().item() for gradient in truth[-2:])
    for index, pair in enumerate(zip(found, truth, strict=True)):
        assert_close(f"gradient {index}", *pair, scale=scale if pair[0].dim() == 1 else 0.0)


def test_converted_to_sync_batch_norm_it_is_followed_by_the_same():
    layers = nn.Sequential(nn.BatchNorm2d(4))
    convert_layers(layers, "dfs")
    assert type(layers[0]) is NormAct2d
    (bn,) = nn.SyncBatchNorm.convert_sync_batchnorm(layers).eval()  # without processes to talk to
    assert type(bn) is nn.SyncBatchNorm
    z, residual = torch.randn(2, 2, 4, 3, 3)
    assert torch.equal(apply_norm_relu(bn, z, residual), F.relu(bn(z) + residual))


def test_called_alone_it_is_the_stock_layer():
    bn = nn.BatchNorm2d(4)
    twin = copy.deepcopy(bn)
    convert_layers(bn, "dfs")
    z = torch.randn(2, 4, 3, 3)
    assert torch.equal(bn(z), twin(z))
    assert torch.equal(bn.running_var, twin.running_var)


def test_errors_are_those_of_norm_act():
    z = torch.randn(2, 4, 3, 3)
    with pytest.raises(ValueError, match=r"norm_act: expected residual of z's shape"):
        norm_relu(z, None, None, None, None, residual=z[:1])
    with pytest.raises(ValueError, match=r"norm_act: expected z \(N, C, H, W\), got \(5,\)"):
        norm_relu(z[0, 0, 0, 0].expand(5), None, None, None, None)
    with pytest.raises(ValueError, match="norm_act: expected running statistics in eval mode"):
        norm_relu(z, None, None, None, None, training=False)
