"""partitioned_conv2d against the oracle, over geometries, dtypes, layouts. What both ops promise: test_contract.py."""

from typing import Any, NamedTuple

import pytest
import torch

from dfs_engine.ops import _common, partitioned_conv2d
from dfs_engine.runtime import backend as backends
from dfs_engine.validate.tolerances import assert_close

pytestmark = pytest.mark.usefixtures("poison")


class Case(NamedTuple):
    """A geometry. Sizes are odd on purpose; `kernel` and `size` are (height, width)."""

    label: str
    in_channels: int
    out_channels: int
    size: tuple[int, int] = (7, 6)
    kernel: tuple[int, int] = (3, 3)
    batch: int = 2
    bias: bool = True
    options: dict[str, Any] = {}  # noqa: RUF012  a NamedTuple's default, never written to

    def tensors(self, dtype: torch.dtype) -> dict[str, Any]:
        groups = self.options.get("groups", 1)
        return {
            "input": torch.randn(self.batch, self.in_channels, *self.size, dtype=dtype),
            "weight": torch.randn(self.out_channels, self.in_channels // groups, *self.kernel, dtype=dtype),
            "bias": torch.randn(self.out_channels, dtype=dtype) if self.bias else None,
        }


CASES = (
    Case("3x3", 8, 5, options={"padding": 1}),
    Case("no-padding", 17, 3, bias=False),
    Case("stride2", 3, 17, (9, 11), options={"stride": 2, "padding": 1}),
    Case("1x1-stride2", 6, 4, kernel=(1, 1), options={"stride": 2}),
    Case("dilation", 5, 4, (9, 8), options={"dilation": 2, "padding": (2, 1)}),
    Case("5x2-uneven", 4, 3, (8, 9), (5, 2), options={"stride": (2, 1), "padding": (2, 0)}),
    Case("kernel=image", 4, 65, (3, 3), batch=1),
    Case("65-channels", 65, 9, (5, 5), bias=False, options={"padding": 1}),
    Case("1-channel", 1, 8, options={"padding": 1}),
    Case("groups3", 12, 6, options={"groups": 3, "padding": 1}),
    Case(
        "groups2-dilation-stride",
        8,
        6,
        (11, 9),
        bias=False,
        options={"groups": 2, "dilation": 2, "stride": 2, "padding": 2},
    ),
    Case("depthwise", 9, 9, options={"groups": 9, "stride": 2, "padding": 1}),
    Case("depthwise-multiplier", 6, 12, options={"groups": 6}),
    Case("empty-batch", 6, 4, batch=0, options={"padding": 1}),
    Case("empty-batch-groups", 6, 4, batch=0, bias=False, options={"groups": 2}),
)
by_label = {case.label: case for case in CASES}


def cases(*labels: str):
    chosen = [by_label[label] for label in labels] or CASES
    return pytest.mark.parametrize("case", chosen, ids=lambda case: case.label)


def slices(channels: int) -> list[tuple[int, int]]:
    """Empty, full, both ends, interior, one channel; with groups, some of them cut into a group."""
    half = channels // 2
    found = {(0, 0), (half, half), (channels, channels), (0, channels), (0, half), (half, channels), (half, half + 1)}
    found.add((min(1, channels), max(channels - 1, 1)))
    return sorted(found)


@cases()
@pytest.mark.parametrize("reference", [True, False], ids=["reference", "no-reference"])
@pytest.mark.parametrize("form", ["plain", "full"])
def test_equals_the_oracle(case, reference, form, backend, check, exact_dtype):
    for start, stop in slices(case.in_channels):
        tensors = case.tensors(exact_dtype)
        if form == "full":
            tensors["full"] = tensors["input"]
            tensors["input"] = tensors["full"][:, start:stop].clone()
        options = {"start": start, "stop": stop, "reference": reference, "backend": backend, **case.options}
        results = check(partitioned_conv2d, tensors, **options)
        assert backends.last_used("partitioned_conv2d").partition(":")[0] == backend
        outside = torch.ones(case.in_channels, dtype=torch.bool)
        outside[start:stop] = False
        if form == "plain":
            assert results["grad_input"] is None or not results["grad_input"][:, outside].any()
        if not reference:
            groups = case.options.get("groups", 1)
            columns = outside.view(groups, 1, -1).expand(-1, case.out_channels // groups, -1).flatten(0, 1)
            assert not results["grad_weight"][columns].any()


@cases("3x3", "stride2", "65-channels", "groups3", "depthwise")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("reference", [True, False], ids=["reference", "no-reference"])
def test_other_dtypes(case, dtype, reference, backend, check):
    middle = case.in_channels // 2
    for start, stop in {(0, middle), (middle, case.in_channels), (1, middle + 1)}:
        check(
            partitioned_conv2d,
            case.tensors(dtype),
            start=start,
            stop=stop,
            reference=reference,
            backend=backend,
            **case.options,
        )


def channels_last(tensor):
    return tensor.contiguous(memory_format=torch.channels_last)


def channel_slice(tensor):
    """The same values, as a view into a tensor of more channels."""
    wide = torch.randn(tensor.size(0), tensor.size(1) + 3, *tensor.shape[2:], dtype=tensor.dtype)
    view = wide[:, 2:-1]
    view.copy_(tensor)
    return view


def channels_last_slice(tensor):
    wide = channels_last(torch.randn(tensor.size(0), tensor.size(1) + 3, *tensor.shape[2:], dtype=tensor.dtype))
    view = wide[:, 2:-1]
    view.copy_(tensor)
    return view


def transposed(tensor):
    return tensor.transpose(2, 3).contiguous().transpose(2, 3)


def expanded(tensor):
    """Stride 0 everywhere, as the gradient of `.sum()`."""
    return tensor.new_tensor(0.7).expand(tensor.shape)


def pixel_expanded(tensor):
    """Stride 0 over the pixels, as the gradient of a global average pool."""
    return tensor[:, :, :1, :1].expand(tensor.shape)


LAYOUTS = (channels_last, channel_slice, channels_last_slice, transposed)


@cases("3x3", "stride2", "groups3", "depthwise")
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("grad_layout", [*LAYOUTS, expanded, pixel_expanded], ids=lambda f: "grad-" + f.__name__)
def test_any_strides(case, layout, grad_layout, backend, check, evaluate, exact_dtype):
    tensors = case.tensors(exact_dtype)
    start, stop = 1, case.in_channels - 1
    options = {"start": start, "stop": stop, "backend": backend, **case.options}
    output = evaluate(partitioned_conv2d, tensors, **options)["output"]
    grad_output = grad_layout(torch.randn_like(output))
    tensors = {**tensors, "input": layout(tensors["input"]), "weight": channels_last(tensors["weight"])}
    check(partitioned_conv2d, tensors, grad_output, **options)
    check(partitioned_conv2d, tensors, grad_output, reference=False, **options)
    feature = {**tensors, "full": tensors["input"], "input": tensors["input"][:, start:stop]}
    check(partitioned_conv2d, feature, grad_output, **options)


@pytest.mark.parametrize("size", [1, 2, 8, 9])
@pytest.mark.parametrize("in_channels", [2, 5, 7, 8])
def test_few_channels_through_a_strided_1x1(in_channels, size, backend, check):
    """oneDNN's weight gradient is wrong there on AVX2, in channels_last (uxlfoundation/oneDNN#6035)."""
    tensors = {
        "input": channels_last(torch.randn(16, in_channels, size, size)),
        "weight": torch.randn(12, in_channels, 1, 1),
        "bias": torch.randn(12),
    }
    grad_output = channels_last(torch.randn(16, 12, (size + 1) // 2, (size + 1) // 2))
    check(partitioned_conv2d, tensors, grad_output, start=1, stop=in_channels, stride=2, backend=backend)
    assert backends.last_used("partitioned_conv2d").partition(":")[0] == backend


def test_channels_last_comes_back_channels_last(backend, evaluate):
    tensors = by_label["3x3"].tensors(torch.float32)
    tensors["input"] = channels_last(tensors["input"])
    results = evaluate(partitioned_conv2d, tensors, start=2, stop=6, padding=1, backend=backend)
    assert results["output"].is_contiguous(memory_format=torch.channels_last)
    assert results["grad_input"].is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("reference", [True, False], ids=["reference", "no-reference"])
@pytest.mark.parametrize("form", ["plain", "full"])
def test_unbatched(reference, form, backend, check, exact_dtype):
    tensors = by_label["3x3"].tensors(exact_dtype)
    tensors["input"] = tensors["input"][0]
    if form == "full":
        tensors["full"] = tensors["input"]
        tensors["input"] = tensors["full"][2:5]
    results = check(partitioned_conv2d, tensors, start=2, stop=5, padding=1, reference=reference, backend=backend)
    assert results["output"].dim() == 3


OPS = torch.ops.dfs_engine
GEOMETRIES = (
    ((1, 1), (1, 1), (1, 1), 1),
    ((2, 1), (1, 0), (1, 2), 1),
    ((1, 1), (1, 1), (1, 1), 2),
    ((2, 2), (1, 1), (1, 1), 4),
)


def opcheck(op, arguments: tuple) -> None:
    """Of the overload that picks its kernel, and of the one that is told."""
    torch.library.opcheck(op.default, arguments)
    torch.library.opcheck(op.kernel, arguments, {"kernel": "aten"})


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
@pytest.mark.parametrize(
    ("layout", "dtype"),
    [(torch.clone, torch.float32), (channels_last, torch.bfloat16)],
    ids=["nchw-fp32", "channels_last-bf16"],
)
def test_opcheck(geometry, layout, dtype):
    if backends.unavailable_reason("cpp") is not None:
        pytest.skip(backends.unavailable_reason("cpp"))
    input = layout(torch.randn(2, 4, 7, 6, dtype=dtype))
    weight = torch.randn(8, 4 // geometry[-1], 3, 3, dtype=dtype)
    output = OPS.conv2d(input, weight, None, *geometry)
    grad_output = layout(torch.randn_like(output))
    for bias in (None, torch.randn(8, dtype=dtype)):
        opcheck(OPS.conv2d, (input, weight, bias, *geometry))
        sizes = (grad_output, input, weight.shape, *geometry, bias is not None)
        for result in ((), (True, torch.float32), (False, torch.bfloat16)):
            opcheck(OPS.conv2d_grad_weight, (*sizes, *result))
    for start, stop in ((0, 4), (1, 3), (2, 2)):
        is_last = layout is channels_last
        opcheck(OPS.conv2d_grad_input, (grad_output, weight, input.shape, *geometry, start, stop, is_last))


@pytest.mark.parametrize("op", ["conv2d_grad_input", "conv2d_grad_weight"])
def test_flops_are_those_of_the_slice(op):
    from torch.utils.flop_counter import FlopCounterMode

    input, weight = torch.randn(2, 8, 5, 5, requires_grad=True), torch.randn(6, 8, 3, 3, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        partitioned_conv2d(input, weight, padding=1, start=0, stop=2).sum().backward()
    # Both gradients cost one convolution; grad_input's is a quarter of it.
    full = 2 * 2 * 6 * 5 * 5 * 8 * 9
    assert counter.get_total_flops() == full + full + full // 4


BAD = {
    "slice-reversed": (
        {"start": 3, "stop": 2},
        ValueError,
        r"expected 0 <= start <= stop <= in_channels=4, got start=3, stop=2",
    ),
    "slice-too-wide": ({"start": 0, "stop": 5}, ValueError, r"in_channels=4, got start=0, stop=5"),
    "slice-negative": ({"start": -1, "stop": 2}, ValueError, r"got start=-1, stop=2"),
    "slice-float": ({"start": 0.0, "stop": 2}, TypeError, r"expected an integer, got start=0\.0"),
    "slice-bool": ({"start": 0, "stop": True}, TypeError, r"expected an integer, got stop=True"),
    "channels": (
        {"input": torch.randn(1, 5, 4, 4)},
        ValueError,
        r"got input \(1, 5, 4, 4\), weight \(2, 4, 3, 3\), groups=1",
    ),
    "groups": ({"groups": 2}, ValueError, r"groups=2"),
    "dims": ({"input": torch.randn(4, 4)}, ValueError, r"expected input \(N, in_channels, H, W\)"),
    "weight-dims": ({"weight": torch.randn(2, 4)}, ValueError, r"weight \(2, 4\)"),
    "stride": ({"stride": (1, 1, 1)}, ValueError, r"expected an integer or two, got stride=\(1, 1, 1\)"),
    "padding-text": ({"padding": "same"}, ValueError, r"expected an integer or two, got padding='same'"),
    "live-width": (
        {"full": torch.randn(1, 4, 4, 4)},
        ValueError,
        r"live part of full, of shape \(1, 2, 4, 4\), got .* \(1, 4, 4, 4\)",
    ),
}


@pytest.mark.parametrize(("arguments", "error", "message"), BAD.values(), ids=BAD)
@pytest.mark.parametrize("reference", [True, False], ids=["reference", "no-reference"])
def test_bad_arguments(arguments, error, message, reference, backend):
    good = {"input": torch.randn(1, 4, 4, 4), "weight": torch.randn(2, 4, 3, 3), "start": 0, "stop": 2}
    with pytest.raises(error, match=f"^partitioned_conv2d: .*{message}"):
        partitioned_conv2d(**{**good, **arguments}, reference=reference, backend=backend)


def test_a_depthwise_slice_costs_its_own_groups_only(monkeypatch):
    """Of 8 groups the slice touches 2: the backend is asked for those two."""
    seen = []
    aten = _common.ATEN["conv2d_grad_input"]
    monkeypatch.setitem(_common.ATEN, "conv2d_grad_input", lambda *args: seen.append(args[6]) or aten(*args))
    input = torch.randn(1, 16, 5, 5, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(8, 2, 3, 3, dtype=torch.float64)
    output = partitioned_conv2d(input, weight, groups=8, start=3, stop=5, backend="aten")
    (grad,) = torch.autograd.grad(output.square().sum(), input)
    assert seen == [2]
    (stock,) = torch.autograd.grad(torch.nn.functional.conv2d(input, weight, groups=8).square().sum(), input)
    assert_close("grad_input", grad[:, 3:5], stock[:, 3:5])


def test_a_slice_of_one_channel_in_channels_last(backend, exact_dtype, check):
    """Stock convolves it wrongly (torch 2.15, AVX-512)."""
    tensors = {
        "input": channels_last(torch.randn(3, 8, 3, 5, dtype=exact_dtype)),
        "weight": channels_last(torch.randn(2, 8, 3, 5, dtype=exact_dtype)),
        "bias": None,
    }
    options = {"stride": (1, 3), "padding": 1, "start": 5, "stop": 6, "reference": False}
    check(partitioned_conv2d, tensors, **options, backend=backend)
