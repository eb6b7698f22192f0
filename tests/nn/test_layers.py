"""Drop-in layers: the stock layer's parameters, names and values; the slice's gradients."""

import copy
import pickle

import pytest
import torch
from torch import nn

from dfs_engine.nn import (
    VARIANTS,
    Fork,
    PartitionedConv2d,
    PartitionedLinear,
    apply_layer,
    apply_linears,
    convert_layers,
)
from dfs_engine.runtime import backend as backends
from dfs_engine.validate.tolerances import assert_close

pytestmark = pytest.mark.usefixtures("poison")

START, STOP = 1, 4
CONVS = {
    "3x3": {"kernel_size": 3},
    "no-bias-stride": {"kernel_size": 3, "stride": 2, "padding": 1, "bias": False},
    "groups-dilation": {"kernel_size": (3, 2), "groups": 2, "dilation": 2},
    "depthwise": {"kernel_size": 3, "groups": 6, "padding": (1, 0)},
    "same": {"kernel_size": 3, "padding": "same"},
    "same-even": {"kernel_size": (2, 4), "padding": "same"},
    "same-dilated": {"kernel_size": (2, 3), "padding": "same", "dilation": (3, 2)},
    "valid": {"kernel_size": 3, "padding": "valid"},
    "reflect": {"kernel_size": 3, "padding": (1, 2), "padding_mode": "reflect"},
    "circular": {"kernel_size": 3, "padding": 2, "padding_mode": "circular"},
    "replicate": {"kernel_size": (3, 4), "padding": "same", "padding_mode": "replicate"},
}
LAYERS = {
    **{name: (nn.Conv2d, PartitionedConv2d, (6, 12), options, (2, 6, 8, 7)) for name, options in CONVS.items()},
    "linear": (nn.Linear, PartitionedLinear, (6, 5), {}, (3, 6)),
    "linear-no-bias": (nn.Linear, PartitionedLinear, (6, 5), {"bias": False}, (2, 3, 6)),
}
DD = {"dtype": torch.float64}


@pytest.fixture(params=LAYERS)
def kind(request):
    return LAYERS[request.param]


def from_stock(layer: nn.Module, **options) -> nn.Module:
    if isinstance(layer, nn.Conv2d):
        return PartitionedConv2d.from_conv(layer, **options)
    return PartitionedLinear.from_linear(layer, **options)


def masked(input: torch.Tensor, axis: int) -> torch.Tensor:
    mask = torch.zeros_like(input)
    mask.narrow(axis, START, STOP - START).fill_(1)
    return mask


def test_same_parameters_and_state_dict_under_the_same_seed(kind):
    stock_class, layer_class, sizes, options, _ = kind
    states = []
    for make in (stock_class, layer_class):
        torch.manual_seed(3)
        states.append(make(*sizes, **options).state_dict())
    assert list(states[0]) == list(states[1])
    assert all(torch.equal(*pair) for pair in zip(states[0].values(), states[1].values(), strict=True))


@pytest.mark.parametrize("reference", [True, False], ids=["reference", "no-reference"])
def test_values_and_gradients(kind, reference, backend, exact_dtype):
    stock_class, layer_class, sizes, options, shape = kind
    layer = layer_class(
        *sizes, **options, dtype=exact_dtype, start=START, stop=STOP, reference=reference, backend=backend
    )
    stock = stock_class(*sizes, **options, dtype=exact_dtype)
    stock.load_state_dict(layer.state_dict())
    axis = 1 if stock_class is nn.Conv2d else -1
    input = torch.randn(shape, requires_grad=True, dtype=exact_dtype)
    mask = masked(input, axis)
    # The published formulation: whole data, or zero, outside the slice, and no gradient there.
    seen = input * mask + (input * (1 - mask)).detach() * reference
    expected, output = stock(seen), layer(input)
    assert_close("output", output, expected)
    assert backends.last_used(f"partitioned_{'conv2d' if axis == 1 else 'linear'}").partition(":")[0] == backend
    grad_output = torch.randn_like(expected)
    grads = torch.autograd.grad(output, [input, *layer.parameters()], grad_output)
    grads_expected = torch.autograd.grad(expected, [input, *stock.parameters()], grad_output)
    for name, grad, reference_grad in zip(("input", "weight", "bias"), grads, grads_expected, strict=False):
        assert_close(f"grad_{name}", grad, reference_grad)
    assert not (grads[0] * (1 - mask)).any()


def test_from_stock_and_back_share_the_parameters(kind):
    stock_class, layer_class, sizes, options, shape = kind
    stock = stock_class(*sizes, **options).eval()
    stock.weight.requires_grad_(False)
    layer = from_stock(stock, start=START, stop=STOP, reference=True, backend="aten")
    back = layer.to_stock()
    assert type(layer) is layer_class
    assert type(back) is stock_class
    for other in (layer, back):
        assert other.weight is stock.weight
        assert other.bias is stock.bias
        assert not other.training
    assert (layer.start, layer.stop, layer.backend) == (START, STOP, "aten")
    input = torch.randn(shape)
    assert torch.equal(back(input), stock(input))
    assert_close("output", layer(input), stock(input).double())


def test_the_whole_range_is_the_default_and_equals_the_stock_layer(kind):
    _, layer_class, sizes, options, shape = kind
    layer = layer_class(*sizes, **options, **DD)
    assert (layer.start, layer.stop) == (0, sizes[0])
    input = torch.randn(shape, requires_grad=True, **DD)
    grads = [torch.autograd.grad(module(input).square().sum(), input)[0] for module in (layer, layer.to_stock())]
    assert_close("grad_input", *grads)


def test_repr_tells_the_slice(kind):
    stock_class, layer_class, sizes, options, _ = kind
    text = repr(layer_class(*sizes, **options, start=START, stop=STOP, reference=False))
    stock = repr(stock_class(*sizes, **options))
    assert text == f"Partitioned{stock[:-1]}, start=1, stop=4, reference=False)"


@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))], ids=["deepcopy", "pickle"]
)
def test_copies_compute_the_same_with_parameters_of_their_own(kind, duplicate):
    _, layer_class, sizes, options, shape = kind
    layer = layer_class(*sizes, **options, start=START, stop=STOP, reference=False, backend="aten")
    other = duplicate(layer)
    assert other.weight is not layer.weight
    inputs = [torch.randn(shape).requires_grad_() for _ in range(2)]
    inputs[1] = inputs[0].detach().clone().requires_grad_()
    outputs = layer(inputs[0]), other(inputs[1])
    assert torch.equal(*outputs)
    for output in outputs:
        output.sum().backward()
    assert torch.equal(inputs[0].grad, inputs[1].grad)
    assert repr(other) == repr(layer)


def test_device_and_dtype_are_passed_on(kind):
    _, layer_class, sizes, options, _ = kind
    layer = layer_class(*sizes, **options, device="meta", dtype=torch.bfloat16)
    assert all(p.device.type == "meta" and p.dtype is torch.bfloat16 for p in layer.parameters())


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"start": 3, "stop": 2}, ValueError, r"expected 0 <= start <= stop <= in_\w+=6, got start=3, stop=2"),
        ({"stop": 7}, ValueError, r"in_\w+=6, got start=0, stop=7"),
        ({"start": 1.5}, TypeError, r"expected an integer, got start=1\.5"),
        ({"backend": "cp"}, ValueError, r"backend: expected one of .*, got 'cp'\. Did you mean 'cpp'\?"),
    ],
    ids=["reversed", "too-wide", "float", "backend"],
)
def test_bad_arguments_are_refused_when_the_layer_is_made(options, error, message):
    for stock in (nn.Conv2d(6, 2, 3), nn.Linear(6, 2)):
        with pytest.raises(error, match=message):
            from_stock(stock, **options)


def test_wrong_channel_count_names_the_shapes():
    with pytest.raises(ValueError, match=r"^partitioned_conv2d: .* got input \(1, 5, 4, 4\), weight \(2, 6, 3, 3\)"):
        PartitionedConv2d(6, 2, 3)(torch.randn(1, 5, 4, 4))
    with pytest.raises(ValueError, match=r"^partitioned_linear: .* got input \(1, 5\) and weight \(2, 6\)"):
        PartitionedLinear(6, 2)(torch.randn(1, 5))


def test_convert_linears_keeps_parameters_names_and_values(backend, exact_dtype):
    class Lookalike(nn.Linear):
        def forward(self, input):
            return 2 * super().forward(input)

    model = nn.Sequential(
        nn.Linear(4, 3, dtype=exact_dtype),
        nn.Sequential(nn.GELU(), nn.Linear(3, 5, False, dtype=exact_dtype)),
        Lookalike(5, 2, dtype=exact_dtype),
    )
    input = torch.randn(2, 7, 4, dtype=exact_dtype)
    parameters, state, expected = list(model.parameters()), model.state_dict(), model(input)
    truth = torch.autograd.grad(expected.square().sum(), parameters)
    convert_layers(model, "dfs", backend)
    assert [type(model[0]), type(model[1][1]), type(model[2])] == [PartitionedLinear, PartitionedLinear, Lookalike]
    assert all(new is old for new, old in zip(model.parameters(), parameters, strict=True))
    assert list(model.state_dict()) == list(state)
    output = model(input)
    assert backends.last_used("partitioned_linear").partition(":")[0] == backend
    actual = torch.autograd.grad(output.square().sum(), parameters)
    for left, right in zip((output, *actual), (expected, *truth), strict=True):
        assert_close("result", left, right)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("reference", [True, False], ids=["reference", "no-reference"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
def test_apply_linears_is_each_layer_alone(variant, reference, bias):
    layers = [nn.Linear(7, width, bias, **DD) for width in (3, 5, 3)]
    feature = torch.randn(2, 3, 7, **DD, requires_grad=True)
    leaves = [feature, *(parameter for layer in layers for parameter in layer.parameters())]
    for layer in layers:
        convert_layers(layer, variant)
    for reading in Fork(0.4, variant, reference=reference, dim=-1)(feature):
        together, alone = apply_linears(layers, reading), [apply_layer(layer, reading) for layer in layers]
        for left, right in zip(together, alone, strict=True):
            assert_close("output", left, right)
        grads = [
            torch.autograd.grad([output.sin().sum() for output in outputs], leaves, retain_graph=True)
            for outputs in (together, alone)
        ]
        for left, right in zip(*grads, strict=True):
            assert_close("gradient", left, right)
