"""This project's matrix product against float64, whether or not calibration would pick it here."""

import pytest
import torch

from dfs_engine.backend import unavailable_reason
from dfs_engine.compare import assert_close

pytestmark = pytest.mark.skipif(unavailable_reason("cpp") is not None, reason=str(unavailable_reason("cpp")))

# rows, in_features, out_features: around the blocks of 6 or 12 rows, 16 or 32 columns, 320 deep
SHAPES = [(32, 64, 512), (97, 321, 65), (1577, 192, 577), (333, 1537, 77), (217, 641, 300), (64, 320, 64)]


@pytest.fixture
def own_gemm():
    from dfs_engine import _C

    before = _C.set_own_gemm(True)
    yield
    _C.set_own_gemm(before)


@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "nobias"])
def test_matches_float64(own_gemm, shape, bias):
    rows, inputs, outputs = shape
    ops = torch.ops.dfs_engine
    x = torch.rand(rows, inputs)
    weight = torch.rand(outputs, 2 * inputs)[:, ::2]
    shift = torch.rand(2 * outputs)[::2] if bias else None
    grad = torch.rand(outputs, rows).t()
    start, stop = inputs // 3, inputs - 1
    double = None if shift is None else shift.double()
    assert_close(
        "output", ops.linear(x, weight, shift), torch.nn.functional.linear(x.double(), weight.double(), double)
    )
    expected = grad.double() @ weight.double()[:, start:stop]
    assert_close("grad_input", ops.linear_grad_input(grad, weight, start, stop), expected)
    grad_weight, grad_bias = ops.linear_grad_weight(grad, x, bias)
    assert_close("grad_weight", grad_weight, grad.double().t() @ x.double())
    if bias:
        assert_close("grad_bias", grad_bias, grad.double().sum(0))


def test_the_result_does_not_depend_on_the_threads(own_gemm):
    x, weight = torch.randn(517, 700), torch.randn(211, 700)
    results = []
    for threads in (1, 2, 1):
        torch.set_num_threads(threads)
        results.append(torch.ops.dfs_engine.linear(x, weight, None))
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])
