"""Fork: dense, detach, split and dfs on one consumer of each kind. `detach`, written out by hand here, is the truth."""

import pytest
import torch
from torch import nn

from dfs_engine.nn import (
    VARIANTS,
    ExitHead,
    Fork,
    add,
    apply_layer,
    convert_layers,
    global_avg_pool,
    map_channels,
    readings,
    select_samples,
    whole,
)
from dfs_engine.validate.tolerances import assert_close

pytestmark = pytest.mark.usefixtures("poison")

BETAS = [0, 0.1, 0.3, 0.5, 0.7, 0.9, 1]
CHANNELS = 7
DD = {"dtype": torch.float64}


def by_hand(feature, start, stop, reference, axis):
    """Published formulation: a tensor with gradient in [start, stop), everything else detached or zero."""
    mask = torch.zeros_like(feature)
    mask.narrow(axis, start, stop - start).fill_(1)
    return feature * mask + (feature * (1 - mask)).detach() * reference


def readers(beta, exit_gradient, reference):
    """The slices that the deeper path and the exit train, from the definition in the paper."""
    k = round(beta * CHANNELS)
    whole = exit_gradient == "whole" and reference and beta < 1
    return (0, k), ((0 if whole else k), CHANNELS)


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("reference", [True, False], ids=["reference", "no-reference"])
@pytest.mark.parametrize("exit_gradient", ["own", "whole"])
@pytest.mark.parametrize("variant", ["detach", "split", "dfs"])
@pytest.mark.parametrize("kind", ["images", "tokens"])
def test_both_readers_against_the_definition(beta, reference, exit_gradient, variant, kind):
    if kind == "images":
        axis, feature = 1, torch.randn(3, CHANNELS, 5, 4, **DD)
        deeper, exit = nn.Conv2d(CHANNELS, 4, 3, padding=1, **DD), ExitHead(CHANNELS, 3, bias=True, **DD)
        by_module = (lambda reading: exit(*reading)), lambda seen: exit.linear(seen.mean((2, 3)))
    else:
        axis, feature = -1, torch.randn(2, 3, CHANNELS, **DD)
        deeper, exit = nn.Linear(CHANNELS, 4, **DD), nn.Linear(CHANNELS, 3, bias=False, **DD)
        by_module = (lambda reading: apply_layer(exit, reading)), exit
    parameters = [*deeper.parameters(), *exit.parameters()]
    for layer in (deeper, exit):
        convert_layers(layer, variant)
    feature.requires_grad_()
    fork = Fork(beta, variant, reference=reference, exit_gradient=exit_gradient, dim=axis)

    read = fork(feature)
    outputs = apply_layer(deeper, read[0]), by_module[0](read[1])
    slices = readers(beta, exit_gradient, reference)
    seen = [by_hand(feature, *columns, reference, axis) for columns in slices]
    expected = deeper(seen[0]), by_module[1](seen[1])
    for name, output, truth in zip(("deeper", "exit"), outputs, expected, strict=True):
        assert_close(name, output, truth)

    grads = [torch.randn_like(output) for output in outputs]
    actual = torch.autograd.grad(outputs, [feature, *parameters], grads, retain_graph=True)
    truth = torch.autograd.grad(expected, [feature, *parameters], grads, retain_graph=True)
    for index, pair in enumerate(zip(actual, truth, strict=True)):
        assert_close("feature" if index == 0 else f"parameter {index}", *pair)
    # Each reader alone leaves the channels that are not its own exactly at zero.
    for output, grad, (start, stop) in zip(outputs, grads, slices, strict=True):
        (alone,) = torch.autograd.grad(output, feature, grad, retain_graph=True, allow_unused=True)
        if alone is not None:
            outside = [alone.narrow(axis, 0, start), alone.narrow(axis, stop, CHANNELS - stop)]
            assert not any(part.any() for part in outside)


def test_dense_gives_the_feature_itself_to_both():
    feature = torch.randn(2, 4, 3, 3)
    assert all(reading == (feature,) for reading in Fork(0.5, "dense")(feature))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("reference", [True, False], ids=["reference", "no-reference"])
def test_empty_batch(variant, reference):
    feature = torch.randn(0, 4, 5, 5, requires_grad=True)
    conv, head = nn.Conv2d(4, 3, 3), ExitHead(4, 2)
    for layer in (conv, head):
        convert_layers(layer, variant)
    deeper, exit = Fork(0.5, variant, reference=reference)(feature)
    outputs = apply_layer(conv, deeper), head(*exit)
    assert [tuple(output.shape) for output in outputs] == [(0, 3, 3, 3), (0, 2)]
    sum(output.sum() for output in outputs).backward()
    assert feature.grad.shape == feature.shape
    assert not conv.weight.grad.any()


def test_the_pooled_gradient_is_not_spread_over_the_pixels():
    """What reaches the fork from a pooled exit is one number per image and channel, read with stride 0."""
    feature = torch.randn(2, 6, 5, 5, requires_grad=True)
    _, exit = Fork(0.5, "dfs")(feature)
    received = []
    exit[0].register_hook(received.append)
    linear = nn.Linear(6, 3)
    convert_layers(linear, "dfs")
    apply_layer(linear, global_avg_pool(exit)).sum().backward()
    assert received[0].shape == (2, 3, 5, 5)
    assert received[0].stride()[2:] == (0, 0)


@pytest.mark.parametrize("variant", ["detach", "split", "dfs"])
@pytest.mark.parametrize("reference", [True, False], ids=["reference", "no-reference"])
@pytest.mark.parametrize("exit_gradient", ["own", "whole"])
@pytest.mark.parametrize("beta", [0.25, 0.5, 1])
@pytest.mark.parametrize(
    ("groups", "out_channels", "bias"), [(8, 8, False), (8, 16, True), (4, 8, True), (2, 6, False)], ids=str
)
def test_grouped_convolutions(variant, reference, exit_gradient, beta, groups, out_channels, bias):
    """Depthwise, two outputs a channel, and groups that the slice does or does not cut."""
    options = {"stride": 2, "padding": 1, "groups": groups, "bias": bias, "dtype": torch.float64}
    conv, feature = nn.Conv2d(8, out_channels, 3, **options), torch.randn(2, 8, 5, 4, dtype=torch.float64)
    feature.requires_grad_()
    leaves = [feature, *conv.parameters()]
    convert_layers(conv, variant)
    read = Fork(beta, variant, reference=reference, exit_gradient=exit_gradient)(feature)
    k, whole_exit = round(8 * beta), exit_gradient == "whole" and reference and beta < 1
    for reading, columns in zip(read, ((0, k), (0 if whole_exit else k, 8)), strict=True):
        output, expected = apply_layer(conv, reading), conv(by_hand(feature, *columns, reference, 1))
        assert_close("output", output, expected)
        grad = torch.randn_like(output)
        actual, truth = (torch.autograd.grad(one, leaves, grad, materialize_grads=True) for one in (output, expected))
        for index, pair in enumerate(zip(actual, truth, strict=True)):
            assert_close(f"gradient {index}", *pair)
        assert torch.equal(actual[0] == 0, truth[0] == 0)


def test_split_convolves_a_depthwise_layer_in_two_calls():
    """So that stock autograd computes no gradient of the other part."""
    feature = torch.randn(1, 6, 5, 5, requires_grad=True)
    deeper, _ = Fork(0.5, "split")(feature)
    conv = nn.Conv2d(6, 6, 3, groups=6)
    convert_layers(conv, "split")
    with torch.profiler.profile() as recorded:
        apply_layer(conv, deeper)
    assert sum(event.count for event in recorded.key_averages() if event.key == "aten::conv2d") == 2


def test_readings_one_after_the_other_are_told_apart():
    whole_one, other = (torch.randn(2, 4),), (torch.randn(2, 4),)
    first, second = Fork(0.5, "dfs")(torch.randn(2, 4, 3, 3))
    for parts in (
        [],
        [whole_one],
        [whole_one, other],
        [first],
        [whole_one, first],
        [first, second],
        [first, other, second],
    ):
        found = readings(tuple(item for part in parts for item in part))
        assert all(a is b for left, right in zip(found, parts, strict=True) for a, b in zip(left, right, strict=True))


def test_what_takes_whole_features_only_gets_the_detach_form(caplog):
    """A stock layer, or one that a library has put around ours: the same gradients, and it is said once."""

    class Adapter(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.base, self.extra = nn.Linear(6, 3, **DD), nn.Linear(6, 3, **DD)
            convert_layers(self.base, "dfs")

        def forward(self, input: torch.Tensor, *others: object) -> torch.Tensor:
            return self.base(input, *others) + self.extra(input)

    layer, feature = Adapter(), torch.randn(2, 6, **DD, requires_grad=True)
    leaves = [feature, *layer.parameters()]
    deeper, _ = Fork(0.5, "dfs", dim=-1)(feature)
    outputs = apply_layer(layer, deeper), layer(by_hand(feature, 0, 3, True, -1))
    grads = [torch.autograd.grad(output.square().sum(), leaves) for output in outputs]
    for index, pair in enumerate(zip(*grads, strict=True)):
        assert_close(f"gradient {index}", *pair)
    apply_layer(layer, deeper)
    (said,) = caplog.messages
    assert "Adapter takes whole features only" in said


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (
            {"variant": "dsf"},
            ValueError,
            r"variant: expected one of dense, detach, split, dfs, got 'dsf'\. Did you mean 'dfs'\?",
        ),
        ({"beta": 1.5}, ValueError, "beta: expected a number"),
        ({"beta": "half"}, TypeError, "beta: expected a number"),
        ({"exit_gradient": "all"}, ValueError, "exit_gradient: expected one of own, whole"),
        ({"backend": "cuda"}, ValueError, "backend: expected one of"),
    ],
    ids=["variant", "beta-range", "beta-type", "exit_gradient", "backend"],
)
def test_bad_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        Fork(**arguments)


def test_fork_has_no_parameters_and_tells_its_settings():
    fork = Fork(0.3, "detach", reference=False, exit_gradient="whole")
    assert not fork.state_dict()
    assert repr(fork) == "Fork(beta=0.3, variant=detach, reference=False, exit_gradient=whole)"


def run_add(feature, branch, fork, reader, through=lambda compute, *inputs: compute(*inputs)):
    """The sum and its gradients; `through` calls the computation."""
    feature, branch = feature.clone().requires_grad_(), branch.clone().requires_grad_()
    output = through(lambda f, b: add(fork(f)[reader], b), feature, branch)
    grad = torch.linspace(-1, 2, output.numel(), dtype=output.dtype).reshape(output.shape).sin()
    return output, *torch.autograd.grad(output, [feature, branch], grad, materialize_grads=True)


@pytest.mark.parametrize("beta", [0, 0.3, 1])
@pytest.mark.parametrize("reference", [True, False], ids=["reference", "no-reference"])
@pytest.mark.parametrize("exit_gradient", ["own", "whole"])
@pytest.mark.parametrize("variant", ["detach", "split", "dfs"])
@pytest.mark.parametrize(
    ("axis", "shape"), [(1, (3, CHANNELS, 5, 4)), (-1, (2, 3, CHANNELS))], ids=["images", "tokens"]
)
def test_residual_add_against_the_definition(beta, reference, exit_gradient, variant, axis, shape):
    feature, branch = torch.randn(2, *shape, dtype=torch.float64)
    fork = Fork(beta, variant, reference=reference, exit_gradient=exit_gradient, dim=axis)
    for reader, (start, stop) in enumerate(readers(beta, exit_gradient, reference)):
        output, grad_feature, grad_branch = run_add(feature, branch, fork, reader)
        assert_close("sum", output, by_hand(feature, start, stop, reference, axis) + branch)
        mask = torch.zeros_like(feature)
        mask.narrow(axis, start, stop - start).fill_(1)
        assert torch.equal(grad_feature, grad_branch * mask)
        assert grad_branch.all()


@pytest.mark.parametrize("reference", [True, False], ids=["reference", "no-reference"])
@pytest.mark.parametrize("wide", ["feature", "branch"])
def test_residual_add_of_two_dtypes(reference, wide):
    """As under autocast, where a residual stream stays wide."""
    feature, branch = torch.randn(2, 2, 3, CHANNELS)
    if wide == "feature":
        branch = branch.bfloat16()
    else:
        feature = feature.bfloat16()
    results = [
        run_add(feature, branch, Fork(0.5, variant, reference=reference, dim=-1), 0) for variant in ("detach", "dfs")
    ]
    for left, right in zip(*results, strict=True):
        assert left.dtype == right.dtype
        assert torch.equal(left, right)


@pytest.mark.parametrize("reference", [True, False], ids=["reference", "no-reference"])
def test_residual_add_compiled_and_checkpointed(reference):
    feature, branch = torch.randn(2, 2, 3, CHANNELS, dtype=torch.float64)
    fork = Fork(0.5, "dfs", reference=reference, dim=-1)
    expected = run_add(feature, branch, fork, 1)

    def compiled(compute, *inputs):
        return torch.compile(compute, fullgraph=True, backend="aot_eager")(*inputs)

    def checkpointed(compute, *inputs):
        return torch.utils.checkpoint.checkpoint(compute, *inputs, use_reentrant=False)

    for through in (compiled, checkpointed):
        for left, right in zip(run_add(feature, branch, fork, 1, through), expected, strict=True):
            assert torch.equal(left, right)


@pytest.mark.parametrize("variant", ["dense", "detach", "split", "dfs"])
@pytest.mark.parametrize("reference", [True, False], ids=["reference", "no-reference"])
def test_whole_is_the_published_formulation(variant, reference):
    feature = torch.randn(2, 3, CHANNELS, dtype=torch.float64, requires_grad=True)
    start, stop = (0, CHANNELS) if variant == "dense" else readers(0.3, "own", reference)[1]
    seen = whole(Fork(0.3, variant, reference=reference, dim=-1)(feature)[1])
    assert torch.equal(seen, by_hand(feature, start, stop, reference, -1))
    grad = torch.randn_like(seen)
    (actual,) = torch.autograd.grad(seen, feature, grad)
    assert torch.equal(actual[..., start:stop], grad[..., start:stop])
    assert not actual[..., :start].any()


@pytest.mark.parametrize("variant", ["dense", "detach", "split", "dfs"])
@pytest.mark.parametrize("reference", [True, False], ids=["reference", "no-reference"])
def test_map_channels(variant, reference):
    feature = torch.randn(2, 3, CHANNELS, dtype=torch.float64, requires_grad=True)
    reading = Fork(0.3, variant, reference=reference, dim=-1)(feature)[0]

    def pool(tokens):
        return tokens[:, :2].mean(1)

    before, after = pool(whole(reading)), whole(map_channels(pool, reading))
    assert torch.equal(after, before)
    grads = [torch.autograd.grad(output.square().sum(), feature, retain_graph=True) for output in (after, before)]
    assert_close("feature", *grads[0], *grads[1])


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("reader", [0, 1], ids=["deeper", "exit"])
@pytest.mark.parametrize("reference", [True, False], ids=["reference", "no-reference"])
def test_select_samples(variant, reader, reference):
    feature = torch.randn(5, CHANNELS, 3, 2).to(memory_format=torch.channels_last)
    reading = Fork(0.3, variant, reference=reference)(feature)[reader]
    other, rows = torch.randn(5, 2, 3, 2), torch.tensor([0, 3])
    first, *selected = select_samples((other, *reading), rows)
    assert torch.equal(first, other[rows])
    assert first.is_contiguous()
    assert torch.equal(whole(tuple(selected)), whole(reading)[rows])
    for each, before in zip(selected[:2], reading[:2], strict=True):
        assert each.stride()[1:] == before.stride()[1:]
    if len(selected) == 3:
        live, full, columns = selected
        assert live.shape[1:] == reading[0].shape[1:]
        assert live.untyped_storage().data_ptr() == full.untyped_storage().data_ptr()
        assert columns == reading[2]
