"""Triton's conv2d gradients against stock PyTorch in float64, over geometries, slices, layouts and partial sums."""

import contextlib
import random
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dfs_engine.kernels import config
from dfs_engine.kernels.config import Config
from dfs_engine.validate.tolerances import assert_close

pytest.importorskip("triton")

from dfs_engine.kernels import conv2d as op
from dfs_engine.kernels import conv2d_splits

pytestmark = pytest.mark.usefixtures("poison")


class Case(NamedTuple):
    """A geometry. Sizes are odd on purpose; pairs are (height, width)."""

    label: str
    in_channels: int
    out_channels: int
    size: tuple[int, int] = (7, 5)
    kernel: tuple[int, int] = (3, 3)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (1, 1)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    batch: int = 2

    @property
    def geometry(self) -> tuple:
        return self.stride, self.padding, self.dilation, self.groups

    @property
    def weight_size(self) -> tuple[int, ...]:
        return self.out_channels, self.in_channels // self.groups, *self.kernel

    def tensors(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """(grad_output, input, weight), channels_last, on the CPU."""
        input = torch.randn(self.batch, self.in_channels, *self.size, dtype=dtype)
        weight = torch.randn(self.weight_size, dtype=dtype)
        output = F.conv2d(input.float(), weight.float(), None, *self.geometry)
        return channels_last(torch.randn_like(output).to(dtype)), channels_last(input), channels_last(weight)


def channels_last(tensor: Tensor) -> Tensor:
    return tensor.contiguous(memory_format=torch.channels_last)


CASES = (
    Case("3x3", 8, 5),
    Case("1x1", 33, 17, kernel=(1, 1), padding=(0, 0)),
    Case("5x3", 3, 17, kernel=(5, 3), padding=(2, 0)),
    Case("2x2-no-padding", 17, 3, kernel=(2, 2), padding=(0, 0)),
    Case("1-channel", 1, 33),
    Case("1-output", 17, 1),
    Case("kernel=image", 17, 3, (3, 5), (3, 5), padding=(0, 0)),
    Case("padding>kernel", 3, 4, padding=(4, 3)),
    Case("stride2", 17, 3, stride=(2, 2)),
    Case("stride2-even", 4, 5, (8, 6), stride=(2, 2), padding=(0, 1)),
    Case("stride2x1-5x3", 8, 4, kernel=(5, 3), stride=(2, 1), padding=(1, 2)),
    Case("stride2-1x1", 8, 4, kernel=(1, 1), stride=(2, 2), padding=(0, 0)),
    Case("stride3-2x2", 5, 4, (8, 7), (2, 2), stride=(3, 3), padding=(1, 0)),
    Case("stride3-dilation2", 3, 4, (11, 9), stride=(3, 2), padding=(2, 3), dilation=(2, 1)),
    Case("dilation2", 5, 4, (9, 8), padding=(2, 1), dilation=(2, 2)),
    Case("stride2-dilation2", 5, 4, (9, 8), stride=(2, 2), padding=(1, 2), dilation=(2, 2)),
    Case("stride4-dilation6", 3, 4, (17, 15), stride=(4, 4), padding=(3, 6), dilation=(6, 2)),
    Case("groups2", 18, 6, groups=2),
    Case("groups2-stride2", 6, 4, stride=(2, 2), groups=2),
    Case("groups3-1x1", 9, 6, kernel=(1, 1), padding=(0, 0), groups=3),
    Case("depthwise", 33, 33, groups=33),
    Case("depthwise-stride2", 9, 9, stride=(2, 2), groups=9),
    Case("depthwise-multiplier", 6, 12, kernel=(3, 2), dilation=(1, 2), groups=6),
    Case("1-image", 3, 4, batch=1),
)
by_label = {case.label: case for case in CASES}


def cases(*labels: str):
    chosen = [by_label[label] for label in labels] or CASES
    return pytest.mark.parametrize("case", chosen, ids=lambda case: case.label)


@contextlib.contextmanager
def small_blocks(split: int = 1):
    """Tiles that even these tensors need several of."""
    with (
        config.forced("conv2d_grad_input", Config(32, 16, 16, 4, 2)),
        config.forced("conv2d_grad_weight", Config(16, 32, 16, 4, 2, split)),
    ):
        yield


def expected(case: Case, grad_output: Tensor, input: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """grad_input, grad_weight and grad_bias in float64, from the same rounded numbers."""
    stride, padding, dilation, groups = case.geometry
    return torch.ops.aten.convolution_backward(
        grad_output.double(), input.double(), weight.double(), [case.out_channels],
        stride, padding, dilation, False, [0, 0], groups, [True, True, True],
    )  # fmt: skip


def slices(channels: int) -> list[tuple[int, int]]:
    """The whole, one part of a feature at several beta, and ends that are no multiple of anything."""
    least, half, most = (round(beta * channels) for beta in (0.1, 0.5, 0.9))
    return sorted(
        {(0, channels), (0, least), (0, half), (half, channels), (most, channels), (min(3, half), min(8, channels))}
    )


def check_grad_input(case, grad_output, weight, start, stop, channels_last, device, reference) -> None:
    size = (case.batch, case.in_channels, *case.size)
    actual = op.conv2d_grad_input(
        grad_output.to(device), weight.to(device), size, *case.geometry, start, stop, channels_last
    )
    form = torch.channels_last if channels_last else torch.contiguous_format
    assert actual.dtype == grad_output.dtype
    assert actual.stride() == torch.empty(actual.shape, memory_format=form).stride()
    assert_close(f"grad_input[{start}:{stop}]", actual, reference[:, start:stop])


def check_grad_weight(case, grad_output, input, bias, device, reference_weight, reference_bias, *result) -> None:
    """`result`: layout and dtype that are asked for."""
    grad_weight, grad_bias = op.conv2d_grad_weight(
        grad_output.to(device), input.to(device), case.weight_size, *case.geometry, bias, *result
    )
    is_last, dtype = result or (False, None)
    assert grad_weight.dtype == grad_bias.dtype == (dtype or grad_output.dtype)
    form = torch.channels_last if is_last else torch.contiguous_format
    assert grad_weight.stride() == torch.empty(grad_weight.shape, memory_format=form).stride()
    assert_close("grad_weight", grad_weight, reference_weight)
    # Of one channel with few pixels the sum may nearly cancel.
    scale = 0.1 * grad_output.abs().max().item() if grad_output.numel() else 0.0
    assert_close("grad_bias", grad_bias, reference_bias if bias else torch.empty(0), scale=scale)


@cases()
def test_grad_input_on_every_slice(case, device):
    grad_output, input, weight = case.tensors(torch.float32)
    reference, _, _ = expected(case, grad_output, input, weight)
    with small_blocks():
        for start, stop in slices(case.in_channels):
            is_last = random.random() < 0.5
            check_grad_input(case, grad_output, weight, start, stop, is_last, device, reference)


@cases()
@pytest.mark.parametrize("split", [1, 3])
def test_grad_weight(case, split, device):
    grad_output, input, weight = case.tensors(torch.float32)
    _, *reference = expected(case, grad_output, input, weight)
    with small_blocks(split):
        check_grad_weight(case, grad_output, input, split == 3, device, *reference)


@cases("3x3", "1x1", "stride2", "groups2", "depthwise-multiplier")
def test_dtypes_and_heuristic_blocks(case, dtype, device):
    grad_output, input, weight = case.tensors(dtype)
    reference, *parameters = expected(case, grad_output, input, weight)
    middle = case.in_channels // 2
    check_grad_input(case, grad_output, weight, 0, middle, True, device, reference)
    check_grad_input(case, grad_output, weight, middle, case.in_channels, False, device, reference)
    check_grad_weight(case, grad_output, input, True, device, *parameters)


@cases("3x3", "1x1", "5x3", "1-channel", "groups2-stride2", "depthwise-multiplier")
@pytest.mark.parametrize("split", [1, 3])
@pytest.mark.parametrize("is_last", [True, False], ids=["channels_last", "contiguous"])
def test_grad_weight_of_another_layout_and_dtype(case, split, is_last, device):
    """In float32 the sums are not rounded to the operands' dtype on the way."""
    grad_output, input, weight = case.tensors(torch.float16)
    _, *reference = expected(case, grad_output, input, weight)
    with small_blocks(split):
        for dtype in (torch.float32, None):
            check_grad_weight(case, grad_output, input, True, device, *reference, is_last, dtype)


def contiguous(tensor: Tensor) -> Tensor:
    return tensor.contiguous()


def inside(tensor: Tensor) -> Tensor:
    """The same values as a view of a larger channels_last tensor, NaN around it."""
    num_images, channels, height, width = tensor.shape
    wide = channels_last(torch.full((num_images, channels + 3, height + 2, width + 1), torch.nan, dtype=tensor.dtype))
    view = wide[:, 2:-1, 1:-1, 1:]
    view.copy_(tensor)
    return view


def transposed(tensor: Tensor) -> Tensor:
    return tensor.transpose(2, 3).contiguous().transpose(2, 3)


def expanded(tensor: Tensor) -> Tensor:
    """Stride 0 everywhere, as the gradient of `.sum()`."""
    return tensor[:1, :1, :1, :1].expand(tensor.shape)


def pixel_expanded(tensor: Tensor) -> Tensor:
    """Stride 0 over the pixels, as the gradient of a global average pool."""
    return tensor[:, :, :1, :1].expand(tensor.shape)


@cases("stride2x1-5x3", "groups2-stride2", "depthwise-stride2")
@pytest.mark.parametrize("layout", [contiguous, inside, transposed], ids=lambda f: f.__name__)
@pytest.mark.parametrize(
    "grad_layout", [contiguous, inside, transposed, expanded, pixel_expanded], ids=lambda f: f.__name__
)
def test_any_strides(case, layout, grad_layout, device):
    grad_output, input, weight = case.tensors(torch.float32)
    # Moved before they are viewed: `to` would make them dense.
    grad_output, input, weight = (tensor.to(device) for tensor in (grad_output, input, weight))
    grad_output, input, weight = grad_layout(grad_output), layout(input), layout(weight)
    reference, *parameters = expected(case, grad_output.cpu(), input.cpu(), weight.cpu())
    with small_blocks(split=2):
        check_grad_input(case, grad_output, weight, 1, case.in_channels - 1, True, device, reference)
        check_grad_weight(case, grad_output, input, True, device, *parameters)


@cases("3x3", "stride2", "groups2", "depthwise")
def test_runs_repeat_bitwise(case, device):
    grad_output, input, weight = (tensor.to(device) for tensor in case.tensors(torch.float32))
    size = (case.batch, case.in_channels, *case.size)
    with small_blocks(split=3):
        first, again = (
            (
                op.conv2d_grad_input(grad_output, weight, size, *case.geometry, 1, case.in_channels, True),
                *op.conv2d_grad_weight(grad_output, input, case.weight_size, *case.geometry, True),
            )
            for _ in range(2)
        )
    assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))


def test_more_parts_than_pixels(device):
    case = Case("few-pixels", 3, 4, (2, 3), batch=1)
    grad_output, input, weight = case.tensors(torch.float32)
    _, *reference = expected(case, grad_output, input, weight)
    with small_blocks(split=5):
        check_grad_weight(case, grad_output, input, True, device, *reference)


def test_depthwise_in_several_parts(device, monkeypatch):
    from dfs_engine.kernels import conv2d_depthwise

    monkeypatch.setattr(conv2d_depthwise, "_PIXELS_PER_SPLIT", 16)
    case = by_label["depthwise-multiplier"]
    grad_output, input, weight = case.tensors(torch.float32)
    _, *reference = expected(case, grad_output, input, weight)
    check_grad_weight(case, grad_output, input, True, device, *reference)


@cases("3x3", "groups2", "depthwise")
def test_nothing_to_do(case, device):
    grad_output, input, weight = (tensor.to(device) for tensor in case.tensors(torch.float32))
    size = (case.batch, case.in_channels, *case.size)
    assert op.conv2d_grad_input(grad_output, weight, size, *case.geometry, 2, 2, True).shape == (2, 0, *case.size)
    empty = op.conv2d_grad_input(grad_output[:0], weight, (0, *size[1:]), *case.geometry, 0, 2, True)
    assert empty.shape == (0, 2, *case.size)
    grad_weight, grad_bias = op.conv2d_grad_weight(
        grad_output[:0], input[:0], case.weight_size, *case.geometry, True, True, torch.float16
    )
    assert grad_weight.shape == case.weight_size
    assert grad_weight.is_contiguous(memory_format=torch.channels_last)
    assert grad_weight.dtype == grad_bias.dtype == torch.float16
    assert not grad_weight.any()
    assert grad_bias.shape == (case.out_channels,)
    assert not grad_bias.any()


@cases("3x3", "padding>kernel", "depthwise")
@pytest.mark.parametrize("where", ["beyond", "just-below"])
def test_offsets_beyond_32_bits(case, where, device):
    """The second image begins there, or ends there: what pads it lies beyond. Between the two nothing is touched."""
    torch.use_deterministic_algorithms(False)  # nor is it to be filled with NaN

    def far(tensor: Tensor) -> Tensor:
        length = tensor[0].numel()
        distance = 2**31 - (length if where == "just-below" else 0)
        storage = torch.empty(distance + length, dtype=tensor.dtype, device=device)
        view = storage.as_strided(tensor.shape, (distance, *tensor.stride()[1:]))
        return view.copy_(tensor)

    grad_output, input, weight = case.tensors(torch.float16)
    reference, *parameters = expected(case, grad_output, input, weight)
    grad_output = far(grad_output)
    with small_blocks(split=2):
        check_grad_input(case, grad_output, weight, 1, 3, True, device, reference)
        check_grad_weight(case, grad_output, far(input), True, device, *parameters)


def test_division_by_multiplication():
    for divisor in [1, 2, 3, 7, 224, 2**16, 2**31 - 1, *(random.randrange(1, 2**31) for _ in range(50))]:
        factor, digits = conv2d_splits._reciprocal(divisor)
        assert factor < 2**32
        assert digits < 32
        last = (2**31 - 1) // divisor * divisor
        for dividend in [0, 1, divisor - 1, divisor, last - 1, last, 2**31 - 1, random.randrange(2**31)]:
            assert 2 * dividend * factor >> 32 + digits == dividend // divisor


def test_kernel_too_large_for_a_bit_per_row(device):
    case = Case("33x1", 2, 3, (33, 2), (33, 1), padding=(1, 0))
    grad_output, _, weight = (tensor.to(device) for tensor in case.tensors(torch.float32))
    with pytest.raises(config.NoConfigFits, match=r"\(33, 1\)"):
        op.conv2d_grad_input(grad_output, weight, (2, 2, 33, 2), *case.geometry, 0, 1, True)


def test_too_many_pixels_to_count():
    with pytest.raises(config.NoConfigFits, match="2147483648 pixels"):
        conv2d_splits.check_pixels("conv2d_grad_input", 2**31)
