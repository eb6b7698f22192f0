"""Where no configuration of a kernel fits the GPU, stock operators compute the op, and that is said once."""

import logging

import pytest
import torch
from triton.runtime.errors import OutOfResources

from dfs_engine.kernels import config
from dfs_engine.ops import _triton, linear

TILE = config.Config(16, 16, 16, 4, 1)


@pytest.fixture
def operands(monkeypatch) -> tuple[torch.Tensor, torch.Tensor]:
    """A kernel whose every launch asks for more shared memory than there is."""
    from dfs_engine.kernels import linear as kernels

    class Greedy:
        def __getitem__(self, grid):
            def launch(*arguments, **constants):
                raise OutOfResources(300_000, 232_448, "shared memory")

            return launch

    monkeypatch.setattr(kernels, "_grad_input_kernel", Greedy())
    monkeypatch.setattr(_triton, "_said", set())
    return torch.randn(9, 5), torch.randn(5, 7)


def implementation():
    return _triton._implementation("linear_grad_input")


def test_aten_takes_over_and_says_so_once(operands, caplog):
    grad_output, weight = operands
    for _ in range(2):
        with caplog.at_level(logging.WARNING):
            found = implementation()(grad_output, weight, 2, 6)
        assert torch.equal(found, linear.aten_grad_input(grad_output, weight, 2, 6))
    (record,) = caplog.records
    assert record.getMessage().startswith("backend: using aten, because linear_grad_input: no configuration fits")
    assert "shared memory" in record.getMessage()


def test_a_forced_configuration_does_not_fall_back(operands):
    with config.forced("linear_grad_input", TILE), pytest.raises(config.NoConfigFits, match="shared memory"):
        implementation()(*operands, 2, 6)


def test_another_failure_is_not_hidden(operands, monkeypatch):
    monkeypatch.setattr(config, "launch", lambda *_: 1 // 0)
    with pytest.raises(ZeroDivisionError):
        implementation()(*operands, 2, 6)
