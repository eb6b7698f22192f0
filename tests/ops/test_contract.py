"""What every op promises: exact zeros, nothing it was not asked for, nothing written to, right derivatives."""

import itertools
from collections.abc import Callable

import pytest
import torch

from dfs_engine import ops, reference
from dfs_engine.validate.tolerances import TOLERANCES, assert_close

pytestmark = pytest.mark.usefixtures("poison")

START, STOP, CHANNELS = 1, 4, 6
SLICE = {"start": START, "stop": STOP}
OPTIONS: dict[str, dict] = {"partitioned_conv2d": {"padding": 1, **SLICE}, "partitioned_linear": SLICE}
AXIS = {"partitioned_conv2d": 1, "partitioned_linear": -1}
NAMES = ("input", "weight", "bias")
WANTED = list(itertools.product([False, True], repeat=3))


def make(op: str, dtype: torch.dtype = torch.float64, requires_grad: bool = True) -> dict:
    shapes = {
        "partitioned_conv2d": ((2, CHANNELS, 5, 4), (3, CHANNELS, 3, 3), (3,)),
        "partitioned_linear": ((4, 3, CHANNELS), (5, CHANNELS), (5,)),
    }[op]
    return {
        name: torch.randn(shape, dtype=dtype, requires_grad=requires_grad)
        for name, shape in zip(NAMES, shapes, strict=True)
    }


@pytest.fixture(params=OPTIONS)
def op(request) -> str:
    return request.param


@pytest.fixture
def call(op, backend) -> Callable:
    """The op on its tensors, with the slice, the geometry and the backend in place."""
    return lambda tensors, **options: getattr(ops, op)(**tensors, **{**OPTIONS[op], "backend": backend, **options})


def oracle(op: str, tensors: dict, **options) -> torch.Tensor:
    return getattr(reference, op)(**tensors, **{**OPTIONS[op], **options})


def live_and_full(op: str, tensors: dict) -> dict:
    """The internal form: the live part as a leaf of its own, the full data without gradient."""
    full = tensors["input"].detach()
    live = full.narrow(AXIS[op], START, STOP - START).clone().requires_grad_()
    return {**tensors, "input": live, "full": full}


def gradients(output: torch.Tensor, tensors: dict, grad_output: torch.Tensor, **options) -> dict:
    leaves = [tensors[name] for name in NAMES]
    return dict(zip(NAMES, torch.autograd.grad(output, leaves, grad_output, **options), strict=True))


@pytest.mark.parametrize("referencing", [True, False], ids=["reference", "no-reference"])
def test_both_forms_agree_and_the_plain_one_is_zero_outside(op, call, referencing, exact_dtype):
    tensors = make(op, exact_dtype)
    feature = live_and_full(op, tensors)
    outputs = call(tensors, reference=referencing), call(feature, reference=referencing)
    assert torch.equal(*outputs)
    grad_output = torch.randn_like(outputs[0])
    plain = gradients(outputs[0], tensors, grad_output)
    internal = gradients(outputs[1], feature, grad_output)
    assert torch.equal(plain["weight"], internal["weight"])
    assert torch.equal(plain["bias"], internal["bias"])
    expected = torch.zeros_like(tensors["input"])
    expected.narrow(AXIS[op], START, STOP - START).copy_(internal["input"])
    assert torch.equal(plain["input"], expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("form", ["plain", "full"])
@pytest.mark.parametrize("edge", [0, 3, CHANNELS])
@pytest.mark.parametrize("has_bias", [True, False], ids=["bias", "no-bias"])
def test_an_empty_slice_without_referencing_reads_nothing(op, call, backend, dtype, form, edge, has_bias):
    """The output is the bias or zero, and gradients are zero, exactly: whatever input and weight hold."""
    if dtype is torch.float64 and backend != "aten":
        pytest.skip("no kernel computes in float64")
    tensors = make(op, dtype)
    with torch.no_grad():
        tensors["input"].fill_(float("nan"))
        tensors["weight"].fill_(float("inf"))
    given = {**tensors, "bias": tensors["bias"] if has_bias else None}
    if form == "full":
        full = tensors["input"].detach()
        given |= {"full": full, "input": full.narrow(AXIS[op], edge, 0).requires_grad_()}
    output = call(given, start=edge, stop=edge, reference=False)
    shape = [1, -1, 1, 1] if AXIS[op] == 1 else [-1]
    expected = tensors["bias"].detach().view(shape).expand_as(output) if has_bias else torch.zeros_like(output)
    assert torch.equal(output, expected)
    grad_output = torch.randn_like(output)
    output.backward(grad_output)
    for name in ("input", "weight"):
        assert given[name].grad.shape == given[name].shape
        assert not given[name].grad.any()
    if has_bias:
        over = [axis for axis in range(output.dim()) if axis != AXIS[op] % output.dim()]
        assert_close("grad_bias", given["bias"].grad, grad_output.double().sum(over))


@pytest.mark.parametrize("wanted", WANTED, ids=lambda w: "".join(map(str, map(int, w))))
@pytest.mark.parametrize("form", ["plain", "full"])
@pytest.mark.parametrize("referencing", [True, False], ids=["reference", "no-reference"])
def test_only_what_is_asked_for_is_computed(op, call, wanted, form, referencing, exact_dtype):
    tensors = make(op, exact_dtype)
    if form == "full":
        tensors = live_and_full(op, tensors)
    for name, is_wanted in zip(NAMES, wanted, strict=True):
        tensors[name].requires_grad_(is_wanted)
    output = call(tensors, reference=referencing)
    expected = oracle(op, tensors, reference=referencing)
    assert output.requires_grad == any(wanted)
    assert_close("output", output, expected)
    if not any(wanted):
        return
    grad_output = torch.randn_like(output)
    output.backward(grad_output)
    leaves = [tensors[name] for name, is_wanted in zip(NAMES, wanted, strict=True) if is_wanted]
    for leaf, grad in zip(leaves, torch.autograd.grad(expected, leaves, grad_output), strict=True):
        assert_close("gradient", leaf.grad, grad)
    assert all(tensors[name].grad is None for name, is_wanted in zip(NAMES, wanted, strict=True) if not is_wanted)


@pytest.mark.parametrize("wanted", WANTED, ids=lambda w: "".join(map(str, map(int, w))))
def test_the_function_returns_none_for_what_is_not_asked_for(op, call, wanted, exact_dtype):
    """Below autograd, which would drop an unwanted gradient after it was computed: the node itself gives None."""
    if not any(wanted):
        return
    tensors = make(op, exact_dtype)
    for name, is_wanted in zip(NAMES, wanted, strict=True):
        tensors[name].requires_grad_(is_wanted)
    output = call(tensors)
    with torch.no_grad():  # as the engine calls it without create_graph
        received = output.grad_fn.apply(torch.randn_like(output))
    # input, full, weight, bias, then arguments that are not tensors.
    assert [grad is not None for grad in received[:4]] == [wanted[0], False, wanted[1], wanted[2]]
    assert all(grad is None for grad in received[4:])


def saved_by(function: Callable) -> set[int]:
    """Addresses of the tensors that the backward of `function()` keeps."""
    saved = set()
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: saved.add(tensor.data_ptr()) or tensor, lambda tensor: tensor
    ):
        function()
    return saved


@pytest.mark.parametrize("form", ["plain", "full"])
def test_the_input_is_saved_only_for_the_weight(op, call, form, exact_dtype):
    tensors = make(op, exact_dtype)
    if form == "full":
        tensors = live_and_full(op, tensors)
    data = tensors["full" if form == "full" else "input"].data_ptr()
    assert data in saved_by(lambda: call(tensors))
    tensors["weight"].requires_grad_(False)
    assert data not in saved_by(lambda: call(tensors))


def test_nothing_is_saved_under_no_grad(op, call, exact_dtype):
    tensors = make(op, exact_dtype)
    with torch.no_grad():
        assert not saved_by(lambda: call(tensors))
        assert not call(tensors).requires_grad
    with torch.inference_mode():
        assert_close("output", call(tensors), oracle(op, tensors))


@pytest.mark.parametrize("autocast", [None, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels_last"])
def test_the_parameters_gradients_are_accumulated_without_a_copy(op, call, autocast, layout):
    """They come in the parameters' dtype and layout: what the node writes is what `grad` becomes."""
    tensors = make(op, torch.float32)
    if op == "partitioned_conv2d":
        tensors["weight"] = tensors["weight"].detach().contiguous(memory_format=layout).requires_grad_()
    with torch.autocast("cpu", autocast, enabled=autocast is not None):
        output = call(tensors)
    given = []
    output.grad_fn.register_hook(lambda grads, _: given.extend(grad.data_ptr() for grad in grads[-2:]))
    output.backward(torch.randn_like(output))
    for name, address in zip(("weight", "bias"), given, strict=True):
        parameter = tensors[name]
        assert parameter.grad.data_ptr() == address, name
        assert parameter.grad.dtype == torch.float32
        assert parameter.grad.stride() == parameter.stride()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_rounds_the_parameters_gradients_only_in_a_product_of_that_dtype(op, call, backend, dtype):
    """Near float64 as float32 is: sums always, matrix products where the kernels take them in float32."""
    tensors = make(op, torch.float32)
    with torch.autocast("cpu", dtype):
        output = call(tensors)
    grad_output = torch.randn_like(output)
    output.backward(grad_output)
    wide = {name: tensor.detach().to(dtype).double().requires_grad_() for name, tensor in tensors.items()}
    expected = gradients(oracle(op, wide), wide, grad_output.double())
    assert_close("bias", tensors["bias"].grad, expected["bias"])
    is_native = getattr(torch.ops.mkldnn, f"_is_mkldnn_{'bf16' if dtype is torch.bfloat16 else 'fp16'}_supported")()
    is_wide = backend == "cpp" and not is_native
    assert_close("weight", tensors["weight"].grad, expected["weight"], TOLERANCES[torch.float32 if is_wide else dtype])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_second_backward_and_second_run_are_bitwise_the_same(op, call, dtype):
    tensors = make(op, dtype)
    output = call(tensors)
    grad_output = torch.randn_like(output)
    first = gradients(output, tensors, grad_output, retain_graph=True)
    second = gradients(output, tensors, grad_output)
    again = call(tensors)
    third = gradients(again, tensors, grad_output)
    assert torch.equal(output, again)
    for name in NAMES:
        assert torch.equal(first[name], second[name]), name
        assert torch.equal(first[name], third[name]), name
        assert first[name].data_ptr() != second[name].data_ptr(), name


def test_one_and_two_threads_agree(op, call):
    # Large enough for a kernel to be split.
    tensors = make(op, torch.float32)
    tensors["input"] = tensors["input"].detach().repeat(64, *[1] * (tensors["input"].dim() - 1)).requires_grad_()
    wide = {name: tensor.detach().double().requires_grad_() for name, tensor in tensors.items()}
    expected = oracle(op, wide)
    grad_output = torch.randn(expected.shape)
    grads = gradients(expected, wide, grad_output.double())
    for num_threads in (1, 2):
        torch.set_num_threads(num_threads)
        output = call(tensors)
        assert_close("output", output, expected)
        for name, grad in gradients(output, tensors, grad_output).items():
            assert_close(name, grad, grads[name])


@pytest.mark.parametrize("form", ["plain", "full"])
@pytest.mark.parametrize("referencing", [True, False], ids=["reference", "no-reference"])
def test_nothing_is_written_to(op, call, form, referencing, exact_dtype):
    tensors = make(op, exact_dtype)
    if form == "full":
        tensors = live_and_full(op, tensors)
    output = call(tensors, reference=referencing)
    watched = [*tensors.values(), output, torch.randn_like(output)]
    before = [(tensor._version, tensor.detach().clone()) for tensor in watched]
    gradients(output, tensors, watched[-1])
    for tensor, (version, copy) in zip(watched, before, strict=True):
        assert tensor._version == version
        assert torch.equal(tensor, copy)


def test_an_input_written_to_before_the_backward_is_refused(op, call, exact_dtype):
    tensors = make(op, exact_dtype)
    data = tensors["input"] * 1
    output = call({**tensors, "input": data})
    data.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


def test_full_never_receives_gradient(op, call, exact_dtype):
    tensors = live_and_full(op, make(op, exact_dtype))
    tensors["full"].requires_grad_()
    call(tensors).sum().backward()
    assert tensors["full"].grad is None


@pytest.mark.parametrize("referencing", [True, False], ids=["reference", "no-reference"])
def test_gradcheck_on_the_live_slice(op, referencing):
    """With the frozen part held constant: `full` is rebuilt around each live part that gradcheck tries."""
    tensors = live_and_full(op, make(op))
    leaves = tuple(tensors[name] for name in NAMES)

    def function(*leaves):
        full = reference.live_slice(leaves[0], START, STOP, True, AXIS[op], tensors["full"]).detach()
        given = dict(zip(NAMES, leaves, strict=True))
        return getattr(ops, op)(**given, full=full, reference=referencing, **OPTIONS[op])

    assert torch.autograd.gradcheck(function, leaves)
    assert torch.autograd.gradgradcheck(function, leaves)


def test_gradcheck_on_the_whole_input_fails_by_design(op):
    """The backward is not the forward's derivative: the output does depend on channels whose gradient is stopped."""
    tensors = make(op)
    with pytest.raises(RuntimeError, match="Jacobian mismatch"):
        torch.autograd.gradcheck(
            lambda input: getattr(ops, op)(**{**tensors, "input": input}, **OPTIONS[op]), tensors["input"]
        )


@pytest.mark.parametrize("form", ["plain", "full"])
@pytest.mark.parametrize("referencing", [True, False], ids=["reference", "no-reference"])
def test_double_backward_equals_the_oracle(op, call, form, referencing, exact_dtype):
    tensors = make(op, exact_dtype)
    if form == "full":
        tensors = live_and_full(op, tensors)
    leaves = [tensors[name] for name in NAMES]
    weights = [torch.randn_like(leaf) for leaf in leaves]

    def second(output):
        first = torch.autograd.grad(output.square().sum(), leaves, create_graph=True)
        return torch.autograd.grad(sum((grad * w).sum() for grad, w in zip(first, weights, strict=True)), leaves)

    actual = second(call(tensors, reference=referencing))
    expected = second(oracle(op, tensors, reference=referencing))
    for name, left, right in zip(NAMES, actual, expected, strict=True):
        assert_close(f"second derivative by {name}", left, right)


@pytest.mark.parametrize("name", ["input", "weight", "bias", "full"])
@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64], ids=str)
def test_tensors_that_are_not_floating_point(op, call, name, dtype):
    tensors = live_and_full(op, make(op, torch.float32, requires_grad=False))
    tensors[name] = tensors[name].detach().to(dtype)
    with pytest.raises(TypeError, match=f"^{op}: expected a floating-point tensor, got {name} of dtype {dtype}"):
        call(tensors)


@pytest.mark.parametrize("name", ["input", "weight", "bias", "full"])
def test_mixed_dtypes_and_devices(op, call, name):
    tensors = live_and_full(op, make(op, torch.float32, requires_grad=False))
    value = tensors[name].detach()
    with pytest.raises(TypeError, match=rf"^{op}: expected tensors of one dtype, got .*torch\.float64"):
        call({**tensors, name: value.double()})
    with pytest.raises(ValueError, match=f"^{op}: expected all tensors on one device, got .* on meta"):
        call({**tensors, name: value.to("meta")})


def test_a_tensor_that_is_none_or_a_list(op, call, exact_dtype):
    with pytest.raises(TypeError, match=rf"^{op}: expected a Tensor, got weight=\[\[1\.0\]\] of type list"):
        call({**make(op, exact_dtype), "weight": [[1.0]]})


def test_meta_tensors_give_shapes(op):
    tensors = {name: tensor.detach().to("meta").requires_grad_() for name, tensor in make(op).items()}
    output = getattr(ops, op)(**tensors, **OPTIONS[op])
    output.sum().backward()
    assert output.device.type == "meta"
    assert tensors["input"].grad.shape == tensors["input"].shape
