"""A gate on a split feature, in every variant, against the definition in stock PyTorch."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from dfs_engine.nn import Fork, multiply
from dfs_engine.validate.tolerances import assert_close

pytestmark = pytest.mark.usefixtures("poison")

CHANNELS = 7
REFERENCE = pytest.mark.parametrize("reference", [True, False], ids=["reference", "no-reference"])


def masked(feature, start, stop, reference, axis):
    """A tensor with gradient in [start, stop), everything else detached or zero."""
    mask = torch.zeros_like(feature)
    mask.narrow(axis, start, stop - start).fill_(1)
    return feature * mask + (feature * (1 - mask)).detach() * reference


def run(feature, gate, product, create_graph=False):
    """The product and both gradients of one incoming gradient."""
    feature, gate = feature.clone().requires_grad_(), gate.clone().requires_grad_()
    output = product(feature, gate)
    grad = torch.linspace(-1, 2, output.numel(), dtype=output.dtype).reshape(output.shape).sin()
    inputs = [feature, gate]
    grads = torch.autograd.grad(output, inputs, grad, materialize_grads=True, create_graph=create_graph)
    if create_graph:
        energy = grads[0].square().sum() + grads[1].square().sum()
        grads += torch.autograd.grad(energy, inputs, materialize_grads=True)
    return output, *grads


@pytest.mark.parametrize("beta", [0, 0.3, 1])
@REFERENCE
@pytest.mark.parametrize("exit_gradient", ["own", "whole"])
@pytest.mark.parametrize("variant", ["detach", "split", "dfs"])
@pytest.mark.parametrize(
    ("axis", "shape"), [(1, (3, CHANNELS, 5, 4)), (-1, (2, 3, CHANNELS)), (1, (0, CHANNELS, 2, 2))], ids=str
)
@pytest.mark.parametrize("create_graph", [False, True], ids=["first", "second"])
def test_both_readers_against_the_definition(beta, reference, exit_gradient, variant, axis, shape, create_graph):
    feature, gate = torch.randn(2, *shape, dtype=torch.float64)
    fork = Fork(beta, variant, reference=reference, exit_gradient=exit_gradient, dim=axis)
    k = round(beta * CHANNELS)
    exit_start = 0 if exit_gradient == "whole" and reference and beta < 1 else k
    for reader, (start, stop) in enumerate(((0, k), (exit_start, CHANNELS))):
        actual = run(feature, gate, lambda f, g, reader=reader: multiply(fork(f)[reader], g), create_graph)
        expected = run(feature, gate, lambda f, g, s=start, e=stop: masked(f, s, e, reference, axis) * g, create_graph)
        for index, pair in enumerate(zip(actual, expected, strict=True)):
            assert_close(f"result {index}", *pair)
        outside = [actual[1].narrow(axis, 0, start), actual[1].narrow(axis, stop, CHANNELS - stop)]
        assert not any(part.any() for part in outside)
        if not reference:
            assert torch.equal(actual[2] == 0, masked(torch.ones_like(gate), start, stop, False, axis) == 0)


@REFERENCE
@pytest.mark.parametrize("wide", ["feature", "gate"])
def test_two_dtypes(reference, wide):
    """As under autocast, which interpolates in float32."""
    feature, gate = torch.randn(2, 2, CHANNELS, 3, 3)
    if wide == "feature":
        gate = gate.bfloat16()
    else:
        feature = feature.bfloat16()
    results = [
        run(feature, gate, lambda f, g, fork=fork: multiply(fork(f)[1], g))
        for fork in (Fork(0.5, variant, reference=reference) for variant in ("detach", "dfs"))
    ]
    for left, right in zip(*results, strict=True):
        assert left.dtype == right.dtype
        assert torch.equal(left, right)


@REFERENCE
@pytest.mark.parametrize("how", ["compiled", "checkpointed"])
def test_inside_compile_and_checkpoint(reference, how):
    feature, gate = torch.randn(2, 2, CHANNELS, 3, 4, dtype=torch.float64)
    fork = Fork(0.5, "dfs", reference=reference)

    def product(f, g):
        return multiply(fork(f)[1], g)

    if how == "compiled":
        wrapped = torch.compile(product, fullgraph=True, backend="aot_eager")
    else:
        wrapped = lambda f, g: checkpoint(product, f, g, use_reentrant=False)  # noqa: E731
    for left, right in zip(run(feature, gate, wrapped), run(feature, gate, product), strict=True):
        assert torch.equal(left, right)


@pytest.mark.parametrize("wanted", ["feature", "gate"])
def test_only_what_is_asked_for(wanted):
    feature, gate = (torch.randn(2, CHANNELS, 3, 3, requires_grad=name == wanted) for name in ("feature", "gate"))
    multiply(Fork(0.5, "dfs")(feature)[1], gate).sum().backward()
    assert (feature.grad is not None, gate.grad is not None) == (wanted == "feature", wanted == "gate")
