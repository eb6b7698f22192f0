"""A LayerNorm and a linear on what each variant's readers get: the same values and gradients."""

import copy

import pytest
import torch
from torch import nn

from dfs_engine.nn import VARIANTS, Fork, PartitionedLayerNorm, apply_norm_linear, convert_layers
from dfs_engine.runtime import backend as backends
from dfs_engine.validate.tolerances import assert_close

pytestmark = pytest.mark.usefixtures("poison")


def layers(affine: bool = True, dtype: torch.dtype = torch.float64) -> tuple[nn.LayerNorm, nn.Linear]:
    norm = nn.LayerNorm(10, eps=1e-3, elementwise_affine=affine, dtype=dtype)
    for parameter in norm.parameters():
        nn.init.normal_(parameter)
    return norm, nn.Linear(10, 7, bias=affine, dtype=dtype)


def converted(variant: str, backend: str, *stock: nn.Module) -> list[nn.Module]:
    """As a `ViTBlock`'s are."""
    norm, linear = copy.deepcopy(stock)
    convert_layers(linear, variant, backend)
    if variant == "dfs":
        norm.__class__ = PartitionedLayerNorm
    return [norm, linear]


def differentiate(feature: torch.Tensor, fork: Fork, reader: int, norm: nn.LayerNorm, linear: nn.Linear) -> list:
    feature = feature.clone().requires_grad_()
    output = apply_norm_linear(norm, linear, fork(feature)[reader])
    grad_output = torch.linspace(-1, 2, output.numel(), dtype=output.dtype).reshape(output.shape).sin()
    leaves = [feature, *norm.parameters(), *linear.parameters()]
    return [output, *torch.autograd.grad(output, leaves, grad_output, materialize_grads=True)]


@pytest.mark.parametrize("variant", sorted(set(VARIANTS) - {"dense", "detach"}))
@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("reference", [True, False], ids=["reference", "no-reference"])
@pytest.mark.parametrize("exit_gradient", ["own", "whole"])
@pytest.mark.parametrize("affine", [True, False], ids=["affine", "bare"])
def test_every_variant_computes_what_detach_computes(
    variant, beta, reference, exit_gradient, affine, backend, exact_dtype
):
    feature, (norm, linear) = torch.randn(2, 3, 10, dtype=exact_dtype), layers(affine, exact_dtype)
    options = {"reference": reference, "exit_gradient": exit_gradient, "dim": -1}
    for reader in (0, 1):
        expected = differentiate(feature, Fork(beta, "detach", **options), reader, norm, linear)
        fork = Fork(beta, variant, **options, backend=backend)
        actual = differentiate(feature, fork, reader, *converted(variant, backend, norm, linear))
        for left, right in zip(actual, expected, strict=True):
            assert_close("result", left, right)
        if variant == "dfs":
            assert backends.last_used("partitioned_norm_linear").partition(":")[0] == backend


def test_a_feature_that_is_not_split(backend, exact_dtype):
    feature, stock = torch.randn(4, 10, dtype=exact_dtype, requires_grad=True), layers(dtype=exact_dtype)
    results, grads = [], []
    for norm, linear in (stock, converted("dfs", backend, *stock)):
        results.append(apply_norm_linear(norm, linear, (feature,)))
        grads.append(torch.autograd.grad(results[-1].square().sum(), [feature, *norm.parameters()]))
    for left, right in zip((results[0], *grads[0]), (results[1], *grads[1]), strict=True):
        assert_close("result", left, right)


def test_rows_of_the_weight(backend, exact_dtype):
    feature, stock = torch.randn(2, 3, 10, dtype=exact_dtype, requires_grad=True), layers(dtype=exact_dtype)
    norm, linear = converted("dfs", backend, *stock)
    reading = Fork(0.3, "dfs", dim=-1)(feature)[0]
    parameters = [feature, *norm.parameters(), *linear.parameters()]
    some, every = apply_norm_linear(norm, linear, reading, slice(2, 5)), apply_norm_linear(norm, linear, reading)
    grads = [
        torch.autograd.grad(output.square().sum(), parameters, retain_graph=True) for output in (some, every[..., 2:5])
    ]
    for left, right in zip((some, *grads[0]), (every[..., 2:5], *grads[1]), strict=True):
        assert_close("result", left, right)
