"""The linear layer's kernels against float64: odd shapes, strides, tiles smaller and larger than the tensors."""

import pytest
import torch

from dfs_engine import ops, reference
from dfs_engine.kernels import config
from dfs_engine.kernels.config import Config
from dfs_engine.kernels.linear import linear_grad_input, linear_grad_weight
from dfs_engine.runtime import backend as backends
from dfs_engine.validate.tolerances import assert_close, gradient_scale

pytestmark = pytest.mark.usefixtures("poison")

SMALL = Config(16, 16, 16, 4, 1)
SHAPES = {  # leading sizes, in_features, out_features
    "matrix": ((37,), 65, 33),
    "tokens": ((2, 3, 5), 17, 3),
    "vector": ((), 6, 7),
    "one-feature": ((5,), 1, 1),
    "many-tiles": ((50,), 40, 70),
}
EMPTY = {"no-rows": ((0,), 6, 4), "no-outputs": ((3,), 6, 0), "no-features": ((3,), 0, 4)}


def make(shape: tuple, dtype: torch.dtype, device: str) -> tuple[torch.Tensor, ...]:
    leading, in_features, out_features = shape
    sizes = ((*leading, out_features), (*leading, in_features), (out_features, in_features))
    grad_output, input, weight = (torch.randn(size).to(device, dtype) for size in sizes)
    return grad_output, input, weight


def slices(features: int) -> list[tuple[int, int]]:
    half = features // 2
    return sorted(
        {
            (0, features),
            (0, half),
            (half, features),
            (half, half),
            (min(1, features), max(features - 1, min(1, features))),
        }
    )


def check(grad_output, input, weight) -> None:
    """All slices, and weight gradients with and without bias, against float64."""
    wide = grad_output.double()
    grad_input = wide @ weight.double()
    # What cancellation leaves of one channel is judged by the others.
    scale = gradient_scale([grad_input]) if grad_input.numel() else 0.0
    for start, stop in slices(weight.size(1)):
        actual = linear_grad_input(grad_output, weight, start, stop)
        assert actual.dtype == grad_output.dtype
        assert actual.is_contiguous()
        assert_close(f"grad_input [{start}, {stop})", actual, grad_input[..., start:stop], scale=scale)
    rows = wide.reshape(-1, wide.size(-1)) if wide.numel() else wide
    expected = rows.t() @ input.double().reshape(len(rows), -1) if input.numel() else torch.zeros(weight.shape)
    for bias, dtype in ((True, None), (False, None), (True, torch.float32)):
        grad_weight, grad_bias = linear_grad_weight(grad_output, input, bias, dtype)
        assert grad_weight.dtype == grad_bias.dtype == (dtype or grad_output.dtype)
        assert grad_weight.is_contiguous()
        assert_close("grad_weight", grad_weight, expected)
        assert_close("grad_bias", grad_bias, rows.sum(0) if bias else torch.zeros(0))


@pytest.fixture(params=["default", "small", "split"])
def configs(request):
    """The heuristic's tiles, which hold the whole test; tiles that need several; those with partial sums."""
    if request.param == "default":
        yield
        return
    split = 3 if request.param == "split" else 1
    with (
        config.forced("linear_grad_input", SMALL),
        config.forced("linear_grad_weight", SMALL._replace(split=split)),
    ):
        yield


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_float64_is_followed(shape, dtype, device, configs):
    check(*make(shape, dtype, device))


@pytest.mark.parametrize("shape", EMPTY.values(), ids=EMPTY)
def test_nothing_to_do(shape, device):
    check(*make(shape, torch.float32, device))


def transposed(tensor):
    return tensor.transpose(0, -1).contiguous().transpose(0, -1)


def strided(tensor):
    """Every other feature of a wider tensor that is NaN elsewhere."""
    wide = tensor.new_full((*tensor.shape[:-1], 2 * tensor.size(-1) + 1), float("nan"))
    return wide[..., 1::2].copy_(tensor)


def expanded(tensor):
    """One row for all."""
    return tensor[:1].expand(tensor.shape)


@pytest.mark.parametrize("layout", [transposed, strided, expanded], ids=lambda f: f.__name__)
@pytest.mark.parametrize("shape", ["matrix", "tokens"])
def test_any_strides(shape, layout, device):
    grad_output, input, weight = make(SHAPES[shape], torch.float32, device)
    check(layout(grad_output), layout(input), strided(transposed(weight)))
    check(grad_output.new_tensor(0.7).expand(grad_output.shape), layout(input), weight)


def test_the_order_of_sums_is_fixed(device):
    grad_output, input, weight = make(((200,), 17, 33), torch.float32, device)
    with config.forced("linear_grad_weight", SMALL._replace(split=5)):
        first = linear_grad_weight(grad_output, input, True)
        for _ in range(3 if device == "cpu" else 100):
            again = linear_grad_weight(grad_output, input, True)
            assert all(torch.equal(*pair) for pair in zip(first, again, strict=True))
    assert torch.equal(linear_grad_input(grad_output, weight, 2, 9), linear_grad_input(grad_output, weight, 2, 9))


def test_the_layer_runs_on_the_kernels(device, dtype):
    """Through autograd: the dispatcher's ops, registered for this device."""
    _, input, weight = make(((2, 9), 17, 5), dtype, device)
    bias = torch.randn(5).to(device, dtype)
    leaves = [tensor.requires_grad_() for tensor in (input, weight, bias)]
    output = ops.partitioned_linear(*leaves, start=4, stop=13, backend="triton")
    assert backends.last_used("partitioned_linear") == "triton"
    grad_output = torch.randn_like(output)
    wide = [leaf.detach().double().requires_grad_() for leaf in leaves]
    expected = reference.partitioned_linear(*wide, start=4, stop=13)
    assert_close("output", output, expected)
    actual = torch.autograd.grad(output, leaves, grad_output)
    for name, *pair in zip(
        ("input", "weight", "bias"), actual, torch.autograd.grad(expected, wide, grad_output.double()), strict=True
    ):
        assert_close(f"grad_{name}", *pair)
