"""A convolution with what follows it, by every kernel, against stock operators in float64."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dfs_engine.ops.conv_act import FixedConv, conv_act
from dfs_engine.runtime import backend as backends
from dfs_engine.runtime import choice
from dfs_engine.validate.tolerances import assert_close

pytestmark = pytest.mark.usefixtures("poison")

GEOMETRY = ((1, 1), (1, 1), (1, 1), 1)
ENDINGS = {
    "bias": {"relu": False},
    "relu": {},
    "affine": {"affine": True},
    "pool": {"affine": True, "pool": True},
    "pool-alone": {"pool": True},
    "affine-without-relu": {"affine": True, "relu": False, "pool": True},
    "residual": {"residual": True},
    "residual-without-relu": {"residual": True, "relu": False},
}
ENDING = pytest.mark.parametrize("ending", ENDINGS)


@pytest.fixture(params=["winograd", "onednn", "aten"])
def backend(request) -> str:
    if backends.unavailable_reason("cpp") is not None:
        pytest.skip(backends.unavailable_reason("cpp"))
    return f"cpp:{request.param}"


def make(in_channels=17, out_channels=24, geometry=GEOMETRY, kernel=3, affine=False, dtype=torch.float32) -> FixedConv:
    weight = torch.randn(out_channels, in_channels, kernel, kernel, dtype=dtype)
    vectors = [torch.randn(out_channels) if wanted else None for wanted in (True, affine, affine)]
    return FixedConv(weight, geometry, *vectors)


def expect(input: Tensor, conv: FixedConv, residual: Tensor | None, relu=True, pool=False) -> tuple[Tensor, Tensor]:
    bias = None if conv.bias is None else conv.bias.double()
    output = F.conv2d(input.double(), conv.weight.double(), bias, *conv.geometry)
    output = output if residual is None else output + residual.double()
    output = F.relu(output) if relu else output
    if conv.scale is not None and conv.shift is not None:
        output = output * conv.scale.double()[:, None, None] + conv.shift.double()[:, None, None]
    output = F.max_pool2d(output, 2) if pool else output
    return output, output.mean((2, 3))


def check(input: Tensor, conv: FixedConv, backend: str, *, residual=False, **options) -> None:
    shape = F.conv2d(input[:1].float(), conv.weight.float(), None, *conv.geometry).shape[1:]
    added = torch.randn(input.size(0), *shape, dtype=input.dtype) if residual else None
    feature, average = conv_act(input, conv, added, averages=True, backend=backend, **options)
    assert backends.last_used("conv_act") == backend
    assert feature.dtype == average.dtype == input.dtype
    exact = expect(input, conv, added, **options)
    assert_close("feature", feature, exact[0])
    assert_close("average", average, exact[1])
    alone, nothing = conv_act(input, conv, added, backend=backend, **options)
    assert nothing is None
    assert torch.equal(alone, feature)


@ENDING
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("size", [(8, 8), (7, 9), (5, 14), (2, 3)], ids=str)
def test_every_ending_and_size(ending, size, dtype, backend):
    options = dict(ENDINGS[ending])
    check(
        torch.randn(3, 17, *size, dtype=dtype),
        make(affine=options.pop("affine", False), dtype=dtype),
        backend,
        **options,
    )


@ENDING
@pytest.mark.parametrize("channels", [(16, 16), (33, 65), (65, 33)], ids=str)
def test_channels_beside_the_vector_width(ending, channels, backend):
    options = dict(ENDINGS[ending])
    check(torch.randn(2, channels[0], 6, 9), make(*channels, affine=options.pop("affine", False)), backend, **options)


@pytest.mark.parametrize("padding", [(0, 0), (2, 2), (0, 2), (2, 1)], ids=str)
def test_padding(padding, backend):
    check(torch.randn(2, 17, 9, 6), make(geometry=((1, 1), padding, (1, 1), 1), affine=True), backend, pool=True)


def test_large_weights_and_many_tiles(backend):
    check(torch.randn(3, 160, 9, 33), make(160, 200, affine=True), backend, pool=True)


@pytest.mark.parametrize(("kernel", "stride", "padding"), [(1, 1, 0), (3, 2, 1), (7, 2, 3), (1, 2, 0)])
def test_other_geometries_are_no_work_for_winograd(kernel, stride, padding):
    geometry = ((stride, stride), (padding, padding), (1, 1), 1)
    conv, image = make(kernel=kernel, geometry=geometry), torch.randn(2, 17, 11, 12)
    found, _ = conv_act(image, conv, torch.randn(F.conv2d(image, conv.weight, None, *geometry).shape) * 0)
    assert_close("feature", found, expect(image, conv, None)[0])
    assert backends.last_used("conv_act") != "cpp:winograd"


def test_any_strides(backend):
    conv = make(affine=True)
    image = torch.randn(2, 34, 9, 8).contiguous(memory_format=torch.channels_last)[:, ::2]
    check(image, conv, backend, pool=True)
    check(torch.randn(2, 17, 8, 9).transpose(2, 3), conv, backend)
    check(torch.randn(1, 1, 1, 1).expand(2, 17, 9, 8), conv, backend)
    vectors = [torch.full((48,), float("nan"))[::2].copy_(torch.randn(24)) for _ in range(3)]
    check(image, FixedConv(conv.weight, GEOMETRY, *vectors), backend, pool=True)
    check(image, FixedConv(conv.weight, GEOMETRY, vectors[0]), backend)


def test_a_nan_stays_one(backend):
    image = torch.randn(1, 17, 8, 8)
    image[0, 3, 4, 4] = float("nan")
    feature, average = conv_act(image, make(affine=True), pool=True, averages=True, backend=backend)
    assert feature[:, :, 2, 2].isnan().all()
    assert average.isnan().all()


def test_two_threads_and_one_are_bitwise_the_same(backend):
    conv, image = make(160, 200, affine=True), torch.randn(5, 160, 17, 18)
    runs = []
    for num_threads in (1, 2, 2):
        torch.set_num_threads(num_threads)
        runs.append(conv_act(image, conv, averages=True, backend=backend))
    if backend == "cpp:winograd":
        assert all(
            torch.equal(found, expected) for run in runs[1:] for found, expected in zip(run, runs[0], strict=True)
        )


def test_an_empty_batch_and_copies():
    conv, image = make(affine=True), torch.randn(2, 17, 8, 8)
    feature, average = conv_act(image[:0], conv, pool=True, averages=True)
    assert feature.shape == (0, 24, 4, 4)
    assert average.shape == (0, 24)
    expected = conv_act(image, conv)[0]
    assert torch.equal(conv_act(image, copy.deepcopy(conv))[0], expected)


def test_weights_are_made_once(backend, monkeypatch):
    conv, image = make(), torch.randn(2, 17, 8, 8)
    conv_act(image, conv, backend=backend)
    made = dict(conv._made)
    conv_act(image, conv, backend=backend)
    assert {key: id(value) for key, value in made.items()} == {key: id(value) for key, value in conv._made.items()}


def test_it_refuses_what_it_cannot_compute(backend):
    with pytest.raises(ValueError, match="expected scale and shift together"):
        FixedConv(torch.randn(4, 4, 3, 3), GEOMETRY, None, torch.ones(4))
    with pytest.raises(ValueError, match="neither a scale nor a pool beside a residual"):
        conv_act(torch.randn(1, 17, 4, 4), make(affine=True), torch.randn(1, 24, 4, 4))
    with pytest.raises(RuntimeError, match="got one that does"):
        conv_act(torch.randn(1, 17, 4, 4, requires_grad=True), make())
    with pytest.raises(RuntimeError, match="no kernel for float64"):
        conv_act(torch.randn(1, 17, 4, 4).double(), make(), backend=backend)
    transformed = torch.ops.dfs_engine.winograd_weight(torch.randn(24, 17, 3, 3))
    with pytest.raises(RuntimeError, match="expected what winograd_weight makes of a weight"):
        torch.ops.dfs_engine.winograd_conv_act(
            torch.randn(1, 64, 4, 4), transformed, 24, None, None, None, None, (1, 1), True, False, False
        )


@pytest.mark.parametrize(
    ("images", "channels", "size", "kernel"),
    [
        (64, 64, 32, "winograd"),
        (1, 64, 32, "winograd"),
        (1, 512, 4, "onednn"),
        (1, 64, 2, "onednn"),
        (4, 8, 32, "onednn"),
    ],
)
def test_what_is_picked(images, channels, size, kernel):
    if backends.unavailable_reason("cpp") is not None:
        pytest.skip(backends.unavailable_reason("cpp"))
    image, weight = torch.empty(images, channels, size, size), torch.Size((channels, channels, 3, 3))
    assert choice.conv_act_kernel(image, weight, GEOMETRY, False) == kernel
    with backends.use_backend(None):
        assert choice.conv_act_backend(image, None) == "cpp"
        assert choice.conv_act_backend(image, "aten") == choice.conv_act_backend(image.double(), None) == "aten"
    assert backends.unsupported_dtype("conv_act", "triton", torch.float32) == "it has no kernel of conv_act"
