"""3x3 convolutions through Winograd against float64, over every size of tile and channel panel; and when it runs."""

import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dfs_engine.ops import partitioned_conv2d
from dfs_engine.runtime import backend as backends
from dfs_engine.runtime import choice
from dfs_engine.validate.tolerances import Tolerance, assert_close

pytestmark = pytest.mark.usefixtures("poison")

OPS = torch.ops.dfs_engine
NAME = "cpp:winograd"
CHANNELS = (16, 17, 24, 33, 65)


@pytest.fixture(autouse=True)
def _extension():
    reason = backends.unavailable_reason("cpp")
    if reason is not None:
        pytest.skip(reason)


def convolve(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    padding,
    grad_output: Tensor,
    start: int,
    stop: int,
    kernel: str = "winograd",
):
    """Output, the slice's grad_input, grad_weight and grad_bias, by a kernel of the cpp backend."""
    geometry = ((1, 1), padding, (1, 1), 1)
    channels_last = input.is_contiguous(memory_format=torch.channels_last) and not input.is_contiguous()
    return {
        "output": OPS.conv2d.kernel(input, weight, bias, *geometry, kernel=kernel),
        "grad_input": OPS.conv2d_grad_input.kernel(
            grad_output, weight, input.shape, *geometry, start, stop, channels_last, kernel=kernel
        ),
        **dict(
            zip(
                ("grad_weight", "grad_bias"),
                OPS.conv2d_grad_weight.kernel(grad_output, input, weight.shape, *geometry, True, kernel=kernel),
                strict=True,
            )
        ),
    }


def expect(input: Tensor, weight: Tensor, bias: Tensor | None, padding, grad_output: Tensor, start: int, stop: int):
    """The same by stock PyTorch in float64."""
    leaves = [input.double().requires_grad_(), weight.double().requires_grad_()]
    output = F.conv2d(*leaves, None if bias is None else bias.double(), padding=padding)
    grads = torch.autograd.grad(output, leaves, grad_output.double(), materialize_grads=True)
    return {
        "output": output.detach(),
        "grad_input": grads[0][:, start:stop],
        "grad_weight": grads[1],
        "grad_bias": grad_output.double().sum((0, 2, 3)),
    }


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def dtype(request):
    """Of images and weights."""
    return request.param


def check_kernel(
    input: Tensor, weight: Tensor, bias: Tensor | None, padding=(1, 1), grad_layout=None, part=None
) -> dict:
    height, width = (size + 2 * pad - 2 for size, pad in zip(input.shape[2:], padding, strict=True))
    grad_output = torch.randn(input.size(0), weight.size(0), height, width, dtype=input.dtype)
    grad_output = grad_output if grad_layout is None else grad_layout(grad_output)
    arguments = (input, weight, bias, padding, grad_output, *(part or (0, input.size(1))))
    actual, expected = convolve(*arguments), expect(*arguments)
    for name, value in actual.items():
        assert value.dtype == input.dtype
        assert_close(name, value, expected[name])
    return actual


def make(
    images=2, in_channels=17, out_channels=24, height=7, width=9, dtype=torch.float32
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        torch.randn(images, in_channels, height, width, dtype=dtype),
        torch.randn(out_channels, in_channels, 3, 3, dtype=dtype),
        torch.randn(out_channels, dtype=dtype),
    )


@pytest.mark.parametrize("size", range(1, 14))
@pytest.mark.parametrize("padding", [(0, 0), (1, 1), (2, 2), (0, 2), (2, 1)], ids=str)
def test_every_size(size, padding, dtype):
    height, width = size, (size * 5) % 13 + 1
    if min(height + 2 * padding[0], width + 2 * padding[1]) < 3:
        arguments = (*make(height=height, width=width), (1, 1), padding, (1, 1), 1)
        with pytest.raises(RuntimeError, match="Kernel size can't be greater than actual input size"):
            OPS.conv2d.kernel(*arguments, kernel="winograd")
        return
    check_kernel(*make(height=height, width=width, dtype=dtype), padding=padding)


@pytest.mark.parametrize("in_channels", CHANNELS)
@pytest.mark.parametrize("out_channels", CHANNELS)
def test_channels_beside_the_vector_width(in_channels, out_channels, dtype):
    check_kernel(*make(1, in_channels, out_channels, 6, 5, dtype))


@pytest.mark.parametrize("images", [0, 1, 5])
def test_batch_sizes(images, dtype):
    results = check_kernel(*make(images, dtype=dtype))
    assert results["grad_weight"].any() == (images > 0)


@pytest.mark.parametrize("part", [(0, 16), (16, 33), (3, 33), (17, 33), (0, 5), (9, 9)], ids=str)
def test_grad_input_of_a_slice(part, dtype):
    check_kernel(*make(in_channels=33, dtype=dtype), part=part)


def channels_last(tensor: Tensor) -> Tensor:
    return tensor.contiguous(memory_format=torch.channels_last)


def channel_slice(tensor: Tensor) -> Tensor:
    return channels_last(tensor.repeat(1, 2, 1, 1))[:, 1 : tensor.size(1) + 1].copy_(tensor)


def transposed(tensor: Tensor) -> Tensor:
    return tensor.transpose(-1, -2).contiguous().transpose(-1, -2)


def expanded(tensor: Tensor) -> Tensor:
    return tensor[:, :, :1, :1].expand(tensor.shape)


@pytest.mark.parametrize("layout", [channels_last, channel_slice, transposed, expanded])
@pytest.mark.parametrize("weight_layout", [channels_last, channel_slice, transposed])
@pytest.mark.parametrize("grad_layout", [channels_last, channel_slice, expanded])
def test_any_strides(layout, weight_layout, grad_layout, dtype):
    input, weight, bias = make(dtype=dtype)
    input, weight, bias = layout(input), weight_layout(weight), bias.repeat_interleave(2)[::2]
    results = check_kernel(input, weight, bias, grad_layout=grad_layout)
    format = torch.channels_last if layout is channels_last else torch.contiguous_format
    assert results["grad_input"].is_contiguous(memory_format=format)
    assert results["grad_weight"].is_contiguous()


def test_without_a_bias_and_with_several_chunks_of_tiles(dtype):
    input, weight, _ = make(5, 65, 65, 33, 30, dtype)
    check_kernel(input, weight, None)


def test_two_threads_two_runs_and_one_thread_are_bitwise_the_same(dtype):
    input, weight, bias = make(5, 65, 33, 31, 30, dtype)
    grad_output = torch.randn(5, 33, 31, 30, dtype=dtype)
    runs = []
    for num_threads in (1, 2, 2):
        torch.set_num_threads(num_threads)
        runs.append(convolve(input, weight, bias, (1, 1), grad_output, 0, 32))
    for name, value in runs[0].items():
        assert torch.equal(value, runs[1][name]), name
        assert torch.equal(value, runs[2][name]), name


def test_it_is_another_kernel_than_aten(dtype):
    input, weight, bias = make(4, 32, 32, 24, 24, dtype)
    arguments = (input, weight, bias, (1, 1), torch.randn(4, 32, 24, 24, dtype=dtype), 0, 16)
    fast, direct, expected = convolve(*arguments), convolve(*arguments, kernel="aten"), expect(*arguments)
    for name, value in fast.items():
        assert_close(name, direct[name], expected[name])
        assert_close(name, value, expected[name])
        # Bitwise equality would mean that the same kernel ran twice.
        assert name == "grad_bias" or not torch.equal(value, direct[name]), name


def test_bf16_loses_its_last_place_alone():
    """The kernels compute in float and round once, as the CPU's own bfloat16 instructions would."""
    input, weight, bias = make(2, 40, 32, 12, 12, torch.bfloat16)
    arguments = (input, weight, bias, (1, 1), torch.randn(2, 32, 12, 12).bfloat16(), 0, 40)
    actual, expected = convolve(*arguments), expect(*arguments)
    for name in ("output", "grad_input", "grad_weight"):
        assert_close(name, actual[name], expected[name].bfloat16().double(), Tolerance(2**-7, 2**-9))


@pytest.mark.parametrize("reference", [True, False], ids=["reference", "no-reference"])
@pytest.mark.parametrize("part", [(0, 20), (20, 40), (3, 31)], ids=str)
def test_it_serves_every_pass_of_a_partitioned_convolution(part, reference, check):
    input, weight, bias = make(2, 40, 32, 12, 12)
    tensors = {"input": input, "weight": weight, "bias": bias}
    check(partitioned_conv2d, tensors, padding=1, start=part[0], stop=part[1], reference=reference, backend=NAME)
    for name in ("partitioned_conv2d", "conv2d", "conv2d_grad_input", "conv2d_grad_weight"):
        assert backends.last_used(name) == NAME


@pytest.mark.parametrize(
    ("kernel", "stride", "padding", "groups", "dtype"),
    [
        (1, 1, 0, 1, torch.float32),
        (3, 2, 1, 1, torch.float32),
        (3, 1, 3, 1, torch.float32),
        (3, 1, 1, 2, torch.float32),
        (3, 1, 1, 1, torch.float64),
    ],
)
def test_it_refuses_what_it_cannot_compute_and_is_not_picked_for_it(kernel, stride, padding, groups, dtype):
    input, weight = torch.randn(2, 32, 9, 9, dtype=dtype), torch.randn(32, 32 // groups, kernel, kernel, dtype=dtype)
    geometry = ((stride, stride), (padding, padding), (1, 1), groups)
    with pytest.raises(RuntimeError, match="conv2d: the kernel winograd computes 3x3 convolutions of stride 1"):
        OPS.conv2d.kernel(input, weight, None, *geometry, kernel="winograd")
    with choice.use_winograd(True):
        assert choice.KERNEL_OF["conv2d"](input, weight, None, *geometry) != "winograd"


def test_an_unknown_kernel_is_refused():
    with pytest.raises(RuntimeError, match="conv2d: expected kernel aten, winograd or depthwise, got winogard"):
        OPS.conv2d.kernel(*make(), (1, 1), (1, 1), (1, 1), 1, kernel="winogard")
    input, weight, bias = make()
    with pytest.raises(RuntimeError, match="'cpp:onednn' was requested, but it has only cpp:aten, cpp:winograd"):
        partitioned_conv2d(input, weight, bias, start=0, stop=3, backend="cpp:onednn")


def picked(input: Tensor, weight: Tensor) -> list[str]:
    """For each pass."""
    geometry, channels = ((1, 1), (1, 1), (1, 1), 1), weight.size(1)
    return [
        choice.KERNEL_OF["conv2d"](input, weight, None, *geometry),
        choice.KERNEL_OF["conv2d_grad_input"](input, weight, input.shape, *geometry, 0, channels, True),
        choice.KERNEL_OF["conv2d_grad_weight"](input, input, weight.shape, *geometry, False),
    ]


@pytest.mark.parametrize(
    ("num_images", "channels", "size", "pays"),
    [(4, 64, 32, (True, True)), (2, 64, 2, (False, True)), (4, 16, 32, (False, False)), (4, 15, 32, None)],
)
def test_it_is_picked_where_it_pays(num_images, channels, size, pays, monkeypatch):
    """`pays`: for outputs and grad_input, and for grad_weight; None: it does not even apply."""
    monkeypatch.setattr(choice.calibration, "wins", lambda: choice.calibration.Wins(False, False, False, False, False))
    input, weight = torch.empty(num_images, channels, size, size), torch.empty(channels, channels, 3, 3)
    of_images, of_weight = ("winograd" if pay else "aten" for pay in pays or (False, False))
    assert picked(input, weight) == [of_images, of_images, of_weight]
    with choice.use_winograd(True):
        assert picked(input, weight) == ["aten" if pays is None else "winograd"] * 3
    with choice.use_winograd(False):
        assert picked(input, weight) == ["aten"] * 3
    with pytest.raises(KeyError), choice.use_winograd(True):
        raise KeyError
    assert picked(input, weight) == [of_images, of_images, of_weight]


@pytest.mark.parametrize("half_wins", [True, False])
@pytest.mark.parametrize("channels", [64, 48])
@pytest.mark.parametrize("has_instructions", [True, False])
def test_bf16_images_are_left_to_the_cpus_own_instructions_unless_it_is_faster(
    half_wins, channels, has_instructions, monkeypatch
):
    """With few channels another answer decides."""
    half, narrow = (half_wins, not half_wins) if channels == 64 else (not half_wins, half_wins)
    wins = choice.calibration.Wins(False, False, False, half, narrow)
    monkeypatch.setattr(choice.calibration, "wins", lambda: wins)
    monkeypatch.setattr(choice, "_computes_in_float", lambda dtype: dtype != torch.bfloat16 or not has_instructions)
    input, weight = torch.empty(8, channels, 32, 32).bfloat16(), torch.empty(channels, channels, 3, 3).bfloat16()
    expected = "winograd" if half_wins or not has_instructions else "aten"
    assert picked(input, weight) == [expected] * 3


CODE = """
import sys, torch
from dfs_engine import _C
from dfs_engine.runtime import backend
torch.set_num_threads(1)
tensors = torch.load(sys.argv[1])
geometry = ((1, 1), (1, 1), (1, 1), 1)
ops = torch.ops.dfs_engine
triple = tensors["input"], tensors["weight"], tensors["bias"]
results = {"output": ops.conv2d.kernel(*triple, *geometry, kernel="winograd")}
grad_output, input, weight = tensors["grad_output"], tensors["input"], tensors["weight"]
place = (1, 30, False)
results["grad_input"] = ops.conv2d_grad_input.kernel(
    grad_output, weight, input.shape, *geometry, *place, kernel="winograd"
)
for kernel in ("winograd", "gemm"):
    results[f"grad_weight {kernel}"] = ops.conv2d_grad_weight.kernel(
        grad_output, input, weight.shape, *geometry, False, kernel=kernel
    )[0]
filters = weight[:, :1].repeat(2, 1, 1, 1)[:33]
image, around = input.contiguous(memory_format=torch.channels_last), ((2, 2), (1, 1), (1, 1), 33)
results["depthwise"] = ops.conv2d.kernel(image, filters, None, *around, kernel="depthwise")
found = results["depthwise"].flip(0).contiguous(memory_format=torch.channels_last)
results["depthwise grad_input"] = ops.conv2d_grad_input.kernel(
    found, filters, image.shape, *around, 1, 30, True, kernel="depthwise"
)
results["depthwise grad_weight"] = ops.conv2d_grad_weight.kernel(
    found, image, filters.shape, *around, False, kernel="depthwise"
)[0]
transformed, numbers = ops.winograd_weight(weight), (weight[:, 0, 0, 0], weight[:, 0, 0, 1].contiguous())
endings = {
    "act": (None, None, None, True, False),
    "no relu": (None, None, None, False, False),
    "affine": (*numbers, None, True, False),
    "pool": (*numbers, None, True, True),
    "residual": (None, None, results["output"].flip(0), True, False),
}
for label, (scale, shift, residual, relu, pool) in endings.items():
    made = ops.winograd_conv_act(
        input, transformed, 17, tensors["bias"], scale, shift, residual, (1, 1), relu, pool, True
    )
    results |= {f"conv_act {label} feature": made[0], f"conv_act {label} average": made[1]}
for label, residual, pool, relu_first in (("pool", None, True, True), ("residual", input.flip(0), False, False)):
    affine = tensors["gamma"], tensors["beta"]
    produced = ops.norm_act(input, *affine, residual, None, None, 1e-5, pool, relu_first, True)
    results |= {f"norm_act {index} {label}": value for index, value in enumerate(produced)}
    feature, average, average_hat, mean, inverse_std, _, passed = produced
    feature = None if residual is None else feature
    saved = (input, tensors["gamma"], tensors["beta"], feature, average_hat, mean, inverse_std, passed)
    found = ops.norm_act_backward(produced[0][:, :16], average, *saved, True, pool, relu_first)
    results |= {f"norm_act_backward {index} {label}": value for index, value in enumerate(found)}
torch.save((_C.instruction_set(), results), sys.argv[2])
"""


@pytest.fixture
def in_process(tmp_path):
    """Runs the kernels on the same tensors in another process, under environment variables."""
    tensors = {
        "input": torch.randn(2, 33, 9, 10),
        "weight": torch.randn(17, 33, 3, 3),
        "bias": torch.randn(17),
        "grad_output": torch.randn(2, 17, 9, 10),
        "gamma": torch.randn(33),
        "beta": torch.randn(33),
    }
    torch.save(tensors, tmp_path / "tensors.pt")

    def run(**environment: str) -> tuple[str, dict[str, Tensor]]:
        paths = [str(tmp_path / "tensors.pt"), str(tmp_path / "results.pt")]
        subprocess.run([sys.executable, "-c", CODE, *paths], check=True, env=os.environ | environment)
        return torch.load(paths[1])

    return run


def test_every_instruction_set_gives_the_same(in_process):
    from dfs_engine import _C

    best = _C.instruction_set()
    levels = ["baseline", "avx2", "avx512"]
    used, expected = in_process(DFS_CPU="")
    assert used == best
    for level in levels[: levels.index(best) + 1]:
        used, results = in_process(DFS_CPU=level)
        assert used == level
        for name, value in results.items():
            assert_close(f"{level} {name}", value, expected[name])


@pytest.mark.parametrize("value", ["0", "1", ""])
def test_the_environment_switches_it(value):
    code = "import torch; from dfs_engine.runtime import choice; print(choice._winograd)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | {"DFS_WINOGRAD": value}
    )
    assert done.stdout.strip() == {"0": "False", "1": "True", "": "None"}[value], done.stderr
