"""Without referencing: columns that no exit trains are not decayed."""

import pytest
import torch
from torch import nn

from dfs_engine.models import create_model, to_official_state_dict
from dfs_engine.training import OptimConfig, hold_idle_columns
from dfs_engine.training.build import build_optimizer


def train(model, optimizer, num_steps=3):
    for _ in range(num_steps):
        optimizer.zero_grad()
        sum(logits.square().mean() for logits in model(torch.randn(4, 3, 8, 8))).backward()
        optimizer.step()


@pytest.mark.parametrize("name", ["sgd", "adamw"])
@pytest.mark.parametrize("variant", ["detach", "split", "dfs"])
@pytest.mark.parametrize("beta", [0.3, 1.0])
def test_published_layers_without_gradient_stay(name, variant, beta):
    """conv_s and fc_p are None to the published optimizer; the last exit reads all of its feature, fc_p too."""
    model = create_model("vgg7_64", width=8, beta=beta, variant=variant, reference=False)
    before = to_official_state_dict(model)
    optimizer = build_optimizer(nn.ModuleList([model]), OptimConfig(name=name, lr=0.05, weight_decay=0.5))
    train(model, optimizer)
    after = to_official_state_dict(model)
    weights = [key for key, value in after.items() if key.endswith("weight") and value.numel() > 0]
    still = {key for key in weights if torch.equal(after[key], before[key])}
    idle = {f"feature_extractors.{index}.conv_s.weight" for index in range(1, 6)}
    idle |= {f"classifers.{index}.fc_p.weight" for index in range(5)}
    assert still == idle.intersection(weights)


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_the_others_are_trained_as_the_published_layers_are(name):
    """One step in halves: an optimizer that has only the trained part as a parameter does the same to it."""
    config = OptimConfig(name=name, lr=0.05, weight_decay=0.5)
    model = create_model("vgg7_64", width=8, reference=False)
    weight = model.blocks[1].conv.weight
    half = nn.ParameterList([weight.detach()[:, :4].clone()])
    ours, other = build_optimizer(model, config), build_optimizer(half, config)
    for _ in range(3):
        ours.zero_grad()
        sum(logits.square().mean() for logits in model(torch.randn(4, 3, 8, 8))).backward()
        half[0].grad = weight.grad[:, :4].clone()
        ours.step()
        other.step()
    torch.testing.assert_close(weight.detach()[:, :4], half[0].detach(), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    "options", [{"reference": True}, {"reference": False, "variant": "dense"}, {"reference": True, "beta": 1.0}]
)
def test_nothing_is_held_that_is_read(options):
    model = create_model("vgg7_64", width=4, **options)
    assert list(model.idle_columns()) == []


def test_in_a_loop_of_ones_own():
    model = create_model("vgg7_64", width=4, reference=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.5)
    hold_idle_columns(optimizer, model)
    before = model.blocks[1].conv.weight.detach().clone()
    train(model, optimizer, 1)
    after = model.blocks[1].conv.weight.detach()
    assert torch.equal(after[:, 2:], before[:, 2:])
    assert not torch.equal(after[:, :2], before[:, :2])
