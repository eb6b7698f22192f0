"""A kernel of the cpp backend that is asked for by name serves every pass that has it, and is seen to have run."""

import pytest
import torch
from torch import Tensor

from dfs_engine.ops import partitioned_conv2d, partitioned_linear
from dfs_engine.runtime import backend as backends
from dfs_engine.runtime import choice

pytestmark = [
    pytest.mark.usefixtures("poison"),
    pytest.mark.skipif(backends.unavailable_reason("cpp") is not None, reason="the C++ extension is not built"),
]

# kernel -> groups, kernel size and geometry of a convolution of 24 channels that it computes
CONVOLUTIONS = {
    "winograd": (1, (3, 3), {"padding": (1, 2)}),
    "depthwise": (24, (3, 2), {"padding": 1, "stride": (2, 1)}),
    "gemm": (1, (3, 2), {"padding": 1, "stride": (2, 1)}),
    "aten": (2, (3, 2), {"padding": 1, "dilation": (1, 2)}),
}
SLICES = pytest.mark.parametrize("part", [(0, 24), (0, 12), (9, 23), (7, 8), (7, 7)], ids=str)
REFERENCE = pytest.mark.parametrize("reference", [True, False], ids=["reference", "no-reference"])


def check_what_ran(op: str, kernel: str) -> None:
    """Of each pass that has run since the last forward."""
    for name, kernels in backends.CPP_KERNELS[op].items():
        used = backends.last_used(name)
        assert used is None or kernel not in kernels or used == f"cpp:{kernel}", name


@pytest.fixture(autouse=True)
def _nothing_ran(monkeypatch):
    monkeypatch.setattr(backends, "_last_used", {})


@pytest.mark.parametrize("kernel", CONVOLUTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format], ids=["channels_last", "nchw"])
@pytest.mark.parametrize("images", [3, 0])
@SLICES
@REFERENCE
def test_convolutions(kernel, dtype, layout, images, part, reference, check):
    groups, size, geometry = CONVOLUTIONS[kernel]
    if kernel == "gemm" and dtype == torch.bfloat16 and not choice._computes_in_float(dtype):
        pytest.skip("refused: test_gemm.py")
    tensors = {
        "input": torch.randn(images, 24, 7, 9, dtype=dtype).contiguous(memory_format=layout),
        "weight": torch.randn(24, 24 // groups, *size, dtype=dtype),
        "bias": torch.randn(24, dtype=dtype),
    }
    options = {**geometry, "groups": groups, "start": part[0], "stop": part[1], "reference": reference}
    output = partitioned_conv2d(**tensors, **options, backend="aten")
    grad_output: Tensor = torch.randn(output.shape[:2], dtype=dtype)[:, :, None, None].expand(output.shape)
    check(partitioned_conv2d, tensors, grad_output, **options, backend=f"cpp:{kernel}")
    check_what_ran("partitioned_conv2d", kernel)
    assert images == 0 or part == (7, 7) or backends.last_used("conv2d_grad_weight") is not None


@pytest.mark.parametrize("kernel", ["onednn", "gemm", "aten"])
@pytest.mark.parametrize("rows", [37, 1, 0])
@SLICES
@REFERENCE
def test_linear_layers(kernel, rows, part, reference, check):
    tensors = {
        "input": torch.randn(2 * rows, 24)[::2],
        "weight": torch.randn(24, 19).t(),
        "bias": torch.randn(38)[::2],
    }
    options = {"start": part[0], "stop": part[1], "reference": reference}
    grad_output = torch.randn(rows, 1).expand(rows, 19)
    check(partitioned_linear, tensors, grad_output, **options, backend=f"cpp:{kernel}")
    check_what_ran("partitioned_linear", kernel)


@pytest.mark.parametrize("kernel", ["winograd", "gemm", "onednn"])
def test_an_op_without_that_kernel_refuses(kernel):
    call = partitioned_linear if kernel == "winograd" else partitioned_conv2d
    tensors = (torch.randn(2, 4), torch.randn(3, 4))
    if kernel != "winograd":
        tensors = (torch.randn(2, 4, 5, 5), torch.randn(3, 4, 3, 3))
    if kernel == "gemm":  # a weight gradient has it; what runs before that has not
        assert call(*tensors, start=0, stop=2, backend="cpp:gemm").shape == (2, 3, 3, 3)
        assert backends.last_used("conv2d") == "cpp:aten"
        return
    with pytest.raises(RuntimeError, match=f"backend 'cpp:{kernel}' was requested, but it has only cpp:aten"):
        call(*tensors, start=0, stop=2, backend=f"cpp:{kernel}")


@pytest.mark.parametrize(
    ("op", "shapes", "geometry"),
    [
        (partitioned_conv2d, ((8, 64, 16, 16), (64, 64, 3, 3)), {"padding": 1}),
        (partitioned_conv2d, ((8, 64, 16, 16), (64, 64, 3, 3)), {"padding": (1, 1), "stride": 2}),
        (partitioned_conv2d, ((2, 17, 9, 9), (17, 1, 3, 3)), {"groups": 17}),
        (partitioned_linear, ((2048, 256), (192, 256)), {}),
    ],
    ids=["conv2d", "strided", "depthwise", "linear"],
)
def test_torch_compile_gets_the_kernels_that_eager_calls_get(op, shapes, geometry):
    torch.compiler.reset()
    input, weight = (torch.randn(shape) for shape in shapes)
    input = input.contiguous(memory_format=torch.channels_last) if input.dim() == 4 else input
    leaves = input.requires_grad_(), weight.requires_grad_()

    def call(input: Tensor, weight: Tensor) -> Tensor:
        return op(input, weight, start=0, stop=input.size(1), backend="cpp", **geometry)

    used = []
    for function in (call, torch.compile(call, backend="aot_eager")):
        backends._last_used.clear()
        function(*leaves).sum().backward()
        used.append({name: backends.last_used(name) for name in backends.CPP_KERNELS[op.__name__]})
    assert used[1] == used[0]
    assert None not in used[0].values()
