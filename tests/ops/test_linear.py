"""partitioned_linear against the oracle, over shapes, dtypes, layouts. What both ops promise: test_contract.py."""

import pytest
import torch

from dfs_engine.ops import partitioned_linear
from dfs_engine.runtime import backend as backends

pytestmark = pytest.mark.usefixtures("poison")

# leading dims, in_features, out_features, bias
SHAPES = {
    "matrix": ((9,), 8, 5, True),
    "tokens": ((2, 3), 17, 4, False),
    "4-D": ((2, 1, 3), 65, 3, True),
    "vector": ((), 6, 7, True),
    "1-feature": ((4,), 1, 3, True),
    "1-row-1-output": ((1,), 3, 1, False),
    "empty-batch": ((0,), 6, 4, True),
    "empty-tokens": ((2, 0), 6, 4, False),
}
REFERENCE = pytest.mark.parametrize("reference", [True, False], ids=["reference", "no-reference"])


def make(shape: str, dtype: torch.dtype = torch.float64) -> dict:
    leading, in_features, out_features, bias = SHAPES[shape]
    return {
        "input": torch.randn(*leading, in_features, dtype=dtype),
        "weight": torch.randn(out_features, in_features, dtype=dtype),
        "bias": torch.randn(out_features, dtype=dtype) if bias else None,
    }


def slices(features: int) -> list[tuple[int, int]]:
    """Empty, full, both ends, interior, one feature."""
    half = features // 2
    found = {(0, 0), (half, half), (features, features), (0, features), (0, half), (half, features), (half, half + 1)}
    return sorted(found | {(min(1, features), max(features - 1, 1))})


@pytest.mark.parametrize("shape", SHAPES)
@REFERENCE
@pytest.mark.parametrize("form", ["plain", "full"])
def test_equals_the_oracle(shape, reference, form, backend, check, exact_dtype):
    features = SHAPES[shape][1]
    for start, stop in slices(features):
        tensors = make(shape, exact_dtype)
        if form == "full":
            tensors["full"] = tensors["input"]
            tensors["input"] = tensors["full"][..., start:stop].clone()
        results = check(partitioned_linear, tensors, start=start, stop=stop, reference=reference, backend=backend)
        assert backends.last_used("partitioned_linear").partition(":")[0] == backend
        outside = torch.ones(features, dtype=torch.bool)
        outside[start:stop] = False
        if form == "plain":
            assert not results["grad_input"][..., outside].any()
        if not reference:
            assert not results["grad_weight"][:, outside].any()


@pytest.mark.parametrize("shape", ["matrix", "tokens", "4-D"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@REFERENCE
def test_other_dtypes(shape, dtype, reference, backend, check):
    features = SHAPES[shape][1]
    for start, stop in ((0, features // 2), (features // 2, features), (1, 2)):
        check(partitioned_linear, make(shape, dtype), start=start, stop=stop, reference=reference, backend=backend)


def transposed(tensor):
    return tensor.transpose(0, -1).contiguous().transpose(0, -1)


def feature_slice(tensor):
    """The same values, as a view into a tensor of more features."""
    wide = torch.randn(*tensor.shape[:-1], tensor.size(-1) + 3, dtype=tensor.dtype)
    view = wide[..., 2:-1]
    view.copy_(tensor)
    return view


def every_other_row(tensor):
    return tensor.repeat_interleave(2, 0)[::2]


def expanded(tensor):
    """Stride 0 everywhere, as the gradient of `.sum()`."""
    return tensor.new_tensor(0.7).expand(tensor.shape)


def row_expanded(tensor):
    """One row for all, as the gradient of a sum over the batch."""
    return tensor[:1].expand(tensor.shape)


LAYOUTS = (transposed, feature_slice, every_other_row, row_expanded)


@pytest.mark.parametrize("shape", ["matrix", "tokens"])
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("grad_layout", [*LAYOUTS, expanded], ids=lambda f: "grad-" + f.__name__)
def test_any_strides(shape, layout, grad_layout, backend, check, evaluate, exact_dtype):
    tensors = make(shape, exact_dtype)
    start, stop = 2, 5
    options = {"start": start, "stop": stop, "backend": backend}
    output = evaluate(partitioned_linear, tensors, **options)["output"]
    grad_output = grad_layout(torch.randn_like(output))
    tensors = {**tensors, "input": layout(tensors["input"]), "weight": transposed(tensors["weight"])}
    check(partitioned_linear, tensors, grad_output, **options)
    check(partitioned_linear, tensors, grad_output, reference=False, **options)
    feature = {**tensors, "full": tensors["input"], "input": tensors["input"][..., start:stop]}
    check(partitioned_linear, feature, grad_output, **options)


OPS = torch.ops.dfs_engine


def opcheck(op, arguments: tuple) -> None:
    """Of the overload that picks its kernel, and of the one that is told."""
    torch.library.opcheck(op.default, arguments)
    torch.library.opcheck(op.kernel, arguments, {"kernel": "aten"})


@pytest.mark.parametrize(
    ("leading", "dtype"),
    [
        ((5,), torch.float32),
        ((2, 3), torch.float32),
        ((2, 3), torch.bfloat16),
        ((0,), torch.float32),
        ((), torch.float64),
    ],
    ids=str,
)
def test_opcheck(leading, dtype):
    if backends.unavailable_reason("cpp") is not None:
        pytest.skip(backends.unavailable_reason("cpp"))
    input, grad_output = torch.randn(*leading, 6, dtype=dtype), torch.randn(*leading, 4, dtype=dtype)
    weight, bias = torch.randn(4, 6, dtype=dtype), torch.randn(4, dtype=dtype)
    for given in (bias, None):
        opcheck(OPS.linear, (input, weight, given))
        for result in ((), (torch.float32,)):
            opcheck(OPS.linear_grad_weight, (grad_output, input, given is not None, *result))
    for start, stop in ((0, 6), (1, 4), (3, 3)):
        opcheck(OPS.linear_grad_input, (grad_output, weight, start, stop))


def test_flops_are_those_of_the_slice():
    from torch.utils.flop_counter import FlopCounterMode

    input, weight = torch.randn(7, 8, requires_grad=True), torch.randn(6, 8, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        partitioned_linear(input, weight, start=0, stop=2).sum().backward()
    full = 2 * 7 * 6 * 8
    assert counter.get_total_flops() == full + full + full // 4


BAD = {
    "slice-reversed": (
        {"start": 3, "stop": 2},
        ValueError,
        r"expected 0 <= start <= stop <= in_features=4, got start=3, stop=2",
    ),
    "slice-too-wide": ({"start": 0, "stop": 5}, ValueError, r"in_features=4, got start=0, stop=5"),
    "slice-float": ({"start": 0, "stop": 2.0}, TypeError, r"expected an integer, got stop=2\.0"),
    "features": ({"input": torch.randn(2, 5)}, ValueError, r"got input \(2, 5\) and weight \(3, 4\)"),
    "scalar": ({"input": torch.tensor(1.0)}, ValueError, r"got input \(\) and weight"),
    "weight-dims": ({"weight": torch.randn(4)}, ValueError, r"weight \(4,\)"),
    "live-width": ({"full": torch.randn(2, 4)}, ValueError, r"live part of full, of shape \(2, 2\), got .* \(2, 4\)"),
    "full-features": ({"full": torch.randn(2, 5)}, ValueError, r"got full \(2, 5\) and weight"),
}


@pytest.mark.parametrize(("arguments", "error", "message"), BAD.values(), ids=BAD)
@REFERENCE
def test_bad_arguments(arguments, error, message, reference, backend):
    good = {"input": torch.randn(2, 4), "weight": torch.randn(3, 4), "start": 0, "stop": 2}
    with pytest.raises(error, match=f"^partitioned_linear: .*{message}"):
        partitioned_linear(**{**good, **arguments}, reference=reference, backend=backend)
