"""Every launch of every op as a GPU would get it, compiled from its own arguments by Triton's launcher, without a GPU.

The tests of compilations say what types and constants they believe a launch has; here the launches themselves say it.
Tensors lie on the CPU and nothing runs.
"""

import itertools

import pytest
import torch
from torch import Tensor

from dfs_engine.kernels import config

pytest.importorskip("triton")
if config.INTERPRETED or torch.cuda.is_available():
    pytest.skip("launches run here: in the interpreter, or on a GPU", allow_module_level=True)

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import JITFunction

from dfs_engine.kernels import conv2d, conv2d_depthwise, conv2d_splits, linear, norm_act, norm_linear

SHARED_MEMORY = {80: 166_912, 90: 232_448}
FILES = (conv2d, conv2d_depthwise, conv2d_splits, norm_act, linear, norm_linear)
HALF = torch.bfloat16


class Driver:
    """What Triton asks the CUDA driver before it compiles."""

    def __init__(self, capability: int) -> None:
        self.target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return self.target.arch  # its kernels are kept apart

    def get_current_stream(self, device: int) -> int:
        return 0


@pytest.fixture(params=[pytest.param(80, marks=pytest.mark.slow), 90], ids=["sm_80", "sm_90"])
def launches(request, monkeypatch) -> list[dict]:
    """Those made in the test: kernel, source that was compiled, constants, warps, stages."""
    made: list[dict] = []
    original = JITFunction.run

    def compile_only(self, *args, grid, warmup, **kwargs):
        kernel = original(self, *args, grid=grid, warmup=True, **kwargs)
        assert all(0 < size < 2**16 or axis == 0 for axis, size in enumerate(grid)), grid
        assert kernel.metadata.shared <= SHARED_MEMORY[request.param]
        made.append({"kernel": self, "source": kernel.src, **kwargs})
        return kernel

    monkeypatch.setattr(JITFunction, "run", compile_only)
    triton.runtime.driver.set_active(Driver(request.param))
    yield made
    triton.runtime.driver._active = None


def random(*size: int, dtype: torch.dtype = HALF) -> Tensor:
    tensor = torch.zeros(size, dtype=dtype)
    return tensor.contiguous(memory_format=torch.channels_last) if tensor.dim() == 4 else tensor


def check(launches: list[dict], *names: str) -> None:
    """These kernels were launched, each as one of the compilations that are tested: tile, dtypes, strides of 1."""
    assert sorted({made["kernel"].__name__ for made in launches}) == sorted(names)
    known = [found for file in FILES for found in file.compilations()]
    for made in launches:
        tile = {name: value for name, value in made.items() if name.startswith(("BLOCK", "CHANNELS", "PARTS", "GROUP"))}
        types = made["source"].signature
        pointers = {name: kind for name, kind in types.items() if kind.startswith("*")}
        assert any(
            found.kernel is made["kernel"]
            and (found.num_warps, found.num_stages) == (made["num_warps"], made["num_stages"])
            and all(found.constexprs[name] == value for name, value in tile.items())
            and all(found.signature[name] == kind for name, kind in pointers.items())
            and unit_strides(found.signature) == unit_strides(types)
            for found in known
        ), f"{made['kernel'].__name__} {tile} {pointers} {unit_strides(types)}: no compilation is tested"


def unit_strides(signature: dict[str, str]) -> set[str]:
    """Those that a launch has made constants, which are 1."""
    return {name for name, kind in signature.items() if name.startswith("stride_") and kind == "constexpr"}


SLOW = pytest.mark.slow


RESULT = pytest.mark.parametrize("result", [None, torch.float32], ids=["same", "fp32"])  # of a weight's gradient


@pytest.mark.parametrize("rows", [37, pytest.param(2**16, marks=SLOW)])
@RESULT
def test_linear(launches, rows, result):
    grad_output, input, weight = random(rows, 65), random(rows, 48), random(65, 48)
    linear.linear_grad_input(grad_output, weight, 16, 40)
    linear.linear_grad_weight(grad_output, input, True, result)
    reduced = ["_reduce_kernel"] if rows > 37 else []
    check(launches, "_grad_input_kernel", "_grad_weight_kernel", *reduced)


@pytest.mark.parametrize("is_autocast", [True, pytest.param(False, marks=SLOW)], ids=["autocast", "plain"])
def test_norm_linear(launches, is_autocast):
    normed = torch.float32 if is_autocast else HALF
    grad_output, input, weight, bias = random(2, 9, 65), random(2, 9, 48, dtype=normed), random(65, 48), random(65)
    mean, rstd = (random(2, 9, 1, dtype=torch.float32) for _ in range(2))
    gain, shift = (random(48, dtype=normed) for _ in range(2))
    affine = (gain, shift, weight, bias) if is_autocast else (None, None, weight, None)
    norm_linear.norm_linear_grad_input(grad_output, grad_output, input, mean, rstd, *affine, 16, 40)
    norm_linear.norm_linear_grad_weight(grad_output, input, mean, rstd)
    check(
        launches, "_weight_sums_kernel", "_row_sums_kernel", "_grad_input_kernel", "_normalize_kernel",
        "_grad_weight_kernel",
    )  # fmt: skip


@pytest.mark.parametrize("channels", [pytest.param(17, marks=SLOW), 64])
@pytest.mark.parametrize(
    ("kernel", "stride"),
    [(3, 1), pytest.param(3, 2, marks=SLOW), pytest.param(1, 1, marks=SLOW)],
    ids=["3x3", "3x3-stride", "1x1"],
)
def test_conv2d(launches, channels, kernel, stride, monkeypatch):
    size, out = 28, (28 - 1) // stride + 1
    grad_output, input = random(9, 32, out, out), random(9, channels, size, size)
    weight, geometry = random(32, channels, kernel, kernel), ((stride, stride), (kernel // 2,) * 2, (1, 1), 1)
    conv2d.conv2d_grad_input(grad_output, weight, input.shape, *geometry, 0, channels // 2, True)
    sizes, bias = (grad_output, input, weight.shape, *geometry), True
    for is_last, result in itertools.product((True, False), (None, torch.float32)):
        conv2d.conv2d_grad_weight(*sizes, bias, is_last, result)
        with monkeypatch.context() as patch:  # of so few pixels that one part has them all
            patch.setattr(config, "_is_split", lambda op: False)
            conv2d.conv2d_grad_weight(*sizes, bias, is_last, result)
    check(launches, "_grad_input_kernel", "_grad_weight_kernel", "_sum_kernel")


def test_depthwise(launches):
    grad_output, input, weight = random(9, 33, 13, 13), random(9, 33, 26, 26), random(33, 1, 3, 3)
    geometry = ((2, 2), (1, 1), (1, 1), 33)
    conv2d.conv2d_grad_input(grad_output, weight, input.shape, *geometry, 0, 17, True)
    for result in (None, torch.float32):
        conv2d.conv2d_grad_weight(grad_output, input, weight.shape, *geometry, True, False, result)
    check(launches, "_grad_input_kernel", "_grad_weight_kernel")


MODES = {"relu-first": (False, True), "pool": (True, True), "residual": (False, False)}  # (pool, relu_first)


@pytest.mark.parametrize("mode", ["relu-first", *(pytest.param(mode, marks=SLOW) for mode in ("pool", "residual"))])
@pytest.mark.parametrize("dtype", [HALF, pytest.param(torch.float32, marks=SLOW)], ids=["bf16", "fp32"])
def test_norm_act(launches, mode, dtype):
    pool, relu_first = MODES[mode]
    z = random(3, 65, 9, 7, dtype=dtype)
    gamma, beta = (random(65, dtype=torch.float32) for _ in range(2))
    residual = z if mode == "residual" else None
    made = norm_act.norm_act(z, gamma, beta, residual, None, None, 1e-5, pool, relu_first, True)
    feature, average, average_hat, mean, inverse_std, _, passed = made
    saved = (None if residual is None else feature, average_hat, mean, inverse_std, passed)
    norm_act.norm_act_backward(feature[:, :33], average, z, gamma, beta, *saved, True, pool, relu_first)
    check(
        launches, "statistics_kernel", "merge_statistics_kernel", "normalise_kernel", "average_kernel",
        "reduce_kernel", "merge_gradients_kernel", "gradient_kernel",
    )  # fmt: skip
