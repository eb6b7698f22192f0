import copy

import pytest
import torch
import torch.nn.functional as F

from dfs_engine.methods import GE, Joint, create_method
from dfs_engine.methods.ge import rescale_gradient
from dfs_engine.models import attach_exits, create_model, list_models
from dfs_engine.nn import Fork


def averaged(rows, name, num_exits):
    """What GE makes of a parameter: the mean over the exits behind its block; of a head the plain gradient."""
    total = sum(row[name] for row in rows)
    kind, index = name.split(".")[:2]
    return total / (num_exits - int(index)) if kind == "blocks" else total


@pytest.mark.parametrize("variant", ["dense", "detach", "dfs"])
@pytest.mark.parametrize("reference", [True, False])
def test_every_block_of_a_vgg_gets_the_mean_of_the_exits_gradients(vgg, update, rows_of, variant, reference):
    model, images, target = vgg(variant, reference=reference)
    rows = rows_of(model, images, target)
    method = create_method("ge", model)
    for micro_batch_size in (None, 6):
        twin = copy.deepcopy(model)
        for name, moved in update(twin, method, images, target, micro_batch_size=micro_batch_size).items():
            torch.testing.assert_close(moved, averaged(rows, name, 6), msg=name)


@pytest.mark.parametrize("variant", ["dense", "detach"])
def test_and_of_the_toy(toy, update, rows_of, variant):
    model, inputs, target = toy(variant)
    rows = rows_of(model, inputs, target)
    for name, moved in update(model, create_method("ge", model), inputs, target).items():
        torch.testing.assert_close(moved, averaged(rows, name, 3), msg=name)


def rescale(x, a):
    """R of the paper, in stock autograd."""
    return x * a + x.detach() * (1 - a)


def test_the_formula_itself(toy, update):
    model, inputs, target = toy()
    twin, loss, x, num_exits = copy.deepcopy(model), 0, inputs, 3
    for i in range(num_exits):
        x = torch.tanh(twin.blocks[i].linear(x))
        z = rescale(x, 1 / (num_exits - i))
        if i == num_exits - 1:
            z = x
        loss = loss + F.cross_entropy(twin.exits[i](z), target)
        x = rescale(z, num_exits - i - 1)
    loss.backward()
    moved = update(model, create_method("ge", model), inputs, target)
    for name, parameter in twin.named_parameters():
        torch.testing.assert_close(moved[name], parameter.grad, msg=name)


@pytest.mark.parametrize("all_scales", [False, True])
def test_msdnet_rescales_the_coarsest_scale(update, all_scales):
    options = {"channels": 4, "growth": 4, "num_exits": 3, "dropout": 0.0}
    model = create_model("msdnet_cifar", num_classes=5, variant="dense", dtype=torch.float64, **options)
    images, target = torch.randn(4, 3, 32, 32, dtype=torch.float64), torch.randint(5, (4,))
    twin = copy.deepcopy(model).train()
    loss, scales, num_exits = 0, (images,), 3
    for i in range(num_exits):
        for layer in twin.blocks[i].layers:
            scales = layer(*scales)
        *finer, x = scales
        a = 1 / (num_exits - i) if i < num_exits - 1 else 1.0
        z = rescale(x, a)
        loss = loss + F.cross_entropy(twin.exits[i](z), target)
        if all_scales:
            finer = [rescale(rescale(scale, a), num_exits - i - 1) for scale in finer]
        scales = (*finer, rescale(z, num_exits - i - 1))
    loss.backward()
    moved = update(model, create_method("ge", model, all_scales=all_scales), images, target)
    for name, parameter in twin.named_parameters():
        expected = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        torch.testing.assert_close(moved[name], expected, msg=name)


SMALL = {
    "resnet18": {"width": 8},
    "vit_tiny_patch16_224": {
        "img_size": 32, "depth": 4, "embed_dim": 24, "num_heads": 3, "start_block": 1, "patch_size": 8
    },
    "bert": {"config": {"vocab_size": 20, "hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 3}},
}  # fmt: skip


@pytest.mark.parametrize("variant", ["dense", "detach", "dfs"])
@pytest.mark.parametrize("name", SMALL)
def test_in_every_family_of_one_scale(rows_of, name, variant):
    if not list_models(name):
        pytest.skip(f"no model {name}")
    if name == "bert":
        pytest.importorskip("transformers")
    model = create_model(name, num_classes=5, dtype=torch.float64, variant=variant, **SMALL[name])
    for module in model.modules():
        if "Dropout" in type(module).__name__:
            module.p = 0.0
    model.eval()
    model.train = lambda mode=True: model  # BERT's attention has a dropout that is no module
    input = torch.randint(20, (4, 7)) if name == "bert" else torch.randn(4, 3, 32, 32, dtype=torch.float64)
    target = torch.randint(5, (4,))
    joint = {}
    for index in range(model.num_exits):
        model.zero_grad()
        F.cross_entropy(model(input)[index], target).backward()
        for key, parameter in model.named_parameters():
            if parameter.grad is not None:
                joint.setdefault(key, []).append(parameter.grad.clone())
    rows = [{key: sum(grads) for key, grads in joint.items()}]
    method = create_method("ge", model)
    model.zero_grad()
    method(model(input), target).backward()
    for key, parameter in model.named_parameters():
        if key in joint:
            torch.testing.assert_close(parameter.grad, averaged(rows, key, model.num_exits), msg=key)


@pytest.mark.parametrize("variant", ["dense", "detach", "dfs"])
def test_exits_attached_to_a_backbone(variant):
    def conv(*channels):
        return torch.nn.Sequential(torch.nn.Conv2d(*channels, 3, padding=1), torch.nn.Tanh())

    backbone = torch.nn.Sequential(
        conv(3, 4), conv(4, 6), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(6, 5)
    )
    model = attach_exits(backbone, ["0", "1"], variant=variant, example_input=torch.randn(1, 3, 8, 8)).double()
    images, target = torch.randn(4, 3, 8, 8, dtype=torch.float64), torch.randint(5, (4,))
    sums = {}
    for index in range(3):
        model.zero_grad()
        F.cross_entropy(model(images)[index], target).backward()
        for key, parameter in model.named_parameters():
            if parameter.grad is not None:
                sums[key] = sums.get(key, 0) + parameter.grad
    method = create_method("ge", model)
    model.zero_grad()
    method(model(images), target).backward()
    for key, parameter in model.named_parameters():
        factor = {"backbone.0": 1 / 3, "backbone.1": 1 / 2}.get(key[:10], 1)
        torch.testing.assert_close(parameter.grad, sums[key] * factor, msg=key)


def test_forward_stays_and_hooks_go(toy, update, rows_of):
    model, inputs, target = toy()
    before = model(inputs)
    create_method("ge", model)
    method = GE(model)  # takes the place of the first
    assert all(torch.equal(one, other) for one, other in zip(before, model(inputs), strict=True))
    rows = rows_of(copy.deepcopy(model), inputs, target)
    moved = update(copy.deepcopy(model), method, inputs, target)
    name = "blocks.1.linear.weight"
    torch.testing.assert_close(moved[name], sum(row[name] for row in rows))  # rows_of has the hooks too
    method.remove()
    rows = rows_of(model, inputs, target)
    moved = update(model, Joint(), inputs, target)
    torch.testing.assert_close(moved[name], sum(row[name] for row in rows))


def test_rescale_gradient():
    x = torch.randn(3, 4, requires_grad=True)
    y = rescale_gradient(x, 0.25)
    assert torch.equal(y, x)
    y.sum().backward()
    assert torch.equal(x.grad, torch.full((3, 4), 0.25))
    assert rescale_gradient(x.detach(), 0.25).requires_grad is False
    with torch.no_grad():
        assert rescale_gradient(x, 0.25) is x


def test_no_exit_but_the_last_trains_the_blocks(toy):
    model, *_ = toy()
    model.fork = Fork(1.0, "detach")
    for name in ("ge", "pcgrad", "cagrad", "nash_mtl"):
        with pytest.raises(ValueError, match=rf"method: expected joint with beta=1.*got {name}.*Use beta < 1"):
            create_method(name, model)
    model.fork = Fork(1.0, "detach", exit_gradient="whole")
    create_method("pcgrad", model)
