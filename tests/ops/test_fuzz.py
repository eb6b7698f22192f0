"""Random cases of every op against the oracle in float64: shapes, slices, forms, strides, dtypes, a second backward.

A failure names the number of its case, which `--seed` repeats.
"""

import math
import random
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from dfs_engine import ops, reference
from dfs_engine.ops import _common
from dfs_engine.runtime import backend as backends
from dfs_engine.validate.tolerances import assert_close

pytestmark = pytest.mark.usefixtures("poison")

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
Tensors = dict[str, Tensor | None]
Results = dict[str, Tensor]


def dense(tensor: Tensor) -> Tensor:
    return tensor.contiguous()


def channels_last(tensor: Tensor) -> Tensor:
    return tensor.contiguous(memory_format=torch.channels_last) if tensor.dim() == 4 else tensor


def transposed(tensor: Tensor) -> Tensor:
    return tensor.transpose(0, -1).contiguous().transpose(0, -1) if tensor.dim() > 1 else tensor


def inside(tensor: Tensor) -> Tensor:
    """A view into more of them, all NaN."""
    base = torch.full([2 * size + 3 for size in tensor.shape], float("nan"), dtype=tensor.dtype)
    return base[tuple(slice(2, 2 + 2 * size, 2) for size in tensor.shape)].copy_(tensor)


def repeated(tensor: Tensor) -> Tensor:
    """One number along an axis, of stride 0."""
    axis = random.randrange(tensor.dim()) if tensor.dim() else None
    return tensor if axis is None or 0 in tensor.shape else tensor.narrow(axis, 0, 1).expand_as(tensor)


LAYOUTS = (dense, channels_last, transposed, inside, repeated)


class Case:
    """One call: tensors by name, options, and the channel axis of `input`."""

    def __init__(self, op: str, tensors: Tensors, options: dict, axis: int) -> None:
        self.op, self.tensors, self.options, self.axis = op, tensors, options, axis

    def __str__(self) -> str:
        given = {name: (tuple(t.shape), t.stride()) for name, t in self.tensors.items() if t is not None}
        return f"{self.op} {given} {self.options}"


def size(*choices: int) -> int:
    return random.choice(choices)


def draw_slice(channels: int, least: int = 0) -> dict:
    start, stop = sorted(random.choices(range(channels + 1), k=2))
    return {"start": start, "stop": stop} if stop - start >= least else {"start": 0, "stop": channels}


def maybe(*shape: int) -> Tensor | None:
    return torch.randn(shape) if random.random() < 0.7 else None


def linear() -> Case:
    leading = random.choice([(), (1,), (7,), (0,), (2, 0), (3, 5), (2, 1, 4), (67,)])
    inputs, outputs = size(1, 2, 5, 17, 40), size(1, 3, 16, 33)
    tensors = {"input": torch.randn(*leading, inputs), "weight": torch.randn(outputs, inputs), "bias": maybe(outputs)}
    options = draw_slice(inputs) | {"reference": random.random() < 0.6}
    return Case("partitioned_linear", tensors, options, -1)


def conv2d() -> Case:
    groups, per_group, out_per_group = size(1, 1, 1, 2, 5), size(1, 3, 8, 17), size(1, 2, 9, 16)
    kernel = (size(1, 2, 3), size(1, 3, 5))
    dilation = (size(1, 1, 2), size(1, 1, 2))
    image = [
        size(0, 1, 2, 3),
        groups * per_group,
        *(d * (k - 1) + size(1, 4, 7) for d, k in zip(dilation, kernel, strict=True)),
    ]
    options = draw_slice(image[1]) | {"reference": random.random() < 0.6, "groups": groups, "dilation": dilation}
    options |= {"stride": (size(1, 1, 2), size(1, 1, 3)), "padding": (size(0, 1, 2), size(0, 1))}
    outputs = groups * out_per_group
    tensors = {"input": torch.randn(image), "weight": torch.randn(outputs, per_group, *kernel), "bias": maybe(outputs)}
    return Case("partitioned_conv2d", tensors, options, 1)


def norm_and_linear() -> Case:
    leading = random.choice([(), (1,), (9,), (0,), (3, 5)])
    channels, outputs = size(24, 33, 64), size(1, 7, 33)
    large = random.choice([0.0, 0.0, 30.0, 1e4])
    tensors = {
        "input": torch.randn(*leading, channels),
        "norm_weight": maybe(channels),
        "norm_bias": maybe(channels),
        "weight": torch.randn(outputs, channels),
        "bias": torch.randn(outputs) + large if random.random() < 0.7 else None,
    }
    # Of few channels beside zeros only rounding errors are left of the gradient.
    is_referencing = random.random() < 0.6
    options = draw_slice(channels, least=1 if is_referencing else 12) | {"reference": is_referencing}
    return Case("partitioned_norm_linear", tensors, options, -1)


SLICED = {"linear": linear, "conv2d": conv2d, "norm_linear": norm_and_linear}


def run(function: Callable, case: Case, form: str, grad: Tensor | None, grad_layout: Callable, **options):
    """(grad_output, results by name): of a first backward and, where the graph is kept, of a second one."""
    leaves = {name: None if t is None else t.detach() for name, t in case.tensors.items()}
    start, stop = case.options["start"], case.options["stop"]
    if form == "full":
        leaves["full"] = leaves["input"]
        leaves["input"] = leaves["full"].narrow(case.axis, start, stop - start).clone()
    wanted = {name: t.requires_grad_() for name, t in leaves.items() if t is not None and name != "full"}
    output = function(**leaves, **case.options, **options)
    grad = torch.randn(output.shape).to(output.dtype) if grad is None else grad
    incoming = grad_layout(grad)
    first, second = (
        torch.autograd.grad(output, list(wanted.values()), incoming, retain_graph=True, materialize_grads=True)
        for _ in range(2)
    )
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True)), "a second backward differs"
    return incoming, {"output": output.detach()} | dict(zip(wanted, first, strict=True))


def magnitudes(case: Case, form: str, grad: Tensor) -> dict[str, Tensor]:
    """The same sums of terms that do not cancel: how large rounding can be."""
    absolute = Case(
        case.op, {n: None if t is None else t.double().abs() for n, t in case.tensors.items()}, case.options, case.axis
    )
    return run(getattr(reference, case.op), absolute, form, grad.double().abs(), dense)[1]


def check_sliced(name: str, backend: str) -> None:
    dtype = random.choice([d for d in DTYPES if backends.unsupported_dtype(SLICED[name]().op, backend, d) is None])
    case = SLICED[name]()
    layouts = {key: random.choice(LAYOUTS) for key in case.tensors}
    if name == "norm_linear":
        layouts["input"] = random.choice(LAYOUTS[:-1])  # a row that is one number has no deviation
    case.tensors = {key: None if t is None else layouts[key](t.to(dtype)) for key, t in case.tensors.items()}
    form, grad_layout = random.choice(["plain", "full"]), random.choice(LAYOUTS)
    try:
        compare_sliced(case, form, grad_layout, backend)
    except Exception as error:
        raise AssertionError(f"{backend} {dtype} {form} {grad_layout.__name__} {case}: {error}") from error


def compare_sliced(case: Case, form: str, grad_layout: Callable, backend: str) -> None:
    incoming, found = run(getattr(ops, case.op), case, form, None, grad_layout, backend=backend)
    assert backends.last_used(case.op).partition(":")[0] == backend
    # Dense: of a weight in some strides stock's own backward raises in float64.
    wide = {name: None if t is None else t.double().contiguous() for name, t in case.tensors.items()}
    exact = Case(case.op, wide, case.options, case.axis)
    _, expected = run(getattr(reference, case.op), exact, form, incoming.double(), dense)
    scales = normed_scales(wide, expected) if case.op == "partitioned_norm_linear" else magnitudes(case, form, incoming)
    for name, value in found.items():
        assert value.shape == expected[name].shape, name
        assert_close(name, value, expected[name], scale=scales[name].abs().max().item() if value.numel() else 0.0)


def normed_scales(tensors: Tensors, expected: Results) -> Results:
    """Of sums over numbers of both signs that the normalisation made: of the output, and of all gradients together."""
    weight, gain, shift = tensors["weight"], tensors["norm_weight"], tensors["norm_bias"]
    normed = (1 if gain is None else gain.abs()) + (0 if shift is None else shift.abs())
    gradients = [t.abs().max() for name, t in expected.items() if name != "output" and t.numel()]
    largest = torch.stack(gradients).max() if gradients else torch.zeros(())
    scales = dict.fromkeys(expected, largest)
    return scales | {"output": (weight * normed).norm(dim=1).max()}


def draw_block() -> tuple[Tensors, dict]:
    channels = size(1, 3, 8, 17)
    shape = (size(0, 1, 2, 3), channels, size(2, 5, 6), size(2, 3, 7))
    pool, relu_first = random.random() < 0.5, random.random() < 0.5
    has_residual = not pool and not relu_first and random.random() < 0.5
    exit_start, num_shared = sorted(random.choices(range(channels + 1), k=2))
    tensors = {
        "z": torch.randn(shape),
        "weight": maybe(channels),
        "bias": maybe(channels),
        "running_mean": torch.randn(channels),
        "running_var": torch.rand(channels) + 0.5,
        "residual": torch.randn(shape) if has_residual else None,
    }
    options = {"pool": pool, "relu_first": relu_first, "training": random.random() < 0.7}
    return tensors, options | {"num_shared": num_shared, "exit_start": exit_start}


def run_block(function: Callable, tensors: Tensors, options: dict, grads: list[Tensor] | None) -> tuple[list, dict]:
    leaves = {name: None if t is None else t.detach() for name, t in tensors.items()}
    wanted = {n: t.requires_grad_() for n, t in leaves.items() if t is not None and not n.startswith("running")}
    names = ("full", "shared", "average", "exit")
    produced = dict(zip(names, function(**leaves, **options), strict=True))
    outputs = [produced["shared"], produced["exit"]]
    if grads is None:
        grads = [random.choice(LAYOUTS)(torch.randn(t.shape, dtype=t.dtype)) for t in outputs]
    found = torch.autograd.grad(outputs, list(wanted.values()), grads, materialize_grads=True)
    results = {name: t.detach() for name, t in produced.items()}
    return grads, results | {f"grad_{n}": g for n, g in zip(wanted, found, strict=True)} | {
        name: leaves[name] for name in ("running_mean", "running_var")
    }


def check_block(backend: str) -> None:
    # In half precision rounding sends gradients past other ReLUs and pools: see test_norm_act.
    dtype = torch.float64 if backend == "aten" and random.random() < 0.5 else torch.float32
    tensors, options = draw_block()
    frozen = ("running_mean", "running_var") if options["training"] else ()
    tensors = {
        name: None
        if t is None
        else random.choice(LAYOUTS[: -1 if name in (*frozen, "z", "residual") else None])(t.to(dtype))
        for name, t in tensors.items()
    }
    wide = {name: None if t is None else t.double().contiguous() for name, t in tensors.items()}
    try:
        grads, found = run_block(ops.norm_act, tensors, options | {"backend": backend}, None)
        assert backends.last_used("norm_act").partition(":")[0] == backend
        _, expected = run_block(reference.norm_act, wide, options, [grad.double().contiguous() for grad in grads])
        largest = [t.abs().max().item() for n, t in expected.items() if n.startswith("grad") and t.numel()]
        for name, value in found.items():
            # Of gradients, what cancels before a normalisation is as good as what does not.
            assert_close(name, value, expected[name], scale=max([1e-2, *largest]) if name.startswith("grad") else 1.0)
    except Exception as error:
        given = {name: (tuple(t.shape), t.stride()) for name, t in tensors.items() if t is not None}
        raise AssertionError(f"norm_act {backend} {dtype} {given} {options}: {error}") from error


def draw_fixed() -> tuple[dict[str, Tensor | None], dict]:
    """The tensors of a convolution for evaluation, by name, and the options; no pixel may be too few for a pool."""
    groups, per_group, out_per_group = size(1, 1, 1, 4), size(1, 3, 16, 17, 35), size(1, 9, 16, 40)
    kernel, dilation = random.choice([1, 3, 3, 3, 5]), size(1, 1, 1, 2)
    geometry = ((size(1, 1, 2, 6),) * 2, (size(0, 1, 2), size(0, 1, 3)), (dilation,) * 2, groups)
    least = dilation * (kernel - 1) + 1
    image = torch.randn(size(0, 1, 3), groups * per_group, *(max(1, least + size(-1, 0, 1, 5, 11)) for _ in range(2)))
    outputs = groups * out_per_group
    weight = torch.randn(outputs, per_group, kernel, kernel)
    options = {"relu": random.random() < 0.7, "pool": random.random() < 0.4, "averages": random.random() < 0.5}
    spans = [edge + 2 * pad - least for edge, pad in zip(image.shape[2:], geometry[1], strict=True)]
    edges = [span // step + 1 if span >= 0 else 0 for span, step in zip(spans, geometry[0], strict=True)]
    if min(edges) < 1 + options["pool"]:
        return draw_fixed()
    affine = random.random() < 0.5
    tensors = {
        "input": image,
        "weight": weight,
        "bias": maybe(outputs),
        "scale": torch.randn(outputs) if affine else None,
        "shift": torch.randn(outputs) if affine else None,
        "residual": torch.randn(len(image), outputs, *edges)
        if not affine and not options["pool"] and random.random() < 0.5
        else None,
    }
    return tensors, {"geometry": geometry, **options}


def call_fixed(function: Callable, tensors: dict[str, Tensor | None], options: dict, **more) -> tuple:
    conv = ops.FixedConv(
        tensors["weight"], options["geometry"], *(tensors[name] for name in ("bias", "scale", "shift"))
    )
    asked = {name: value for name, value in options.items() if name != "geometry"}
    with torch.no_grad():
        return function(tensors["input"], conv, tensors["residual"], **asked, **more)


def check_fixed(backend: str) -> None:
    if backends.unsupported_dtype("conv_act", backend, torch.float32) is not None:
        pytest.skip(f"{backend} has no kernel of conv_act")
    dtype = random.choice([d for d in DTYPES if backends.unsupported_dtype("conv_act", backend, d) is None])
    drawn, options = draw_fixed()
    # A repeated number is the same everywhere: what cancels would have no scale.
    tensors = {n: None if t is None else random.choice(LAYOUTS[:-1])(t.to(dtype)) for n, t in drawn.items()}
    try:
        found = call_fixed(ops.conv_act, tensors, options, backend=backend)
        assert backends.last_used("conv_act").partition(":")[0] == backend
        wide = {name: None if t is None else t.double().contiguous() for name, t in tensors.items()}
        expected = call_fixed(reference.conv_act, wide, options)
        whole = call_fixed(
            reference.conv_act, {n: None if t is None else t.abs() for n, t in wide.items()}, options | {"pool": False}
        )
        scale = whole[0].max().item() if whole[0].numel() else 0.0
        for name, value, exact in zip(("feature", "average"), found, expected, strict=True):
            assert (value is None) == (exact is None), name
            if value is not None:
                assert value.shape == exact.shape, name
                assert_close(name, value, exact, scale=scale)
    except Exception as error:
        given = {name: (tuple(t.shape), t.stride()) for name, t in tensors.items() if t is not None}
        raise AssertionError(f"conv_act {backend} {dtype} {given} {options}: {error}") from error


def check_cases(name: str, backend: str, count: int) -> None:
    alone = {"norm_act": check_block, "conv_act": check_fixed}
    for number in range(count):
        # One of its own, by which a case is repeated without those before it.
        seed = random.randrange(2**31)
        state = random.getstate()
        random.seed(seed)
        torch.manual_seed(seed)
        try:
            alone[name](backend) if name in alone else check_sliced(name, backend)
        except AssertionError as error:
            raise AssertionError(f"case {number} (seed {seed}): {error}") from error
        random.setstate(state)


@pytest.mark.parametrize("name", [*SLICED, "norm_act", "conv_act"])
def test_random_cases(name, backend):
    check_cases(name, backend, 60)


@pytest.mark.slow
@pytest.mark.parametrize("name", [*SLICED, "norm_act", "conv_act"])
def test_many_random_cases(name, backend):
    check_cases(name, backend, 2000)


def test_a_case_that_is_wrong_is_found(monkeypatch):
    """Of a kernel that is off by one element, within a handful of cases."""
    compute = _common.ATEN["linear_grad_input"]

    def broken(*args) -> Tensor:
        grad = compute(*args).clone()
        if grad.numel():
            grad.view(-1)[-1] += math.pi
        return grad

    monkeypatch.setitem(_common.ATEN, "linear_grad_input", broken)
    with pytest.raises(AssertionError, match=r"case \d+ .*partitioned_linear.*input"):
        check_cases("linear", "aten", 30)
