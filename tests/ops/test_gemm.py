"""The matrix products of linear layers against float64, whether or not calibration would pick them here."""

import pytest
import torch

from dfs_engine.runtime import calibration, choice
from dfs_engine.runtime.backend import unavailable_reason
from dfs_engine.validate.tolerances import assert_close

pytestmark = pytest.mark.skipif(unavailable_reason("cpp") is not None, reason=str(unavailable_reason("cpp")))

# rows, in_features, out_features: around the blocks of 6 or 12 rows, 16 or 32 columns, 320 deep
SHAPES = [(32, 64, 512), (97, 321, 65), (1577, 192, 577), (333, 1537, 77), (217, 641, 300), (64, 320, 64)]


OPS = torch.ops.dfs_engine


@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "nobias"])
def test_matches_float64(shape, bias):
    rows, inputs, outputs = shape
    x = torch.rand(rows, inputs)
    weight = torch.rand(outputs, 2 * inputs)[:, ::2]
    shift = torch.rand(2 * outputs)[::2] if bias else None
    grad = torch.rand(outputs, rows).t()
    start, stop = inputs // 3, inputs - 1
    double = None if shift is None else shift.double()
    assert_close(
        "output",
        OPS.linear.kernel(x, weight, shift, kernel="gemm"),
        torch.nn.functional.linear(x.double(), weight.double(), double),
    )
    expected = grad.double() @ weight.double()[:, start:stop]
    assert_close("grad_input", OPS.linear_grad_input.kernel(grad, weight, start, stop, kernel="gemm"), expected)
    grad_weight, grad_bias = OPS.linear_grad_weight.kernel(grad, x, bias, kernel="gemm")
    assert_close("grad_weight", grad_weight, grad.double().t() @ x.double())
    if bias:
        assert_close("grad_bias", grad_bias, grad.double().sum(0))


@pytest.mark.parametrize(
    "shape", [(1024, 193, 200), (1577, 200, 193), (2051, 384, 192)], ids=lambda s: "x".join(map(str, s))
)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "nobias"])
def test_onednn_matches_float64(shape, bias):
    rows, inputs, outputs = shape
    x = torch.rand(3, rows, 2 * inputs)[..., ::2]
    weight = torch.rand(outputs, inputs + 3)[:, 3:]
    shift = torch.rand(2 * outputs)[::2] if bias else None
    double = None if shift is None else shift.double()
    torch.set_num_threads(2)  # on one, ATen takes such a convolution elsewhere
    with torch.profiler.profile() as profile:
        output = OPS.linear.kernel(x, weight, shift, kernel="onednn")
        grad = torch.rand(outputs, 3, rows).permute(1, 2, 0)
        grad_input = OPS.linear_grad_input.kernel(grad, weight, 1, inputs, kernel="onednn")
    names = {event.name for event in profile.events()}
    assert {"aten::mkldnn_convolution", "aten::convolution_backward"} <= names, "oneDNN did not run"
    assert output.is_contiguous()
    assert grad_input.is_contiguous()
    assert_close("output", output, torch.nn.functional.linear(x.double(), weight.double(), double))
    assert_close("grad_input", grad_input, grad.double() @ weight.double()[:, 1:])


def test_the_result_does_not_depend_on_the_threads():
    x, weight = torch.randn(517, 700), torch.randn(211, 700)
    results = []
    for threads in (1, 2, 1):
        torch.set_num_threads(threads)
        results.append(OPS.linear.kernel(x, weight, None, kernel="gemm"))
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
def test_weight_gradient_of_a_convolution(convolution, channels_last):
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
        results.append(OPS.conv2d_grad_weight.kernel(*arguments, kernel="gemm"))
    assert_close("grad_weight", results[0][0], reference)
    assert_close("grad_bias", results[0][1], grad.double().sum((0, 2, 3)))
    assert results[0][0].is_contiguous()
    for grad_weight, grad_bias in results[1:]:
        assert torch.equal(grad_weight, results[0][0])
        assert torch.equal(grad_bias, results[0][1])


def wins(**found: bool):
    return lambda: calibration.Wins(**(dict.fromkeys(calibration.Wins._fields, False) | found))


def picked(rows: int, inputs: int, outputs: int) -> list[str]:
    """For each pass of a linear layer."""
    x, weight, grad = torch.empty(rows, inputs), torch.empty(outputs, inputs), torch.empty(rows, outputs)
    return [
        choice.KERNEL_OF["linear"](x, weight, None),
        choice.KERNEL_OF["linear_grad_input"](grad, weight, 0, inputs),
        choice.KERNEL_OF["linear_grad_weight"](grad, x, True),
    ]


@pytest.mark.parametrize("gemm", [True, False])
@pytest.mark.parametrize("onednn", [True, False])
def test_what_the_calibration_found_is_picked_where_it_is_large_enough(gemm, onednn, monkeypatch):
    monkeypatch.setattr(calibration, "wins", wins(linear=gemm, onednn_linear=onednn))
    ours = "gemm" if gemm else "aten"
    torch.set_num_threads(2)
    assert picked(2048, 192, 192) == ["onednn" if onednn else ours] * 2 + [ours]
    assert picked(1000, 192, 192) == [ours] * 3
    assert picked(31, 2048, 2048) == ["aten"] * 3
    assert picked(0, 192, 192) == ["aten"] * 3
    torch.set_num_threads(1)
    assert picked(2048, 192, 192) == [ours] * 3


@pytest.mark.parametrize("faster", [True, False])
def test_the_weight_gradient_of_a_strided_convolution_is_picked(faster, monkeypatch):
    monkeypatch.setattr(calibration, "wins", wins(conv_grad_weight=faster))
    grad, x, geometry = torch.empty(2, 32, 4, 4), torch.empty(2, 16, 8, 8), ((2, 2), (1, 1), (1, 1), 1, True)
    kernel = choice.KERNEL_OF["conv2d_grad_weight"](grad, x, torch.Size((32, 16, 3, 3)), *geometry)
    assert kernel == ("gemm" if faster else "aten")
    for size in ((32, 16, 1, 1), (15, 16, 3, 3), (32, 15, 3, 3)):
        assert choice.KERNEL_OF["conv2d_grad_weight"](grad, x, torch.Size(size), *geometry) == "aten"
    for channels, pays in (((64, 32), True), ((128, 64), True), ((32, 64), False), ((64, 16), False)):
        grad, x, size = torch.empty(64, channels[0], 4, 4), torch.empty(64, channels[1], 8, 8), (*channels, 3, 3)
        kernel = choice.KERNEL_OF["conv2d_grad_weight"](grad, x, torch.Size(size), *geometry)
        assert kernel == ("gemm" if faster and pays else "aten")
    dense = torch.empty(2, 32, 8, 8), torch.empty(2, 16, 8, 8), torch.Size((32, 16, 5, 5)), (1, 1), (2, 2)
    assert choice.KERNEL_OF["conv2d_grad_weight"](*dense, (1, 1), 1, True) == "aten"


def test_it_refuses_half_precision_that_the_cpu_computes_itself_and_groups():
    x, grad = torch.randn(2, 16, 8, 8), torch.randn(2, 32, 4, 4)
    with pytest.raises(RuntimeError, match="conv2d_grad_weight: the kernel gemm computes one group in float"):
        OPS.conv2d_grad_weight.kernel(grad, x, (32, 8, 3, 3), (2, 2), (1, 1), (1, 1), 2, True, kernel="gemm")
    with pytest.raises(RuntimeError, match="linear: the kernel gemm computes one group in float"):
        OPS.linear.kernel(torch.randn(40, 40).double(), torch.randn(20, 40).double(), None, kernel="gemm")
