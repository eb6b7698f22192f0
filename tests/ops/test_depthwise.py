"""Depthwise convolutions by csrc/depthwise.cpp against the oracle: geometries, odd sizes, slices, layouts."""

import pytest
import torch
from torch import Tensor
from torch.profiler import profile

from dfs_engine.ops import partitioned_conv2d
from dfs_engine.runtime import backend as backends

pytestmark = pytest.mark.usefixtures("poison")

GEOMETRIES = {
    "same": {"padding": 1},
    "stride": {"stride": 2, "padding": 1},
    "stride-beyond-the-kernel": {"stride": (4, 5)},
    "dilation": {"dilation": 2, "padding": (2, 3)},
    "dilation-stride": {"dilation": (2, 1), "stride": (3, 2), "padding": (1, 4)},
}


@pytest.fixture(autouse=True)
def _extension():
    reason = backends.unavailable_reason("cpp")
    if reason is not None:
        pytest.skip(reason)


def make(
    channels: int = 33, kernel=(3, 3), size=(9, 8), batch: int = 2, dtype=torch.float32
) -> dict[str, Tensor | None]:
    image = torch.randn(batch, channels, *size, dtype=dtype)
    return {
        "input": image.contiguous(memory_format=torch.channels_last),
        "weight": torch.randn(channels, 1, *kernel, dtype=dtype),
        "bias": torch.randn(channels, dtype=dtype),
    }


def grad_like(output: Tensor) -> Tensor:
    return torch.randn(output.shape, dtype=output.dtype).contiguous(memory_format=torch.channels_last)


def output_of(tensors, **options) -> Tensor:
    channels = tensors["weight"].size(0)
    return partitioned_conv2d(**tensors, groups=channels, start=0, stop=channels, backend="cpp", **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("kernel", [(3, 3), (1, 1), (2, 5), (7, 7)], ids=str)
@pytest.mark.parametrize("options", GEOMETRIES.values(), ids=GEOMETRIES)
def test_every_geometry(options, kernel, dtype, check):
    tensors = make(kernel=kernel, size=(17, 18), dtype=dtype)
    grad_output = grad_like(output_of(tensors, **options))
    options = {**options, "groups": 33, "start": 5, "stop": 30, "backend": "cpp"}
    actual = check(partitioned_conv2d, tensors, grad_output, **options)
    assert not actual["grad_input"][:, :5].any()
    assert not actual["grad_input"][:, 30:].any()


@pytest.mark.parametrize("reference", [True, False], ids=["reference", "no-reference"])
@pytest.mark.parametrize("channels", [2, 3, 15, 16, 17, 65])
def test_channels_beside_the_vector_width(channels, reference, check):
    tensors = make(channels)
    options = {"groups": channels, "padding": 1, "reference": reference, "backend": "cpp"}
    for start, stop in ((0, channels), (0, channels // 2), (channels // 2, channels), (1, 1)):
        check(partitioned_conv2d, tensors, grad_like(tensors["input"]), start=start, stop=stop, **options)


@pytest.mark.parametrize("size", [(1, 1), (1, 6), (5, 1), (2, 2)], ids=str)
@pytest.mark.parametrize("stride", [1, 2])
def test_images_that_the_filter_hardly_fits(size, stride, check):
    tensors = make(size=size, batch=1)
    check(partitioned_conv2d, tensors, groups=33, padding=1, stride=stride, start=0, stop=16, backend="cpp")


LAYOUTS = {
    "nchw": lambda t: t.contiguous(),
    "channel-slice": lambda t: torch.cat([t, t, t], 1).contiguous(memory_format=torch.channels_last)[
        :, 7 : 7 + t.size(1)
    ],
    "cut-out": lambda t: torch.nn.functional.pad(t, (2, 1, 1, 2))[:, :, 1:-2, 2:-1],
    "turned": lambda t: t.transpose(2, 3).contiguous(memory_format=torch.channels_last).transpose(2, 3),
    "expanded": lambda t: t[:, :, :1, :1].expand_as(t),
    "every-second-image": lambda t: t.repeat_interleave(2, 0)[::2],
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("which", ["input", "grad_output", "both"])
def test_any_strides(layout, which, check):
    tensors = make()
    grad_output = grad_like(tensors["input"])
    if which != "grad_output":
        tensors["input"] = layout(tensors["input"])
    if which != "input":
        grad_output = layout(grad_output)
    check(partitioned_conv2d, tensors, grad_output, groups=33, padding=1, start=3, stop=20, backend="cpp")


def test_two_threads_two_runs_and_one_thread_are_bitwise_the_same(evaluate):
    tensors = make(65, size=(31, 30), batch=5)
    options = {"groups": 65, "padding": 1, "start": 0, "stop": 33, "backend": "cpp"}
    grad_output = grad_like(tensors["input"])
    runs = []
    for num_threads in (1, 2, 2):
        torch.set_num_threads(num_threads)
        runs.append(evaluate(partitioned_conv2d, tensors, grad_output, **options))
    for name, value in runs[0].items():
        assert torch.equal(value, runs[1][name]), name
        assert torch.equal(value, runs[2][name]), name


@pytest.mark.parametrize("multiplier", [1, 2])
def test_it_is_used_for_one_filter_per_channel_alone(multiplier, evaluate):
    tensors = make()
    tensors |= {"weight": torch.randn(33 * multiplier, 1, 3, 3), "bias": None}
    with profile() as seen:
        evaluate(partitioned_conv2d, tensors, groups=33, padding=1, start=0, stop=16, backend=None)
    stock = {event.name for event in seen.events()} & {"aten::conv2d", "aten::convolution_backward"}
    assert stock == (set() if multiplier == 1 else {"aten::conv2d", "aten::convolution_backward"})


@pytest.mark.parametrize("options", [{}, {"dilation": 3, "padding": 1}, {"dilation": (1, 4), "stride": 2}], ids=str)
def test_a_filter_larger_than_the_image_is_refused_as_stock_does(options):
    with pytest.raises(RuntimeError, match="Kernel size can't be greater than actual input size"):
        output_of(make(size=(4, 4) if options else (2, 2)), **options)
