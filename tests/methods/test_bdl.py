import copy

import pytest
import torch
import torch.nn.functional as F

from dfs_engine.gradients import ExitGradients
from dfs_engine.methods import BDL, BDLConfig, Joint, create_method
from dfs_engine.models import attach_exits
from dfs_engine.nn import Fork


def by_running_blocks_again(model, inputs, target, window, include_final):
    """The official code's way: each exit's blocks once more, on what comes before its window, without gradient."""
    twin = copy.deepcopy(model).train()
    twin.zero_grad()
    features = [inputs]
    with torch.no_grad():
        for block in twin.blocks:
            features.append(torch.tanh(block.linear(features[-1])))
    for k in range(twin.num_exits):
        first = 0 if include_final and k == twin.num_exits - 1 else max(0, k - window + 1)
        feature = features[first]
        for block in twin.blocks[first : k + 1]:
            feature = torch.tanh(block.linear(feature))
        F.cross_entropy(twin.exits[k](feature), target).backward()
    return {name: parameter.grad for name, parameter in twin.named_parameters()}


@pytest.mark.parametrize("micro_batch_size", [None, 4])
@pytest.mark.parametrize("window", [1, 2, 3, 5])
@pytest.mark.parametrize("name", ["bdl1", "bdl2"])
def test_a_step_is_the_official_codes(toy, update, name, window, micro_batch_size):
    model, inputs, target = toy()
    expected = by_running_blocks_again(model, inputs, target, window, name == "bdl2")
    joint = update(copy.deepcopy(model), Joint(), inputs, target)
    moved = update(model, create_method(name, model, window=window), inputs, target, micro_batch_size=micro_batch_size)
    for key, gradient in expected.items():
        torch.testing.assert_close(moved[key], gradient, msg=key)
        if window >= 3 or (key.startswith("exits.")):
            torch.testing.assert_close(moved[key], joint[key], msg=key)


@pytest.mark.parametrize("variant", ["dense", "detach", "dfs"])
@pytest.mark.parametrize("name", ["bdl1", "bdl2"])
def test_which_exit_trains_which_block(vgg, name, variant):
    """A band; of bdl2 the last row is full."""
    model, images, target = vgg(variant)
    method = create_method(name, model)
    gradients = ExitGradients(model, method.routing(model))
    gradients.add(method(model(images), target))
    names = {id(parameter): key for key, parameter in model.named_parameters()}
    for k, row in enumerate(gradients.rows):
        first = 0 if name == "bdl2" and k == 5 else max(0, k - 2)
        trained = {
            names[id(parameter)].rpartition(".")[0]
            for parameter, gradient in zip(gradients.parameters, row, strict=True)
            if gradient is not None
        }
        assert {key.split(".")[1] for key in trained if key.startswith("blocks")} == {*map(str, range(first, k + 1))}
        assert {key.split(".")[1] for key in trained if key.startswith("exits")} == {str(k)}


@pytest.mark.parametrize("name", ["bdl1", "bdl2"])
def test_the_backward_stops_at_the_window(vgg, name):
    model, images, target = vgg("dfs")
    method, ran = create_method(name, model, window=2), []
    for index, block in enumerate(model.blocks[1:], start=1):
        block.conv.register_full_backward_hook(lambda *_, index=index: ran.append(index))
    ExitGradients(model, method.routing(model)).add(method(model(images), target))
    windows = [range(0 if name == "bdl2" and k == 5 else max(0, k - 1), k + 1) for k in range(6)]
    # A hook runs where the gradient of a block's input is wanted: not in the first block of a window.
    assert sorted(ran) == sorted(index for window in windows for index in window[1:])


@pytest.mark.parametrize("variant", ["detach", "dfs"])
def test_with_surgery_it_is_the_same_window_of_the_exits_own_gradient(vgg, update, rows_of, variant):
    model, images, target = vgg(variant)
    rows = rows_of(model, images, target)
    for key, moved in update(model, create_method("bdl1", model, window=2), images, target).items():
        kind, index = key.split(".")[:2]
        near = [int(index)] if kind == "exits" else [k for k in (int(index), int(index) + 1) if k < 6]
        torch.testing.assert_close(moved, sum(rows[k][key] for k in near), msg=key)


def test_exits_attached_to_a_backbone():
    layers = [torch.nn.Linear(5, 6), torch.nn.Tanh(), torch.nn.Linear(6, 7), torch.nn.Tanh(), torch.nn.Linear(7, 4)]
    heads = {"head": lambda channels, num_classes: torch.nn.Linear(channels, num_classes)}
    model = attach_exits(
        torch.nn.Sequential(*layers), ["1", "3"], variant="dense", example_input=torch.randn(2, 5), **heads
    )
    names = {id(parameter): key for key, parameter in model.named_parameters()}
    routes = [
        {names[id(parameter)].removesuffix(".weight") for parameter in route if parameter.dim() > 1}
        for route in BDL(BDLConfig(window=1)).routing(model)
    ]
    assert routes == [{"backbone.0", "exits.0.head"}, {"backbone.2", "exits.1.head"}, {"backbone.4"}]


def test_what_it_refuses(toy):
    model, *_ = toy()
    with pytest.raises(ValueError, match=r"bdl\.window: expected a number >= 1, got 0"):
        create_method("bdl1", model, window=0)
    model.fork = Fork(1.0, "detach")
    with pytest.raises(ValueError, match=r"method: expected joint with beta=1.*got bdl2"):
        create_method("bdl2", model)
