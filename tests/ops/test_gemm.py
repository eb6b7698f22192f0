"""The matrix products of linear layers against float64, whether or not calibration would pick them here."""

import pytest
import torch

from dfs_engine.runtime.backend import unavailable_reason
from dfs_engine.validate.tolerances import assert_close

pytestmark = pytest.mark.skipif(unavailable_reason("cpp") is not None, reason=str(unavailable_reason("cpp")))

# rows, in_features, out_features: around the blocks of 6 or 12 rows, 16 or 32 columns, 320 deep
SHAPES = [(32, 64, 512), (97, 321, 65), (1577, 192, 577), (333, 1537, 77), (217, 641, 300), (64, 320, 64)]


@pytest.fixture
def own_gemm():
    from dfs_engine import _C

    before = _C.set_own_gemm(True), _C.set_own_grad_weight(True)
    yield
    _C.set_own_gemm(before[0])
    _C.set_own_grad_weight(before[1])


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


@pytest.fixture
def onednn_linear():
    from dfs_engine import _C

    before, threads = _C.set_onednn_linear(True), torch.get_num_threads()
    torch.set_num_threads(2)  # on one it does not run
    yield
    torch.set_num_threads(threads)
    _C.set_onednn_linear(before)


@pytest.mark.parametrize(
    "shape", [(1024, 193, 200), (1577, 200, 193), (2051, 384, 192)], ids=lambda s: "x".join(map(str, s))
)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "nobias"])
def test_onednn_matches_float64(onednn_linear, shape, bias):
    rows, inputs, outputs = shape
    ops = torch.ops.dfs_engine
    x = torch.rand(3, rows, 2 * inputs)[..., ::2]
    weight = torch.rand(outputs, inputs + 3)[:, 3:]
    shift = torch.rand(2 * outputs)[::2] if bias else None
    double = None if shift is None else shift.double()
    with torch.profiler.profile() as profile:
        output = ops.linear(x, weight, shift)
        grad = torch.rand(outputs, 3, rows).permute(1, 2, 0)
        grad_input = ops.linear_grad_input(grad, weight, 1, inputs)
    names = {event.name for event in profile.events()}
    assert {"aten::mkldnn_convolution", "aten::convolution_backward"} <= names, "oneDNN did not run"
    assert output.is_contiguous()
    assert grad_input.is_contiguous()
    assert_close("output", output, torch.nn.functional.linear(x.double(), weight.double(), double))
    assert_close("grad_input", grad_input, grad.double() @ weight.double()[:, 1:])


def test_the_result_does_not_depend_on_the_threads(own_gemm):
    x, weight = torch.randn(517, 700), torch.randn(211, 700)
    results = []
    for threads in (1, 2, 1):
        torch.set_num_threads(threads)
        results.append(torch.ops.dfs_engine.linear(x, weight, None))
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


# images, in, out, (height, width), kernel, stride, padding, dilation; (60, 33) and 5x5 pass the size packed at a time
CONVOLUTIONS = [
    (3, 17, 65, (7, 5), (1, 2), (1, 1), (0, 0), (1, 1)),
    (2, 33, 16, (9, 8), (3, 3), (2, 2), (1, 1), (1, 1)),
    (5, 16, 100, (8, 9), (5, 3), (2, 1), (2, 0), (1, 2)),
    (1, 65, 17, (6, 6), (2, 1), (2, 2), (0, 0), (1, 1)),
    (9, 120, 19, (60, 33), (5, 5), (3, 3), (2, 2), (1, 1)),
    (2, 16, 16, (3, 3), (7, 7), (1, 1), (3, 3), (1, 1)),
]


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("channels_last", [True, False], ids=["channels_last", "nchw"])
@pytest.mark.parametrize("convolution", CONVOLUTIONS, ids=str)
def test_weight_gradient_of_a_convolution(own_gemm, convolution, channels_last):
    images, inputs, outputs, size, kernel, *geometry = convolution
    layout = torch.channels_last if channels_last else torch.contiguous_format
    x = torch.randn(images, inputs + 1, *size).contiguous(memory_format=layout)[:, 1:]
    weight = torch.zeros(outputs, inputs, *kernel, dtype=torch.float64, requires_grad=True)
    expected = torch.nn.functional.conv2d(x.double(), weight, None, *geometry)
    grad = torch.randn(expected.shape)
    (reference,) = torch.autograd.grad(expected, weight, grad.double())
    results = []
    for threads in (1, 2, 2):
        torch.set_num_threads(threads)
        arguments = (grad.contiguous(memory_format=layout), x, weight.shape, *geometry, 1, True)
        results.append(torch.ops.dfs_engine.conv2d_grad_weight(*arguments))
    assert_close("grad_weight", results[0][0], reference)
    assert_close("grad_bias", results[0][1], grad.double().sum((0, 2, 3)))
    assert results[0][0].is_contiguous()
    for grad_weight, grad_bias in results[1:]:
        assert torch.equal(grad_weight, results[0][0])
        assert torch.equal(grad_bias, results[0][1])
