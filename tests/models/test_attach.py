"""`attach_exits`: somebody else's backbone under the contract of multi-exit models."""

import copy
import json
import logging
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from dfs_engine import attach_exits
from dfs_engine.methods import create_method, feature_widths
from dfs_engine.models import VARIANTS, MultiExitModel, create_model
from dfs_engine.models.backbone import Consumers
from dfs_engine.nn import PartitionedConv2d, PartitionedLinear
from dfs_engine.validate.tolerances import assert_close

NUM_CLASSES = 5


class Chain(nn.Module):
    """Convolutions of every kind, each the only reader of the module before it."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(inplace=True))
        self.depthwise = nn.Sequential(nn.Conv2d(6, 12, 3, padding="same", groups=6, bias=False), nn.Tanh())
        self.grouped = nn.Sequential(nn.Conv2d(12, 8, 3, stride=2, groups=2, padding=1), nn.ReLU(inplace=True))
        self.reflect = nn.Sequential(nn.Conv2d(8, 7, 3, padding=1, padding_mode="reflect"), nn.Sigmoid())
        self.dilated = nn.Sequential(nn.Conv2d(7, 9, 3, dilation=2), nn.AdaptiveAvgPool2d(1))
        self.classifier = nn.Linear(9, NUM_CLASSES)

    def forward(self, input):
        feature = self.dilated(self.reflect(self.grouped(self.depthwise(self.stem(input)))))
        return self.classifier(feature.flatten(1))


class Residual(nn.Module):
    """A feature read by convolutions, by a sum, and by both."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.conv1 = nn.Conv2d(6, 6, 3, padding=1)
        self.conv2 = nn.Conv2d(6, 10, 3, stride=2)
        self.shortcut = nn.Conv2d(6, 10, 3, stride=2, bias=False)
        self.join = nn.ReLU(inplace=True)
        self.head = nn.Linear(10, NUM_CLASSES)

    def forward(self, input):
        feature = self.stem(input)
        out = self.conv1(feature)
        out += feature
        feature = self.join(out)
        feature = torch.tanh(self.conv2(feature)) + self.shortcut(feature)
        return self.head(feature.mean((2, 3)))


class Dense(nn.Module):
    """Concatenations, and a feature that is read again much later."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 5, 3, padding=1)
        self.grow = nn.Sequential(nn.BatchNorm2d(5), nn.Conv2d(5, 4, 3, padding=1))
        self.mix = nn.Conv2d(9, 6, 1)
        self.head = nn.Linear(11, NUM_CLASSES)

    def forward(self, input):
        feature = self.stem(input)
        mixed = self.mix(torch.cat([feature, self.grow(feature)], 1))
        return self.head(torch.cat([F.max_pool2d(feature, 2), F.avg_pool2d(mixed, 2)], 1).mean((2, 3)))


class InPlace(nn.Module):
    """Features that the next operation writes into, each in another way."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 6, 3)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(6, 6, 3)
        self.conv3 = nn.Conv2d(6, 6, 3)
        self.conv4 = nn.Conv2d(6, 6, 3)
        self.head = nn.Linear(6, NUM_CLASSES)

    def forward(self, input):
        feature = self.conv2(self.relu(self.conv1(input)))
        feature = self.conv3(F.elu(feature, inplace=True))
        feature += 0.5
        return self.head(self.conv4(feature).sigmoid_().mean((2, 3)))


class Tokens(nn.Module):
    """(N, T, C): read by a linear, by a linear and a sum, and by a normalisation."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(4, 10)
        self.mlp = nn.Linear(10, 10)
        self.block = nn.Sequential(nn.Linear(10, 8), nn.GELU())
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, NUM_CLASSES)

    def forward(self, input, mask=None, scale=1.0):
        tokens = self.embed(input)
        tokens = self.block(tokens + self.mlp(tokens)) * scale
        tokens = tokens if mask is None else tokens * mask
        return self.head(self.norm(tokens).mean(1))


class Straight(nn.Sequential):
    """Each exit's module is a layer that reads the exit's before it."""

    def __init__(self):
        convs = [nn.Conv2d(3, 6, 3), nn.Conv2d(6, 4, 3), nn.Conv2d(4, 6, 3)]
        super().__init__(*convs, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, NUM_CLASSES))


class Untraceable(Chain):
    """Its Python code asks for values."""

    def forward(self, input):
        assert input.isfinite().all()
        return super().forward(input)


# name -> class, modules to attach at, (module: partitioned, detached), input shape
NETS = {
    "chain": (
        Chain,
        {
            "stem": (("depthwise.0",), ()),
            "depthwise": (("grouped.0",), ()),
            "grouped": (("reflect.0",), ()),
            "reflect": (("dilated.0",), ()),
        },
        (3, 10, 10),
    ),
    "straight": (Straight, {"0": (("1",), ()), "1": (("2",), ()), "2": ((), ("3",))}, (3, 8, 8)),
    "residual": (
        Residual,
        {"stem": (("conv1",), ("iadd",)), "join": (("conv2", "shortcut"), ())},
        (3, 9, 9),
    ),
    "dense": (Dense, {"stem": ((), ("grow.0", "cat", "max_pool2d")), "mix": ((), ("avg_pool2d",))}, (3, 8, 8)),
    "in_place": (
        InPlace,
        {
            "conv1": ((), ("relu",)),
            "conv2": ((), ("elu",)),
            "conv3": ((), ("iadd",)),
            "conv4": ((), ("sigmoid_",)),
        },
        (3, 12, 12),
    ),
    "tokens": (Tokens, {"embed": (("mlp",), ("add",)), "block": ((), ("mul",))}, (3, 4)),
    "untraceable": (
        Untraceable,
        {"stem": ((), ("whatever reads it",)), "grouped": ((), ("whatever reads it",))},
        (3, 10, 10),
    ),
}


def make(name, **options):
    """The model, and a batch for it."""
    net, at, shape = NETS[name]
    input = torch.randn(6, *shape, dtype=torch.float64)
    model = attach_exits(net().double(), list(at), example_input=input[:1], **options)
    return model, input, torch.randint(NUM_CLASSES, (6,))


def step(model, input, target):
    """Logits, every parameter's gradient, and every buffer after one forward and backward."""
    model.zero_grad()
    logits = model(input)
    torch.stack([F.cross_entropy(values, target) for values in logits]).sum().backward()
    results = {f"logits[{index}]": value for index, value in enumerate(logits)}
    for name, parameter in model.named_parameters():
        results[f"grad of {name}"] = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.clone()
    return results | {name: buffer.clone() for name, buffer in model.named_buffers()}


def assert_same(actual, expected):
    assert list(actual) == list(expected)
    largest = max(value.abs().max().item() for name, value in expected.items() if name.startswith("grad of "))
    for name, value in actual.items():
        # A gradient that cancels out (a bias before a batch norm) carries the rounding of its terms.
        # The mean of a channel may be nothing but rounding.
        scale = 1e-2 * largest if name.startswith("grad of ") else 1e-2
        assert_close(name, value.double(), expected[name].double(), scale=scale)


def with_other(model, make_backbone, names, input, **options):
    """The same weights, attached anew with other options."""
    other = attach_exits(make_backbone().to(input.dtype), names, example_input=input[:1], **options)
    other.load_state_dict(model.state_dict())
    return other


@pytest.fixture(params=NETS)
def name(request):
    return request.param


@pytest.mark.parametrize(
    ("beta", "reference", "exit_gradient"),
    [
        *((0.5, True, "own"), (0.3, False, "own"), (0.7, True, "whole"), (0.5, False, "whole")),
        *((0, True, "own"), (0, False, "own"), (1, True, "whole"), (1, False, "own")),
    ],
)
def test_all_variants_are_one(name, beta, reference, exit_gradient):
    net, at, _ = NETS[name]
    options = {"beta": beta, "reference": reference, "exit_gradient": exit_gradient}
    detach, input, target = make(name, variant="detach", **options)
    state = copy.deepcopy(detach.state_dict())
    expected = step(detach, input, target)
    detach.load_state_dict(state)  # batch norms have moved
    for others in ({"variant": "split"}, {"variant": "dfs", "backend": "aten"}, {"variant": "dfs"}):
        assert_same(step(with_other(detach, net, list(at), input, **others, **options), input, target), expected)


@pytest.mark.parametrize("reference", [True, False], ids=["reference", "no-reference"])
@pytest.mark.parametrize("variant", ["detach", "split", "dfs"])
def test_against_the_network_written_out(reference, variant):
    """Residual by hand, with `cat` and `detach` where the feature is read."""
    model, input, target = make("residual", variant=variant, reference=reference, beta=0.5)
    results = step(model, input, target)
    net = copy.deepcopy(model.backbone)
    heads = [copy.deepcopy(exit.head) for exit in model.exits]

    def cut(feature, start, stop):
        mask = torch.zeros(feature.size(1), 1, 1, dtype=feature.dtype)
        mask[start:stop] = 1
        rest = feature.detach() * (1 - mask)
        return feature * mask + (rest if reference else 0)

    def conv(layer, feature, stride=1, padding=0):
        return F.conv2d(feature, layer.weight, layer.bias, stride, padding)

    def classify(head, feature):
        (linear,) = [module for module in head.modules() if isinstance(module, nn.Linear)]
        return feature.mean((2, 3)) @ linear.weight.t() + linear.bias

    for parameter in [*net.parameters(), *(p for head in heads for p in head.parameters())]:
        parameter.grad = None
    first = conv(net.stem, input, padding=1)
    deeper = cut(first, 0, 3)
    second = (conv(net.conv1, deeper, padding=1) + deeper).relu()
    deeper = cut(second, 0, 3)
    third = torch.tanh(conv(net.conv2, deeper, 2)) + conv(net.shortcut, deeper, 2)
    logits = [
        classify(heads[0], cut(first, 3, 6)),
        classify(heads[1], cut(second, 3, 6)),
        third.mean((2, 3)) @ net.head.weight.t() + net.head.bias,
    ]
    torch.stack([F.cross_entropy(values, target) for values in logits]).sum().backward()
    expected = {f"logits[{index}]": value for index, value in enumerate(logits)}
    gradients = {f"grad of backbone.{key}": parameter.grad for key, parameter in net.named_parameters()}
    for index, head in enumerate(heads):
        gradients |= {f"grad of exits.{index}.head.{key}": value.grad for key, value in head.named_parameters()}
    assert_same(results, expected | {key: gradients[key] for key in results if key in gradients})


def test_dense_is_the_backbone_with_plain_exits(name):
    model, input, _ = make(name, variant="dense")
    logits, features = model(input, return_features=True)
    backbone = copy.deepcopy(model).to_backbone()
    assert_close("output", logits[-1], backbone(input))
    assert model.consumers.keys() == NETS[name][1].keys()
    for exit, values, feature in zip(model.exits, logits, features, strict=False):
        assert_close("logits", values, exit.head(feature))


@pytest.mark.parametrize("variant", VARIANTS)
def test_features_are_the_modules_outputs(name, variant):
    """Nobody writes into a feature that an exit has read."""
    model, input, _ = make(name, variant=variant)
    model.eval()
    logits, features = model(input, return_features=True)
    assert isinstance(model, MultiExitModel)
    assert model.num_exits == len(logits) == len(features) == len(NETS[name][1]) + 1
    assert model.num_classes == NUM_CLASSES
    assert model.variant == variant
    assert model.input_shape == NETS[name][2]
    backbone = copy.deepcopy(model).to_backbone()
    outputs = {}
    for path in NETS[name][1]:
        module = backbone.get_submodule(path)
        module.register_forward_hook(lambda _m, _i, output, path=path: outputs.update({path: output.detach().clone()}))
    expected = backbone(input)
    for path, feature in zip(NETS[name][1], features, strict=False):
        assert_close(f"feature {path}", feature, outputs[path])
    assert_close("output", logits[-1], expected)  # with referencing the forward is the backbone's
    classifier = [module for module in model.backbone.modules() if isinstance(module, nn.Linear)][-1]
    assert_close("last feature", classifier(features[-1]), logits[-1])


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("reference", [True, False], ids=["reference", "no-reference"])
@pytest.mark.parametrize("exit_gradient", ["own", "whole"])
def test_which_loss_reaches_which_channels(name, variant, reference, exit_gradient):
    model, input, target = make(name, variant=variant, reference=reference, exit_gradient=exit_gradient)
    logits, features = model(input, return_features=True)
    losses = [F.cross_entropy(values, target) for values in logits]
    is_whole = variant == "dense" or (exit_gradient == "whole" and reference)

    def reached(loss, feature):
        (grad,) = torch.autograd.grad(loss, feature, retain_graph=True, allow_unused=True)
        grad = torch.zeros_like(feature) if grad is None else grad
        dim = 1 if feature.dim() > 3 else -1
        k = round(0.5 * feature.size(dim))
        shared, own = grad.split([k, feature.size(dim) - k], dim)
        return bool(shared.any()), bool(own.any())

    for index, feature in enumerate(features[:-1]):
        assert reached(losses[index], feature) == (is_whole, True)
        for loss in losses[index + 1 :]:
            assert reached(loss, feature)[1] == (variant == "dense")
        assert reached(losses[-1], feature)[0]
        for loss in losses[:index]:
            assert reached(loss, feature) == (False, False)


@pytest.mark.parametrize("variant", VARIANTS)
def test_consumers(name, variant):
    at = NETS[name][1]
    model, _, _ = make(name, variant=variant)
    for path, (partitioned, detached) in at.items():
        found = model.consumers[path]
        everything = {*partitioned, *detached}
        if variant == "dense":
            assert not found.partitioned
            assert not found.detached
        elif variant == "dfs":
            assert set(found.partitioned) == set(partitioned)
            assert set(found.detached) == set(detached)
        else:
            assert {*found.partitioned, *found.detached} == everything
            assert variant == "split" or not found.partitioned
        for layer in map(model.backbone.get_submodule, found.partitioned):
            assert isinstance(layer, PartitionedConv2d | PartitionedLinear)
            assert (layer.start, layer.stop) == (0, round(0.5 * (layer.weight.size(1) * getattr(layer, "groups", 1))))
    if name == "chain" and variant == "split":  # only what two calls can compute
        assert [bool(found.partitioned) for found in model.consumers.values()] == [False, False, False, True]


# Behind these, an evaluation pass reads their output and nothing that was made before.
CUTS = {
    "chain": ["stem", "depthwise", "grouped", "reflect"],
    "straight": ["0", "1", "2"],
    "residual": ["stem", "join"],
    "dense": ["stem"],
    "in_place": ["conv1", "conv2", "conv3", "conv4"],
    "tokens": ["embed", "block"],
    "untraceable": [],
}


@pytest.mark.parametrize("variant", ["dense", "dfs"])
def test_samples_leave_where_nothing_else_is_read(name, variant):
    model, input = make(name, variant=variant)[0].eval(), make(name)[1]
    assert [exit.name for exit in model.exits if exit.is_cut] == CUTS[name]
    kept, expected = torch.arange(len(input)), model(input)
    seen = []

    def drop_first(index, logits):
        torch.testing.assert_close(logits, expected[index][kept[index:]])
        seen.append(index)
        return torch.arange(1, len(logits))

    found = model(input, on_exit=drop_first)
    assert [len(logits) for logits in found] == [len(input) - index for index in seen]
    assert len(found) == min(len(input), model.num_exits)


def count(name, **options):
    """FLOPs of one step as they run."""
    model, input, target = make(name, **options)
    with FlopCounterMode(display=False) as counter:
        step(model, input, target)
    return counter.get_total_flops()


@pytest.mark.parametrize("reference", [True, False], ids=["reference", "no-reference"])
@pytest.mark.parametrize("name", ["chain", "residual", "tokens"])
def test_a_step_computes_less(name, reference):
    assert count(name, variant="dfs", reference=reference) < count(name, variant="detach", reference=reference)


def test_flops_saved_are_those_of_the_slices():
    """beta 0.5: half of grad_input of conv1 (9 x 9), conv2 and shortcut (9 x 9 -> 4 x 4) is never computed."""
    convs = 2 * (6 // 2) * 9 * (6 * 9 * 9 + 2 * 10 * 4 * 4)
    # Each of the two heads: half of grad_input of a linear, for one average per channel.
    heads = 2 * 2 * (6 // 2) * NUM_CLASSES
    assert count("residual", variant="detach") - count("residual", variant="dfs") == 6 * (convs + heads)


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_callers_modules_stay_and_come_back(name, variant):
    net, at, shape = NETS[name]
    backbone = net().double()
    modules, parameters = dict(backbone.named_modules()), dict(backbone.named_parameters())
    classes = {path: type(module) for path, module in modules.items()}
    attributes = {path: set(vars(module)) for path, module in modules.items()}
    keys = list(backbone.state_dict())
    input = torch.randn(4, *shape, dtype=torch.float64)
    expected = backbone.eval()(input)
    model = attach_exits(backbone, list(at), variant=variant, example_input=input)
    assert model.backbone is backbone
    assert list(model.backbone.state_dict()) == keys
    assert [key.removeprefix("backbone.") for key in model.state_dict() if key.startswith("backbone.")] == keys
    assert all(not module.training for module in backbone.modules())
    model(input)
    assert model.to_backbone() is backbone
    for path, module in backbone.named_modules():
        assert module is modules[path]
        assert type(module) is classes[path]
        assert set(vars(module)) == attributes[path]
        assert not module._forward_hooks
    assert all(parameter is parameters[path] for path, parameter in backbone.named_parameters())
    assert torch.equal(backbone(input), expected)
    again = attach_exits(backbone, list(at), variant="dfs", example_input=input)  # anew
    assert_close("output", again(input)[-1], expected)


def test_attaching_changes_no_state_and_keeps_modes(name):
    net, at, shape = NETS[name]
    backbone = net()
    next(backbone.children()).eval()  # a part that the caller has frozen
    next(backbone.parameters()).requires_grad_(False)
    modes = [module.training for module in backbone.modules()]
    state = copy.deepcopy(backbone.state_dict())
    model = attach_exits(backbone, list(at), example_input=torch.randn(2, *shape))
    assert [module.training for module in backbone.modules()] == modes
    assert all(torch.equal(value, state[key]) for key, value in backbone.state_dict().items())
    assert not next(backbone.parameters()).requires_grad
    assert all(parameter.grad is None for parameter in model.parameters())


def test_exit_and_reached_parameters(name):
    model, input, _ = make(name, variant="dense")
    logits = model(input)
    every = list(model.parameters())
    for index in range(model.num_exits):
        reached, own = set(model.reached_parameters(index)), set(model.exit_parameters(index))
        assert own <= reached
        grads = torch.autograd.grad(logits[index].square().sum(), every, retain_graph=True, allow_unused=True)
        assert {parameter for parameter, grad in zip(every, grads, strict=True) if grad is not None} == reached
    names = {key for key, parameter in model.backbone.named_parameters() if parameter in own}
    assert names in ({"head.weight", "head.bias"}, {"classifier.weight", "classifier.bias"}, {"5.weight", "5.bias"})
    with pytest.raises(IndexError):
        model.exit_parameters(model.num_exits)


def test_copies_are_independent(name):
    model, input, target = make(name)
    model.eval()
    expected = step(model, input, target)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert_same(step(other, input, target), expected)
        other.to_backbone()
    assert_same(step(model, input, target), expected)


@pytest.mark.slow
def test_compiles_whole():
    model, input, target = make("residual")
    expected = step(model, input, target)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    model.zero_grad()
    logits = compiled(input)
    torch.stack([F.cross_entropy(values, target) for values in logits]).sum().backward()
    for key, parameter in model.named_parameters():
        assert_close(key, parameter.grad, expected[f"grad of {key}"])


class ConvHead(nn.Module):
    def __init__(self, channels, num_classes):
        super().__init__()
        self.conv = nn.Conv2d(channels, 4, 3)
        self.linear = nn.Linear(4, num_classes)

    def forward(self, feature):
        return self.linear(self.conv(feature).relu().mean((2, 3)))


class RudeHead(ConvHead):
    """Writes into what it gets."""

    def forward(self, feature):
        return super().forward(feature.relu_())


class OpaqueHead(ConvHead):
    def forward(self, feature):
        return super().forward(feature) if feature.isfinite().all() else feature.new_zeros(len(feature), NUM_CLASSES)


@pytest.mark.parametrize("head", [ConvHead, RudeHead, OpaqueHead])
@pytest.mark.parametrize("reference", [True, False], ids=["reference", "no-reference"])
@pytest.mark.parametrize("exit_gradient", ["own", "whole"])
def test_heads_of_ones_own(head, reference, exit_gradient):
    options = {"head": head, "reference": reference, "exit_gradient": exit_gradient, "beta": 0.3}
    detach, input, target = make("residual", variant="detach", **options)
    expected = step(detach, input, target)
    for variant in ("split", "dfs"):
        other = with_other(detach, Residual, ["stem", "join"], input, variant=variant, **options)
        assert_same(step(other, input, target), expected)
        is_partitioned = head is ConvHead and (exit_gradient == "own" or not reference)
        assert isinstance(other.exits[0].head.conv, PartitionedConv2d) == is_partitioned
    dense, _, _ = make("residual", variant="dense", head=head)
    logits, features = dense(input, return_features=True)
    assert_close("logits", logits[1], dense.exits[1].head(features[1].clone()))


def test_two_dimensional_features_need_a_head():
    backbone = nn.Sequential(nn.Flatten(), nn.Linear(12, 6), nn.ReLU(inplace=True), nn.Linear(6, NUM_CLASSES))
    input = torch.randn(3, 3, 2, 2)
    with pytest.raises(
        ValueError, match=r"at: expected modules that return images .* got '2', .*\(3, 6\).*Give a head"
    ):
        attach_exits(backbone, ["2"], example_input=input)
    model = attach_exits(backbone, ["2"], head=nn.Linear, example_input=input)
    assert model.consumers["2"].partitioned == ("3",)
    assert isinstance(model.exits[0].head, PartitionedLinear)
    assert (model.exits[0].head.start, model.exits[0].head.stop) == (3, 6)
    assert [values.shape for values in model(input)] == [(3, NUM_CLASSES)] * 2


def test_a_mode_that_reads_more():
    """An auxiliary branch that runs in training only is a consumer all the same."""

    class Auxiliary(Chain):
        def forward(self, input):
            feature = self.stem(input)
            if self.training:
                feature = feature + 0 * feature.square()
            return self.classifier(self.dilated(self.reflect(self.grouped(self.depthwise(feature)))).flatten(1))

    model = attach_exits(Auxiliary(), ["stem"], example_input=torch.randn(1, 3, 9, 9))
    assert set(model.consumers["stem"].detached) == {"square", "add"}
    assert model.consumers["stem"].partitioned == ("depthwise.0",)


def test_a_layer_called_twice_stays_stock():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.conv, self.head = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), nn.Linear(4, NUM_CLASSES)

        def forward(self, input):
            return self.head(self.conv(self.conv(self.stem(input))).mean((2, 3)))

    model = attach_exits(Twice(), ["stem"], example_input=torch.randn(1, 3, 4, 4))
    assert model.consumers["stem"] == Consumers((), ("conv",), False)


def test_hooks_and_aliases_of_a_partitioned_layer_hold():
    class Aliased(Residual):
        def __init__(self):
            super().__init__()
            self.listed = [self.conv1]

        def forward(self, input):
            feature = self.stem(input)
            return self.head((self.listed[0](feature).relu() + feature).repeat(1, 2, 1, 1)[:, :10].mean((2, 3)))

    backbone = Aliased()
    calls = []
    backbone.conv1.register_forward_hook(lambda *_: calls.append(1))
    model = attach_exits(backbone, ["stem"], example_input=torch.randn(1, 3, 5, 5))
    calls.clear()
    model(torch.randn(2, 3, 5, 5))
    assert calls == [1]
    assert isinstance(backbone.listed[0], PartitionedConv2d)


class Odd(nn.Module):
    """Modules that cannot have an exit."""

    def __init__(self):
        super().__init__()
        self.conv, self.relu, self.pair = nn.Conv2d(3, 4, 1), nn.ReLU(), Pair()
        self.idle = nn.Conv2d(4, 4, 1)
        self.last = nn.Conv2d(4, 4, 1)
        self.head = nn.Linear(4, NUM_CLASSES)

    def forward(self, input):
        first, second = self.pair(self.relu(self.conv(input)))
        return self.head(self.relu(self.last(first + second)).mean((2, 3)))


class Pair(nn.Module):
    def forward(self, input):
        return input, input


@pytest.mark.parametrize(
    ("at", "options", "error", "message"),
    [
        (["convv"], {}, ValueError, r"at: expected names .* got 'convv'. Did you mean 'conv'"),
        (["layer9.zzz"], {}, ValueError, r"got 'layer9.zzz'\.$"),
        ("conv", {}, TypeError, r"at: expected a list of module names, got 'conv'. Write at=\['conv'\]"),
        ([], {}, ValueError, r"at: expected one or more modules, each once, got \[\]"),
        (["conv", "conv"], {}, ValueError, r"at: expected one or more modules, each once, got \['conv', 'conv'\]"),
        (["relu"], {}, ValueError, "at: expected modules that run once in a forward pass, got 'relu'"),
        (["idle"], {}, ValueError, "at: expected modules that run in a forward pass, got idle"),
        (["pair"], {}, TypeError, "at: expected modules that return a tensor, got 'pair', which returns tuple"),
        (["last", "conv"], {}, ValueError, r"order of the forward pass, \['conv', 'last'\], got \['last', 'conv'\]"),
        (["conv"], {"num_classes": 7}, ValueError, "num_classes: expected 5, .* got 7"),
        (["conv"], {"beta": 2}, ValueError, "beta: expected a number in"),
        (["conv"], {"variant": "dsf"}, ValueError, "Did you mean 'dfs'"),
        (["conv"], {"exit_gradient": "all"}, ValueError, "exit_gradient: expected one of own, whole"),
        (["conv"], {"backend": "cuda"}, ValueError, "backend: expected one of"),
    ],
)  # fmt: skip
def test_errors_leave_the_backbone_alone(at, options, error, message):
    backbone = Odd()
    with pytest.raises(error, match=message):
        attach_exits(backbone, at, example_input=torch.randn(1, 3, 4, 4), **options)
    assert not any(module._forward_hooks for module in backbone.modules())
    assert type(backbone.last) is nn.Conv2d


def test_an_output_that_is_no_logits():
    with pytest.raises(ValueError, match=r"backbone: expected logits .* got an output of shape \(1, 4, 4, 4\)"):
        attach_exits(nn.Sequential(nn.Conv2d(3, 4, 1)), ["0"], example_input=torch.randn(1, 3, 4, 4))
    with pytest.raises(TypeError, match="backbone: expected one whose output is a tensor, got a tuple"):
        attach_exits(nn.Sequential(nn.Conv2d(3, 4, 1), Pair()), ["0"], example_input=torch.randn(1, 3, 4, 4))


def test_without_an_example():
    backbone = nn.Sequential(nn.Conv2d(2, 4, 7, 7), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))
    assert attach_exits(backbone, ["1"]).input_shape == (2, 224, 224)
    with pytest.raises(
        ValueError, match=r"example_input: expected an input that the backbone takes, got none.* Give one"
    ):
        attach_exits(nn.Sequential(nn.Conv2d(3, 4, 1), nn.Flatten(), nn.Linear(16, 2)), ["0"])
    with pytest.raises(ValueError, match=r"example_input: expected an input of a backbone without nn.Conv2d"):
        attach_exits(Tokens(), ["embed"])


def test_the_log_says_which_and_why(caplog):
    with caplog.at_level(logging.INFO):
        make("residual")
    messages = [record.getMessage() for record in caplog.records if record.name.endswith("attach")]
    assert messages == [
        "attach_exits: stem is read by partitioned layers: conv1; in the detach form, which saves no work: iadd",
        "attach_exits: join is read by partitioned layers: conv2, shortcut",
    ]
    caplog.clear()
    make("untraceable")
    (record,) = [record for record in caplog.records if record.name.endswith("attach")]
    assert record.levelno == logging.WARNING
    assert "cannot trace the backbone (TraceError: " in record.getMessage()
    assert "whatever reads stem, grouped gets the detach form" in record.getMessage()


def test_a_feature_that_no_partitioned_layer_reads_is_warned_of(caplog):
    """Once, with what reads it and what to name instead; what is proposed does save work."""

    def attach(*at, **options):
        caplog.clear()
        model = attach_exits(NormsFirst(), at, example_input=torch.randn(2, 3, 6, 6), **options)
        return model, [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]

    _, (message,) = attach("stem", "relu")
    assert "no nn.Conv2d or nn.Linear reads stem itself, but norm, add: right gradients, no work saved" in message
    assert "Put 'relu' into `at` in its place" in message
    model, messages = attach("relu")
    assert model.consumers["relu"].partitioned == ("conv",)
    assert not messages
    _, (message,) = attach("conv")
    assert "Put another module into `at`, whose output one reads, to save it" in message
    for options in ({"variant": "dense"}, {"variant": "detach"}, {"beta": 1.0}):  # nothing to save, or not asked to
        assert not attach("stem", **options)[1]


class NormsFirst(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.norm, self.relu = nn.Conv2d(3, 6, 1), nn.BatchNorm2d(6), nn.ReLU()
        self.conv, self.head = nn.Conv2d(6, 6, 3, padding=1), nn.Linear(6, NUM_CLASSES)

    def forward(self, input):
        feature = self.stem(input)
        return self.head((self.conv(self.relu(self.norm(feature))) + feature).mean((2, 3)))


def test_a_pass_that_skips_an_exit():
    class Skips(Chain):
        skip = False

        def forward(self, input):
            return super().forward(input) if not self.skip else self.classifier(input.new_zeros(1, 9))

    model = attach_exits(Skips(), ["stem"], example_input=torch.randn(1, 3, 9, 9))
    model.backbone.skip = True
    with pytest.raises(RuntimeError, match="expected 'stem' to run in every forward pass"):
        model(torch.randn(1, 3, 9, 9))


def test_training_methods_take_it():
    model, input, target = make("residual")
    model.float()
    for method in ("joint", "byot"):
        loss = create_method(method, model)
        logits, features = loss.run(model, input.float())
        loss(logits, target, features).backward()
    assert feature_widths(model) == [6, 6, 10]


def test_its_config_says_what_it_is():
    model, _, _ = make("residual", beta=0.25)
    config = model.get_config()
    assert config["name"] == f"{Residual.__module__}.Residual"
    assert (config["at"], config["beta"], config["num_classes"]) == (["stem", "join"], 0.25, NUM_CLASSES)
    assert json.loads(json.dumps(config)) == config
    with pytest.raises(ValueError, match="model: expected one of"):
        create_model(**config)


def torchvision_model(name, **options):
    return lambda: getattr(pytest.importorskip("torchvision.models"), name)(num_classes=NUM_CLASSES, **options)


def timm_model(name):
    def build():
        timm = pytest.importorskip("timm")
        if not timm.is_model(name):
            pytest.skip(f"timm {timm.__version__} has no {name}")
        return timm.create_model(name, num_classes=NUM_CLASSES)

    return build


# maker, {module: partitioned layers}, image size
BACKBONES = {
    "resnet18": (
        torchvision_model("resnet18"),
        {"layer1": ("layer2.0.conv1", "layer2.0.downsample.0"), "layer2.0": ("layer2.1.conv1",)},
        32,
    ),
    "mobilenet_v2": (
        torchvision_model("mobilenet_v2", width_mult=0.25),
        {"features.3": ("features.4.conv.0.0",), "features.5": ("features.6.conv.0.0",)},
        48,
    ),
    "densenet": (
        torchvision_model("DenseNet", growth_rate=4, block_config=(2, 2, 2), num_init_features=8),
        {"features.denseblock1": (), "features.transition2": ()},
        48,
    ),
    "timm resnet": (timm_model("test_resnet"), {"layer1": ("layer2.0.conv1",), "layer2": ("layer3.0.conv1",)}, 48),
    "timm convnext": (timm_model("test_convnext"), {"stages.1.blocks.0": ("stages.1.blocks.1.conv_dw",)}, 64),
    "timm efficientnet": (timm_model("test_efficientnet"), {"blocks.2": ("blocks.3.0.conv_pw",)}, 48),
}


@pytest.mark.parametrize(
    "backbone",
    [
        pytest.param(name, marks=[] if name in ("resnet18", "densenet", "timm resnet") else pytest.mark.slow)
        for name in BACKBONES
    ],
)
def test_backbones_of_other_libraries(backbone):
    build, partitioned, size = BACKBONES[backbone]
    net = build().double()
    for module in net.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    input, target = torch.randn(4, 3, size, size, dtype=torch.float64), torch.randint(NUM_CLASSES, (4,))
    at = {"at": list(partitioned), "example_input": input[:1]}
    model = attach_exits(net, variant="detach", **at)
    heads, state = [exit.head for exit in model.exits], copy.deepcopy(model.state_dict())
    results, flops = {}, {}
    for variant in ("detach", "split", "dfs"):
        made = iter(heads)
        model = attach_exits(model.to_backbone(), variant=variant, head=lambda *_, made=made: next(made), **at)
        model.load_state_dict(state)
        with FlopCounterMode(display=False) as counter:
            results[variant] = step(model, input, target)
        flops[variant] = counter.get_total_flops()
    assert_same(results["split"], results["detach"])
    assert_same(results["dfs"], results["detach"])
    assert {path: found.partitioned for path, found in model.consumers.items()} == partitioned
    logits, features = model(input, return_features=True)
    heads_save = sum(2 * len(input) * round(0.5 * feature.size(1)) * NUM_CLASSES for feature in features[:-1])
    saved = flops["detach"] - flops["dfs"]
    assert saved > heads_save if any(partitioned.values()) else saved == heads_save
    for index, feature in enumerate(features[:-1]):
        k = round(0.5 * feature.size(1))
        for loss, live in ((logits[index], [False, True]), (logits[-1], [True, False])):
            (grad,) = torch.autograd.grad(loss.square().sum(), feature, retain_graph=True)
            assert [bool(grad[:, :k].any()), bool(grad[:, k:].any())] == live
