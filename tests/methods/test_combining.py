"""What holds for every method that combines gradients: families, variants, pieces of a batch, clipping."""

import copy

import pytest
import torch

from dfs_engine.gradients import ExitGradients
from dfs_engine.methods import create_method
from dfs_engine.models import create_model, list_models
from dfs_engine.training.config import OptimConfig

METHODS = ("bdl1", "bdl2", "pcgrad", "cagrad", "nash_mtl")
SMALL = {
    "vgg7_64": {"width": 4},
    "resnet18": {"width": 4},
    "msdnet_cifar": {"channels": 4, "growth": 4, "num_exits": 3},
    "vit_tiny_patch16_224": {
        "img_size": 32, "depth": 4, "embed_dim": 24, "num_heads": 3, "start_block": 1, "patch_size": 8
    },
    "bert": {"config": {"vocab_size": 20, "hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 3}},
}  # fmt: skip


def gradients_by(method, model, input, target):
    method = create_method(method, model)
    gradients = ExitGradients(model, method.routing(model))
    gradients.add(method(model(input), target))
    torch.manual_seed(7)
    method.combine(gradients)
    return {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("reference", [True, False])
@pytest.mark.parametrize("family", SMALL)
def test_detach_and_dfs_agree_in_every_family(family, reference):
    if not list_models(family):
        pytest.skip(f"no model {family}")
    if family == "bert":
        pytest.importorskip("transformers")
    input = torch.randint(20, (4, 7)) if family == "bert" else torch.randn(4, 3, 32, 32, dtype=torch.float64)
    target = torch.randint(5, (4,))
    models = []
    for variant in ("dense", "detach", "dfs"):
        torch.manual_seed(0)
        options = {"num_classes": 5, "dtype": torch.float64, "variant": variant, "reference": reference}
        models.append(create_model(family, **SMALL[family], **options).eval())
    for name in METHODS:
        dense, detach, dfs = (gradients_by(name, model, input, target) for model in models)
        for key, gradient in detach.items():
            assert gradient is None or gradient.isfinite().all(), (name, key)
            absent = torch.zeros(())
            one, other = (absent if grad is None else grad for grad in (gradient, dfs[key]))
            torch.testing.assert_close(*torch.broadcast_tensors(other, one), rtol=1e-5, atol=1e-8, msg=f"{name} {key}")
        assert all(gradient is None or gradient.isfinite().all() for gradient in dense.values())


@pytest.mark.parametrize("name", METHODS[2:])
def test_the_backward_of_an_exit_runs_through_its_own_blocks_alone(vgg, name):
    model, images, target = vgg("dfs")
    ran = []
    for index, block in enumerate(model.blocks[1:], start=1):  # the first one's input is the image, without gradient
        block.conv.register_full_backward_hook(lambda *_, index=index: ran.append(index))
    ExitGradients(model).add(create_method(name, model)(model(images), target))
    assert sorted(ran) == sorted(index for last in range(6) for index in range(1, last + 1))


@pytest.mark.parametrize("name", METHODS)
def test_pieces_of_a_batch_make_the_step_of_the_whole(toy, update, name):
    model, inputs, target = toy()
    results = []
    for size in (None, 4, 1):
        torch.manual_seed(7)
        twin = copy.deepcopy(model)
        results.append(update(twin, create_method(name, twin), inputs, target, micro_batch_size=size))
    for result in results[1:]:
        for key, moved in result.items():
            torch.testing.assert_close(moved, results[0][key], rtol=1e-6, atol=1e-9, msg=key)


@pytest.mark.parametrize("name", METHODS)
def test_clipping_comes_after_the_combination(toy, update, name):
    model, inputs, target = toy()
    results = []
    for optim in (OptimConfig(), OptimConfig(clip_grad=0.01)):
        torch.manual_seed(7)
        twin = copy.deepcopy(model)
        results.append(update(twin, create_method(name, twin), inputs, target, optim=optim))
    free, clipped = (torch.cat([moved.flatten() for moved in result.values()]) for result in results)
    torch.testing.assert_close(clipped, free * (0.01 / free.norm()), rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("name", METHODS)
def test_what_is_not_finite_stops_before_the_step(toy, update, name):
    model, inputs, target = toy()
    method = create_method(name, model)
    before = copy.deepcopy(model.state_dict()), copy.deepcopy(method.state_dict())
    inputs[0, 0] = float("nan")
    with pytest.raises(FloatingPointError, match="exit 1 nan"):
        update(model, method, inputs, target)
    model.blocks[0].linear.weight.register_hook(lambda grad: grad * float("inf"))
    inputs[0, 0] = 1.0
    with pytest.raises(FloatingPointError, match=r"not finite: the gradient of blocks\.0"):
        update(model, method, inputs, target)
    for state, saved in zip((model.state_dict(), method.state_dict()), before, strict=True):
        assert all(torch.equal(value, saved[key]) for key, value in state.items())
