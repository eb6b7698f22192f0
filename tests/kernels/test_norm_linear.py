"""The kernels of LayerNorm and linear against float64: odd shapes, strides, tiles larger and smaller than tensors."""

import pytest
import torch
import torch.nn.functional as F

from dfs_engine import ops, reference
from dfs_engine.kernels import config
from dfs_engine.kernels.config import Config
from dfs_engine.kernels.norm_linear import norm_linear_grad_input, norm_linear_grad_weight
from dfs_engine.runtime import backend as backends
from dfs_engine.validate.tolerances import TOLERANCES, assert_close, gradient_scale

pytestmark = pytest.mark.usefixtures("poison")

SMALL = Config(16, 16, 16, 4, 1)
# leading sizes, channels, out_features, tensors that are not given
SHAPES = {
    "matrix": ((37,), 65, 33, ()),
    "tokens": ((2, 3, 5), 17, 3, ("norm_bias", "bias")),
    "vector": ((), 17, 7, ("norm_weight",)),
    "several-columns": ((50,), 140, 135, ("norm_weight", "norm_bias", "bias")),
}
ORDER = ("grad_output", "output", "input", "mean", "rstd", "norm_weight", "norm_bias", "weight", "bias")
AFFINE = ("norm_weight", "norm_bias", "weight", "bias")


def make(shape: str, dtype: torch.dtype, device: str, wide: bool = False) -> dict:
    """Arguments by name; with `wide` the normalisation's are float32, as under autocast."""
    leading, channels, out_features, missing = SHAPES[shape]
    normed = torch.float32 if wide else dtype
    kinds = {
        "input": ((*leading, channels), normed),
        "norm_weight": ((channels,), normed),
        "norm_bias": ((channels,), normed),
        "weight": ((out_features, channels), dtype),
        "bias": ((out_features,), dtype),
        "grad_output": ((*leading, out_features), dtype),
    }
    tensors = {name: torch.randn(size).to(device, kind) for name, (size, kind) in kinds.items()}
    tensors = {name: None if name in missing else tensor for name, tensor in tensors.items()}
    gain, shift = (None if tensors[name] is None else tensors[name].float() for name in AFFINE[:2])
    normalized, mean, rstd = torch.native_layer_norm(tensors["input"].float(), (channels,), gain, shift, 1e-5)
    output = F.linear(normalized.to(dtype), tensors["weight"], tensors["bias"])
    return {**tensors, "output": output, "mean": mean, "rstd": rstd}


def stock(tensors: dict) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """In float64 from the same rounded numbers: the input's whole gradient, grad_output^T x_hat, grad_output's sums."""
    exact = {name: None if tensor is None else tensor.double() for name, tensor in tensors.items()}
    input = exact["input"].requires_grad_()
    channels = input.shape[-1:]
    normalized = F.layer_norm(input, channels, exact["norm_weight"], exact["norm_bias"])
    output = F.linear(normalized, exact["weight"], exact["bias"])
    (grad_input,) = torch.autograd.grad(output, input, exact["grad_output"])
    rows = exact["grad_output"].reshape(-1, output.size(-1))
    return grad_input, rows.t() @ F.layer_norm(input, channels).detach().reshape(-1, *channels), rows.sum(0)


def check(tensors: dict) -> None:
    """Several slices, and the weight's, against float64."""
    grad_input, product, sums = stock(tensors)
    # However wide a result is, the linear's dtype is what it was computed from.
    tolerance = TOLERANCES[tensors["weight"].dtype]
    channels = tensors["input"].size(-1)
    half = channels // 2
    # What cancellation leaves of one channel is judged by the others. In half precision by the largest of them: the
    # output that m2 is taken from was rounded once, which reaches every channel alike.
    scale = gradient_scale([grad_input]) if grad_input.numel() else 0.0
    if tensors["weight"].dtype in (torch.float16, torch.bfloat16):
        scale = grad_input.abs().max().item() if grad_input.numel() else 0.0
    for start, stop in ((0, channels), (0, half), (half, channels), (3, 4), (half, half)):
        actual = norm_linear_grad_input(*(tensors[name] for name in ORDER), start, stop)
        assert actual.dtype == tensors["input"].dtype
        assert actual.is_contiguous()
        assert_close(f"grad_input [{start}, {stop})", actual, grad_input[..., start:stop], tolerance, scale=scale)
    results = norm_linear_grad_weight(*(tensors[name] for name in ("grad_output", "input", "mean", "rstd")))
    for name, actual, expected in zip(("product", "sums"), results, (product, sums), strict=True):
        assert actual.dtype == torch.float32
        assert_close(name, actual, expected, tolerance)


@pytest.fixture(params=["default", "small"])
def configs(request):
    """The heuristic's tiles, which hold the whole test; tiles that need several, with partial sums."""
    if request.param == "default":
        yield
        return
    with config.forced("norm_linear_grad_input", SMALL), config.forced("linear_grad_weight", SMALL._replace(split=3)):
        yield


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("wide", [False, True], ids=["one-dtype", "autocast"])
def test_float64_is_followed(shape, wide, dtype, device, configs):
    check(make(shape, dtype, device, wide))


@pytest.mark.parametrize("large", ["bias", "norm_bias", "one column"])
@pytest.mark.parametrize("shape", ["matrix", "wide"])
def test_no_digits_are_lost_beside_a_large_bias(large, shape, device):
    """The output, from which the bias is taken again, has few digits of the product."""
    leading, channels, out_features = ((21,), 70, 33) if shape == "matrix" else ((5, 4), 33, 140)
    given = {
        "input": torch.randn(*leading, channels),
        "norm_weight": torch.randn(channels),
        "norm_bias": torch.randn(channels),
        "weight": torch.randn(out_features, channels),
        "bias": torch.randn(out_features),
    }
    if large == "one column":
        given["bias"][torch.randint(out_features, ())] = 1e5
    else:
        given[large] += 1e5
    given = {name: tensor.to(device) for name, tensor in given.items()}
    normalized, mean, rstd = torch.native_layer_norm(
        given["input"], (channels,), given["norm_weight"], given["norm_bias"], 1e-5
    )
    output = F.linear(normalized, given["weight"], given["bias"])
    tensors = {**given, "output": output, "mean": mean, "rstd": rstd, "grad_output": torch.randn_like(output)}
    check(tensors)


def transposed(tensor):
    return tensor.transpose(0, -1).contiguous().transpose(0, -1)


def inside(tensor):
    """The same values as a view into more of them, all NaN."""
    base = torch.full([2 * size + 3 for size in tensor.shape], float("nan"), dtype=tensor.dtype, device=tensor.device)
    view = base[tuple(slice(2, 2 + 2 * size, 2) for size in tensor.shape)]
    return view.copy_(tensor)


def row_expanded(tensor):
    return tensor[:1].expand(tensor.shape)


@pytest.mark.parametrize("layout", [transposed, inside, row_expanded], ids=lambda f: f.__name__)
@pytest.mark.parametrize("shape", ["matrix", "tokens"])
def test_any_strides(layout, shape, device):
    tensors = make(shape, torch.float32, device)
    views = {"grad_output": layout, "output": transposed, "input": transposed, "weight": transposed}
    if layout is inside:
        views = {name: inside for name in ORDER if name not in ("mean", "rstd")}
    check(
        {name: tensor if tensor is None else views.get(name, torch.clone)(tensor) for name, tensor in tensors.items()}
    )


@pytest.mark.parametrize(("leading", "channels", "out_features"), [((0,), 6, 4), ((2, 0), 6, 4), ((3,), 6, 0)])
def test_nothing_to_sum(leading, channels, out_features, device):
    tensors = {
        "input": torch.randn(*leading, channels),
        "weight": torch.randn(out_features, channels),
        "grad_output": torch.randn(*leading, out_features),
        "output": torch.randn(*leading, out_features),
        "mean": torch.randn(*leading, 1),
        "rstd": torch.randn(*leading, 1),
    }
    tensors = {name: tensors[name].to(device) if name in tensors else None for name in ORDER}
    actual = norm_linear_grad_input(*tensors.values(), 1, 4)
    assert torch.equal(actual, actual.new_zeros((*leading, 3)))
    product, sums = norm_linear_grad_weight(*(tensors[name] for name in ("grad_output", "input", "mean", "rstd")))
    assert torch.equal(product, product.new_zeros((out_features, channels)))
    assert torch.equal(sums, sums.new_zeros(out_features))


def test_two_runs_are_bitwise_the_same(device, configs):
    tensors = make("matrix", torch.float32, device)
    arguments = [tensors[name] for name in ORDER]
    first, second = (norm_linear_grad_input(*arguments, 5, 60) for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize("form", ["plain", "full"])
@pytest.mark.parametrize("referencing", [True, False], ids=["reference", "no-reference"])
def test_the_op_runs_through_the_kernels(form, referencing, device, configs):
    tensors = {name: make("matrix", torch.float32, device)[name] for name in ("input", *AFFINE)}
    exact = {name: tensor.double().requires_grad_() for name, tensor in tensors.items()}
    given = {"full": tensors["input"], "input": tensors["input"][:, 9:50]} if form == "full" else {}
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in (tensors | given).items()}
    options = {"start": 9, "stop": 50, "reference": referencing}
    output = ops.partitioned_norm_linear(**leaves, **options, backend="triton")
    assert backends.last_used("partitioned_norm_linear") == "triton"
    expected = reference.partitioned_norm_linear(**exact, **options)
    grad_output = torch.randn_like(output)
    names = ("input", *AFFINE)
    grads = torch.autograd.grad(output, [leaves[name] for name in names], grad_output)
    stock_grads = torch.autograd.grad(expected, list(exact.values()), grad_output.double())
    assert_close("output", output, expected)
    for name, actual, exact_grad in zip(names, grads, stock_grads, strict=True):
        narrow = name == "input" and form == "full"
        assert_close(f"grad_{name}", actual, exact_grad[:, 9:50] if narrow else exact_grad)


def test_float64_is_refused(device):
    tensors = make("matrix", torch.float32, device)
    exact = [None if tensors[name] is None else tensors[name].double() for name in ORDER]
    with pytest.raises(RuntimeError, match=r"norm_linear_grad_input: it has no kernel for float64"):
        torch.ops.dfs_engine.norm_linear_grad_input(*exact, 3, 40)
