"""partitioned_norm_linear against the oracle, and what it promises: zeros, nothing unasked for, right derivatives."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from dfs_engine import reference as oracle
from dfs_engine.ops import norm_linear as module
from dfs_engine.ops import partitioned_norm_linear
from dfs_engine.runtime import backend as backends
from dfs_engine.validate.tolerances import TOLERANCES, assert_close

pytestmark = pytest.mark.usefixtures("poison")

NAMES = ("input", "norm_weight", "norm_bias", "weight", "bias")
# leading dims, channels, out_features, tensors that are not given
SHAPES = {
    "matrix": ((9,), 8, 5, ()),
    "tokens": ((4, 5), 17, 4, ("bias",)),
    "4-D": ((2, 1, 9), 65, 3, ("norm_bias",)),
    "vector": ((), 6, 7, ("norm_weight",)),
    "3-channels": ((4,), 3, 1, ("norm_weight", "norm_bias")),
    "empty-batch": ((0,), 6, 4, ()),
    "empty-tokens": ((2, 0), 6, 4, ("norm_weight", "norm_bias", "bias")),
}
REFERENCE = pytest.mark.parametrize("reference", [True, False], ids=["reference", "no-reference"])
FORM = pytest.mark.parametrize("form", ["plain", "full"])


def make(shape: str, dtype: torch.dtype = torch.float64, offset: float = 0.0) -> dict:
    leading, channels, out_features, missing = SHAPES[shape]
    # Of few channels some row would have nearly equal ones, whose normalisation is as inexact as they are alike.
    apart = torch.linspace(-2, 2, channels) if channels < 6 else 0
    tensors = {
        "input": torch.randn(*leading, channels) * (0.3 if channels < 6 else 1) + apart + offset,
        "norm_weight": torch.randn(channels),
        "norm_bias": torch.randn(channels),
        "weight": torch.randn(out_features, channels),
        "bias": torch.randn(out_features),
    }
    return {name: None if name in missing else tensor.to(dtype) for name, tensor in tensors.items()}


def live_and_full(tensors: dict, start: int, stop: int) -> dict:
    """The internal form: the live part of its own, the full data without gradient."""
    full = tensors["input"].detach()
    return {**tensors, "input": full[..., start:stop].clone(), "full": full}


def slices(channels: int) -> list[tuple[int, int]]:
    """Empty (beta 0), full (beta 1), both ends, interior, one channel."""
    half = channels // 2
    return sorted(
        {(0, 0), (half, half), (0, channels), (0, half), (half, channels), (half, half + 1), (1, channels - 1)}
    )


@pytest.mark.parametrize("shape", SHAPES)
@REFERENCE
@FORM
def test_equals_the_oracle(shape, reference, form, backend, check, exact_dtype):
    channels = SHAPES[shape][1]
    for start, stop in slices(channels):
        if not reference and stop - start == 1:
            continue  # beside zeros the normalisation takes its size away: only rounding is left of the gradient
        tensors = make(shape, exact_dtype, offset=1.0)
        if form == "full":
            tensors = live_and_full(tensors, start, stop)
        results = check(partitioned_norm_linear, tensors, start=start, stop=stop, reference=reference, backend=backend)
        assert backends.last_used("partitioned_norm_linear").partition(":")[0] == backend
        if form == "plain":
            outside = torch.ones(channels, dtype=torch.bool)
            outside[start:stop] = False
            assert not results["grad_input"][..., outside].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", ["tokens", "4-D"])
@REFERENCE
def test_other_dtypes(shape, dtype, reference, backend, check):
    channels = SHAPES[shape][1]
    # Of a few live channels beside zeros only rounding errors would be left of the gradient.
    for start, stop in ((0, channels // 2), (channels // 2, channels), *([(1, 4)] if reference else [])):
        tensors = make(shape, dtype, offset=0.5)
        check(partitioned_norm_linear, tensors, start=start, stop=stop, reference=reference, backend=backend)


def block(dtype: torch.dtype, rows: int = 197, channels: int = 192, offset: float = 2.0) -> dict:
    """As in a ViT: qkv of a feature with a mean, and a large bias, from which m2 has to be told."""
    tensors = {
        "input": torch.randn(rows, channels) + offset,
        "norm_weight": 1 + 0.2 * torch.randn(channels),
        "norm_bias": 0.3 * torch.randn(channels),
        "weight": torch.randn(3 * channels, channels) / channels**0.5,
        "bias": torch.randn(3 * channels) + 5,
    }
    return {name: tensor.to(dtype) for name, tensor in tensors.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_row_sums_from_the_output_lose_no_digits(dtype, backend, check):
    """`grad_input` where sums over all channels come from an output that is large and rounded."""
    check(partitioned_norm_linear, block(dtype), start=0, stop=96, backend=backend)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("large", ["bias", "norm_bias", "one column"])
@pytest.mark.parametrize("size", [1e2, 1e5])
def test_row_sums_beside_a_large_bias_lose_no_digits(dtype, large, size, backend, check):
    """Of the output, from which the bias is taken again, few digits or none are of the product."""
    tensors = block(dtype, rows=33)
    if large == "one column":
        tensors["bias"][7] = size
    else:
        tensors[large] += size
    check(partitioned_norm_linear, tensors, start=5, stop=96, backend=backend)


def test_columns_are_multiplied_anew_only_where_digits_are_lost():
    """Which costs: a product of all channels and rows."""
    tensors = block(torch.float32, rows=9, channels=64)
    tensors["bias"] -= 5
    columns = []
    lossy_columns = module._lossy_columns
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_lossy_columns", lambda *args: columns.append(lossy_columns(*args)) or columns[-1])
        for size in (0.0, 1e3):
            tensors["bias"][[3, 50]] += size
            leaves = {name: tensor.clone().requires_grad_() for name, tensor in tensors.items()}
            partitioned_norm_linear(**leaves, **SLICE, backend="aten").sum().backward()
    assert [found.tolist() for found in columns] == [[], [3, 50]]


@pytest.mark.parametrize("dtype", ["exact", torch.float32, torch.bfloat16], ids=str)
def test_one_channel_normalises_to_a_constant(dtype, backend, exact_dtype, evaluate):
    """Its gradient is zero; the oracle's is rounding noise, large in float32."""
    dtype = exact_dtype if dtype == "exact" else dtype
    tensors = {name: torch.randn(2 if name == "bias" else 1, dtype=dtype) for name in NAMES}
    tensors |= {"input": torch.randn(4, 1, dtype=dtype), "weight": torch.randn(2, 1, dtype=dtype)}
    results = evaluate(partitioned_norm_linear, tensors, start=0, stop=1, backend=backend)
    assert_close(
        "output", results["output"], F.linear(tensors["norm_bias"], tensors["weight"], tensors["bias"]).expand(4, 2)
    )
    assert results["grad_input"].shape == (4, 1)
    assert not results["grad_input"].any()
    assert not results["grad_norm_weight"].any()


def transposed(tensor):
    return tensor.transpose(0, -1).contiguous().transpose(0, -1)


def feature_slice(tensor):
    """The same values, as a view into a tensor of more features."""
    wide = torch.full((*tensor.shape[:-1], tensor.size(-1) + 3), float("nan"), dtype=tensor.dtype)
    view = wide[..., 2:-1]
    return view.copy_(tensor)


def every_other(tensor):
    return tensor.repeat_interleave(2, -1)[..., ::2]


def expanded(tensor):
    """Stride 0 everywhere, as the gradient of `.sum()`."""
    return tensor.new_tensor(0.7).expand(tensor.shape)


def row_expanded(tensor):
    """One row for all, as the gradient of a sum over the batch."""
    return tensor[:1].expand(tensor.shape)


LAYOUTS = (transposed, feature_slice, every_other, row_expanded)


@pytest.mark.parametrize("shape", ["matrix", "tokens"])
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("grad_layout", [*LAYOUTS, expanded], ids=lambda f: "grad-" + f.__name__)
def test_any_strides(shape, layout, grad_layout, backend, check, exact_dtype):
    tensors = make(shape, exact_dtype)
    start, stop = 2, 5
    options = {"start": start, "stop": stop, "backend": backend}
    leading, _, out_features, _ = SHAPES[shape]
    grad_output = grad_layout(torch.randn(*leading, out_features, dtype=exact_dtype))
    strided = {name: tensor if tensor is None else every_other(tensor) for name, tensor in tensors.items()}
    tensors = {**strided, "input": layout(tensors["input"]), "weight": transposed(tensors["weight"])}
    check(partitioned_norm_linear, tensors, grad_output, **options)
    check(partitioned_norm_linear, tensors, grad_output, reference=False, **options)
    feature = {**tensors, "full": tensors["input"], "input": tensors["input"][..., start:stop]}
    check(partitioned_norm_linear, feature, grad_output, **options)


SLICE = {"start": 2, "stop": 5}
WANTED = list(itertools.product([False, True], repeat=5))


def call(tensors: dict, backend: str, **options) -> torch.Tensor:
    return partitioned_norm_linear(**tensors, **{**SLICE, "backend": backend, **options})


def expect(tensors: dict, **options) -> torch.Tensor:
    return oracle.partitioned_norm_linear(**tensors, **{**SLICE, **options})


def leaves_of(tensors: dict, form: str = "plain", wanted: tuple = (True,) * 5) -> dict:
    tensors = live_and_full(tensors, **SLICE) if form == "full" else dict(tensors)
    for name, is_wanted in zip(NAMES, wanted, strict=True):
        tensors[name].requires_grad_(is_wanted)
    return tensors


@pytest.mark.parametrize("wanted", WANTED, ids=lambda w: "".join(map(str, map(int, w))))
@FORM
@REFERENCE
def test_only_what_is_asked_for_is_computed(wanted, form, reference, backend, exact_dtype):
    tensors = leaves_of(make("matrix", exact_dtype), form, wanted)
    output = call(tensors, backend, reference=reference)
    assert output.requires_grad == any(wanted)
    expected = expect(tensors, reference=reference)
    assert_close("output", output, expected)
    if not any(wanted):
        return
    leaves = [tensors[name] for name, is_wanted in zip(NAMES, wanted, strict=True) if is_wanted]
    grad_output = torch.randn_like(output)
    grads = torch.autograd.grad(output, leaves, grad_output, retain_graph=True)
    for grad, stock in zip(grads, torch.autograd.grad(expected, leaves, grad_output), strict=True):
        assert_close("gradient", grad, stock)
    if form == "full":
        with torch.no_grad():  # below autograd, which would drop an unwanted gradient after it was computed
            received = output.grad_fn.apply(grad_output)
        # input, full, norm_weight, norm_bias, weight, bias, then arguments that are not tensors
        assert [grad is not None for grad in received] == [wanted[0], False, *wanted[1:], False, False, False]


def saved_by(function) -> set[int]:
    saved = set()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.add(t.data_ptr()) or t, lambda t: t):
        function()
    return saved


def test_only_what_is_needed_is_saved(backend, exact_dtype):
    def saved(*wanted: bool) -> tuple[bool, bool]:
        tensors, outputs = leaves_of(make("matrix", exact_dtype), "full", wanted), []
        addresses = saved_by(lambda: outputs.append(call(tensors, backend)))
        return tensors["full"].data_ptr() in addresses, outputs[0].data_ptr() in addresses

    assert saved(True, False, False, False, False) == (True, True)
    assert saved(False, True, False, False, False) == (True, False)
    assert saved(False, False, False, True, False) == (True, False)
    assert saved(False, False, True, False, True) == (False, False)
    with torch.no_grad():
        assert saved(True, True, True, True, True) == (False, False)


def test_both_forms_agree_and_repeat_bitwise(backend):
    tensors = make("matrix", torch.float32)
    grad_output, results = torch.randn(9, 5), {}
    for form in ("plain", "full"):
        leaves = leaves_of({name: tensor.clone() for name, tensor in tensors.items()}, form)
        output = call(leaves, backend)
        wanted = [leaves[name] for name in NAMES]
        first = torch.autograd.grad(output, wanted, grad_output, retain_graph=True)
        second = torch.autograd.grad(output, wanted, grad_output)
        assert all(torch.equal(*pair) for pair in zip(first, second, strict=True))
        results[form] = (output, *first)
    assert torch.equal(results["plain"][1][:, 2:5], results["full"][1])
    for index in (0, 2, 3, 4, 5):
        assert torch.equal(results["plain"][index], results["full"][index])


def test_nothing_is_written_to_and_full_gets_no_gradient(backend, exact_dtype):
    tensors = leaves_of(make("matrix", exact_dtype), "full")
    tensors["full"].requires_grad_()
    output = call(tensors, backend)
    watched = [*tensors.values(), output, torch.randn_like(output)]
    before = [(tensor._version, tensor.detach().clone()) for tensor in watched]
    output.backward(watched[-1])
    for tensor, (version, copy) in zip(watched, before, strict=True):
        assert tensor._version == version
        assert torch.equal(tensor, copy)
    assert tensors["full"].grad is None


@pytest.mark.parametrize("written", ["input", "output"])
def test_what_was_saved_and_then_written_to_is_refused(written, backend, exact_dtype):
    tensors = leaves_of(make("matrix", exact_dtype))
    data = tensors["input"] * 1
    output = call({**tensors, "input": data}, backend)
    result = output.sum()
    with torch.no_grad():
        {"input": data, "output": output}[written].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        result.backward()


@REFERENCE
def test_gradcheck_on_the_live_slice(reference):
    """With the frozen part held constant; the whole input's derivative is another one, by design."""
    tensors = leaves_of(make("matrix"), "full")

    def function(*leaves):
        full = oracle.live_slice(leaves[0], SLICE["start"], SLICE["stop"], True, -1, tensors["full"]).detach()
        return call({**dict(zip(NAMES, leaves, strict=True)), "full": full}, "aten", reference=reference)

    leaves = tuple(tensors[name] for name in NAMES)
    assert torch.autograd.gradcheck(function, leaves)
    assert torch.autograd.gradgradcheck(function, leaves)


@FORM
@REFERENCE
@pytest.mark.parametrize("wanted", [(True,) * 5, (False, False, True, False, True), (True, False, False, True, False)])
def test_double_backward_equals_the_oracle(form, reference, wanted, backend, exact_dtype):
    tensors = leaves_of(make("matrix", exact_dtype), form, wanted)
    leaves = [tensors[name] for name, is_wanted in zip(NAMES, wanted, strict=True) if is_wanted]
    weights = [torch.randn_like(leaf) for leaf in leaves]

    def second(output):
        first = torch.autograd.grad(output.square().sum(), leaves, create_graph=True)
        return torch.autograd.grad(sum((grad * w).sum() for grad, w in zip(first, weights, strict=True)), leaves)

    actual = second(call(tensors, backend, reference=reference))
    expected = second(expect(tensors, reference=reference))
    for left, right in zip(actual, expected, strict=True):
        assert_close("second derivative", left, right)


def test_double_backward_where_a_parameter_depends_on_another(backend, exact_dtype):
    tensors = leaves_of(make("matrix", exact_dtype))

    def second(function):
        output = function({**tensors, "norm_bias": tensors["norm_weight"] * 2})
        (grad,) = torch.autograd.grad(output.square().sum(), tensors["norm_weight"], create_graph=True)
        return torch.autograd.grad(grad.square().sum(), tensors["norm_weight"])[0]

    assert_close("second derivative", second(lambda tied: call(tied, backend)), second(expect))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("inside", [True, False], ids=["backward-inside", "backward-outside"])
@REFERENCE
def test_autocast(dtype, inside, reference, backend):
    """The normalisation in float32, the linear in low precision, as stock; gradients in the tensors' own dtypes."""
    tensors = block(torch.float32, rows=40, channels=32)
    leaves = {name: tensor.requires_grad_() for name, tensor in tensors.items()}
    options = {"start": 0, "stop": 16, "reference": reference}
    with torch.autocast("cpu", dtype=dtype):
        output = partitioned_norm_linear(**leaves, **options, backend=backend)
        grad_output = torch.randn_like(output)
        if inside:
            output.backward(grad_output)
    if not inside:
        output.backward(grad_output)
    assert output.dtype is dtype
    rounded = {name: tensor.detach() for name, tensor in leaves.items()}
    rounded |= {name: rounded[name].to(dtype) for name in ("weight", "bias")}
    wide = {name: tensor.double().requires_grad_() for name, tensor in rounded.items()}
    expected = oracle.partitioned_norm_linear(**wide, **options)
    expected.backward(grad_output.double())
    assert_close("output", output, expected)
    for name in NAMES:
        assert leaves[name].grad.dtype is torch.float32
        assert_close(f"grad_{name}", leaves[name].grad, wide[name].grad, TOLERANCES[dtype])


def test_autocast_of_a_half_precision_input_and_of_float64(backend):
    tensors = block(torch.float32, rows=8, channels=16)
    tensors["input"] = tensors["input"].bfloat16().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = partitioned_norm_linear(**tensors, start=0, stop=8, backend=backend)
        assert partitioned_norm_linear(**make("matrix"), **SLICE).dtype is torch.float64
    output.sum().backward()
    assert (output.dtype, tensors["input"].grad.dtype) == (torch.bfloat16, torch.bfloat16)


@FORM
@REFERENCE
@pytest.mark.parametrize("compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compile(form, reference, compiler, backend, exact_dtype):
    torch._dynamo.reset()
    tensors = leaves_of(
        make("tokens" if form == "plain" else "matrix", exact_dtype)
        | {"bias": torch.randn(4 if form == "plain" else 5, dtype=exact_dtype)},
        form,
    )
    compiled = torch.compile(lambda **t: call(t, backend, reference=reference), fullgraph=True, backend=compiler)
    leaves, results = [tensors[name] for name in NAMES], []
    output = compiled(**tensors)
    grad_output = torch.randn_like(output)
    for given in (output, call(tensors, backend, reference=reference)):
        results.append((given, *torch.autograd.grad(given, leaves, grad_output)))
    for name, left, right in zip(("output", *NAMES), *results, strict=True):
        assert_close(name, left, right)


def test_meta_tensors_give_shapes():
    tensors = {name: tensor.to("meta").requires_grad_() for name, tensor in make("matrix").items()}
    output = partitioned_norm_linear(**tensors, **SLICE)
    output.sum().backward()
    assert output.shape == (9, 5)
    assert all(tensor.grad.shape == tensor.shape for tensor in tensors.values())


OPS = torch.ops.dfs_engine


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", ["matrix", "tokens", "4-D", "empty-batch"])
def test_opcheck(shape, dtype):
    if backends.unavailable_reason("cpp") is not None:
        pytest.skip(backends.unavailable_reason("cpp"))
    tensors = make(shape, dtype)
    input, *affine = tensors.values()
    grad_output = torch.randn(*input.shape[:-1], tensors["weight"].size(0)).to(dtype)
    mean, rstd = torch.randn(*input.shape[:-1], 1), torch.rand(*input.shape[:-1], 1)
    statistics = (torch.randn_like(grad_output), input, mean, rstd)
    torch.library.opcheck(OPS.norm_linear_grad_weight, (grad_output, input, mean, rstd))
    torch.library.opcheck(OPS.norm_linear_row_sums, (grad_output, *statistics, *affine))
    for start, stop in ((0, input.size(-1)), (1, 4), (3, 3)):
        torch.library.opcheck(OPS.norm_linear_grad_input, (grad_output, *statistics, *affine, start, stop))


def test_flops_are_those_of_the_slice(backend, exact_dtype):
    tensors = {name: tensor.requires_grad_() for name, tensor in make("matrix", exact_dtype).items()}
    with FlopCounterMode(display=False) as counter:
        partitioned_norm_linear(**tensors, start=0, stop=2, backend=backend).sum().backward()
    full = 2 * 9 * 5 * 8
    assert counter.get_total_flops() == full + full + full // 4


BAD = {
    "slice-reversed": ({"start": 3, "stop": 2}, ValueError, r"expected 0 <= start <= stop <= C=4, got start=3, stop=2"),
    "slice-float": ({"stop": 2.0}, TypeError, r"expected an integer, got stop=2\.0"),
    "channels": ({"input": torch.randn(2, 5)}, ValueError, r"got input \(2, 5\) and weight \(3, 4\)"),
    "scalar": ({"input": torch.tensor(1.0)}, ValueError, r"got input \(\) and weight"),
    "weight-dims": ({"weight": torch.randn(4)}, ValueError, r"weight \(4,\)"),
    "norm-weight": ({"norm_weight": torch.randn(3)}, ValueError, r"norm_weight of shape \(4,\), got \(3,\)"),
    "norm-bias": ({"norm_bias": torch.randn(1, 4)}, ValueError, r"norm_bias of shape \(4,\), got \(1, 4\)"),
    "live-width": ({"full": torch.randn(2, 4)}, ValueError, r"live part of full, of shape \(2, 2\), got .* \(2, 4\)"),
    "full-channels": ({"full": torch.randn(2, 5)}, ValueError, r"got full \(2, 5\) and weight"),
    "integer": ({"norm_bias": torch.ones(4, dtype=torch.int64)}, TypeError, r"floating-point tensor, got norm_bias"),
    "mixed": ({"weight": torch.randn(3, 4).double()}, TypeError, r"tensors of one dtype, got .* weight=torch\.float64"),
    "list": ({"weight": [[1.0]]}, TypeError, r"expected a Tensor, got weight=\[\[1\.0\]\] of type list"),
    "devices": ({"norm_weight": torch.randn(4, device="meta")}, ValueError, r"tensors on one device, .* on meta"),
}


@pytest.mark.parametrize(("arguments", "error", "message"), BAD.values(), ids=BAD)
@REFERENCE
def test_bad_arguments(arguments, error, message, reference, backend):
    good = {"input": torch.randn(2, 4), "norm_weight": torch.randn(4), "norm_bias": torch.randn(4)}
    good |= {"weight": torch.randn(3, 4), "start": 0, "stop": 2}
    with pytest.raises(error, match=f"^partitioned_norm_linear: .*{message}"):
        partitioned_norm_linear(**{**good, **arguments}, reference=reference, backend=backend)
