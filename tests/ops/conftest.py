"""Runs an op on leaves made of given tensors, and gives everything that comes out of it by name."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from dfs_engine import reference
from dfs_engine.validate.tolerances import assert_close

Results = dict[str, Tensor]


def evaluate(op: Callable, tensors: dict[str, Tensor | None], grad_output: Tensor | None = None, **options) -> Results:
    """Forward and backward.

    Args:
        op: takes `tensors` by name (input, weight, bias; and `full`, which carries no gradient).
        grad_output: None: random.

    Returns:
        output, grad_output, and grad_<name> of every tensor.
    """
    leaves = {name: None if value is None else value.detach() for name, value in tensors.items()}
    wanted = {name: leaf.requires_grad_() for name, leaf in leaves.items() if leaf is not None and name != "full"}
    output = op(**leaves, **options)
    if grad_output is None:
        grad_output = torch.randn(output.shape, dtype=output.dtype)
    grads = torch.autograd.grad(output, list(wanted.values()), grad_output, allow_unused=True)
    named = {f"grad_{name}": grad for name, grad in zip(wanted, grads, strict=True)}
    return {"output": output.detach(), "grad_output": grad_output, **named}


def expect(op: Callable, tensors: dict[str, Tensor | None], grad_output: Tensor, **options) -> Results:
    """The same in float64 by the oracle, from the same (rounded) numbers."""
    wide = {name: None if value is None else value.double() for name, value in tensors.items()}
    oracle = getattr(reference, op.__name__)
    options.pop("backend", None)
    return evaluate(oracle, wide, grad_output.double(), **options)


def check(op: Callable, tensors: dict[str, Tensor | None], grad_output: Tensor | None = None, **options) -> Results:
    """Compares op and oracle on everything; returns the op's results."""
    actual = evaluate(op, tensors, grad_output, **options)
    expected = expect(op, tensors, actual["grad_output"], **options)
    assert set(actual) == set(expected)
    dtype = tensors["weight"].dtype
    for name, value in actual.items():
        if expected[name] is None:  # an empty or constant part has no gradient in the oracle
            assert value is None or not value.any(), name
            continue
        assert value.dtype == dtype, name
        assert_close(name, value, expected[name])
    return actual


@pytest.fixture(name="evaluate")
def _evaluate():
    return evaluate


@pytest.fixture(name="check")
def _check():
    return check
