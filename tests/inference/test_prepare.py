"""`prepare` on every family: the outputs of the model in float64, the model untouched, early exit as before."""

import copy
import logging
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dfs_engine import attach_exits, create_model
from dfs_engine.inference import EarlyExit, prepare, simulate
from dfs_engine.models.multi_exit import run_model
from dfs_engine.nn import ConvAct
from dfs_engine.runtime import backend as backends
from dfs_engine.runtime import choice

BERT = {
    "vocab_size": 30, "hidden_size": 12, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 16,
    "max_position_embeddings": 12, "initializer_range": 0.2,
}  # fmt: skip
FAMILIES: dict[str, dict[str, Any]] = {
    "vgg7_64": {"width": 17},
    "resnet18": {"width": 16},
    "resnet50": {"width": 6, "stem": "imagenet"},
    "msdnet_cifar_lin_grow": {"num_exits": 4, "channels": 16, "growth": 8, "num_scales": 3, "head_width": 32},
    "vit_tiny_patch16_224": {
        "img_size": 16, "patch_size": 8, "depth": 5, "embed_dim": 18, "num_heads": 3, "start_block": 1
    },
    "bert": {"config": BERT},
    "attached": {},
}  # fmt: skip
NEEDS = {"vit_tiny_patch16_224": "timm", "bert": "transformers"}
IMAGES = [family for family in FAMILIES if family not in NEEDS]
FAMILY = pytest.mark.parametrize("family", FAMILIES)
NUM_CLASSES = 5


class Backbone(nn.Module):
    """Units of all kinds: conv-BN-ReLU, conv-BN, a convolution that two read, a ReLU that runs twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU())
        self.conv2, self.bn2 = nn.Conv2d(16, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.conv3, self.bn3 = nn.Conv2d(16, 24, 3, stride=2), nn.BatchNorm2d(24, affine=False)
        self.conv4, self.bn4 = nn.Conv2d(24, 24, 1), nn.BatchNorm2d(24)
        self.relu = nn.ReLU(inplace=True)
        self.last = nn.Linear(24, NUM_CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        first = self.first(images)
        second = self.relu(self.bn2(self.conv2(first)) + first)
        third = self.bn3(self.conv3(second))
        fourth = self.conv4(third)
        return self.last(self.relu(self.bn4(fourth) + fourth).mean((2, 3)))


class Untraceable(Backbone):
    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images if images.sum() > -1e9 else -images)


def make_model(family: str, dtype: torch.dtype = torch.float32, backbone: type = Backbone, **options: Any) -> Any:
    """In eval mode, with statistics, scales and shifts that change something."""
    if family in NEEDS:
        pytest.importorskip(NEEDS[family])
    if family == "attached":
        example = torch.zeros(1, 3, 9, 9, dtype=dtype)
        model: Any = attach_exits(backbone().to(dtype), ["first", "bn3"], example_input=example, **options)
    else:
        model = create_model(family, num_classes=NUM_CLASSES, dtype=dtype, **FAMILIES[family], **options)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = 1.0
                if module.affine:
                    module.weight.normal_(1, 0.7)
                    module.bias.normal_(std=0.5)
        if family not in NEEDS:
            model.train()(batch(family, 16, dtype))
    return model.eval()


def batch(family: str, num_samples: int, dtype: torch.dtype = torch.float32, size: tuple[int, int] = (17, 18)) -> Any:
    if family == "bert":
        lengths = torch.randint(2, 10, (num_samples, 1))
        return {
            "input_ids": torch.randint(BERT["vocab_size"], (num_samples, 9)),
            "attention_mask": (torch.arange(9) < lengths).long(),
        }
    size = (16, 16) if family.startswith("vit") else (40, 39) if family == "resnet50" else size
    return torch.randn(num_samples, 3, *size, dtype=dtype)


def wide(input: Any) -> Any:
    return input if isinstance(input, dict) else input.double()


@torch.no_grad()
def run(model: nn.Module, input: Any, **options: Any) -> Any:
    return run_model(model, input, **options)


def assert_near(actual: list[Tensor], exact: list[Tensor], tolerance: float = 1e-4) -> None:
    """`tolerance`: of the largest error, in root mean squares of the exact logits of its exit."""
    assert len(actual) == len(exact)
    for index, (found, expected) in enumerate(zip(actual, exact, strict=True)):
        assert found.shape == expected.shape
        assert not found.requires_grad
        if found.numel() > 0:
            error = (found.double() - expected).abs().max() / expected.square().mean().sqrt()
            assert error < tolerance, f"exit {index}: {error:.2g}"


def exact_logits(model: nn.Module, input: Any) -> list[Tensor]:
    return run(copy.deepcopy(model).double(), wide(input))


@FAMILY
@pytest.mark.parametrize("num_samples", [0, 1, 5])
def test_it_computes_what_the_model_does(family, num_samples):
    model, input = make_model(family), batch(family, num_samples)
    assert_near(run(prepare(model), input), exact_logits(model, input))


@pytest.mark.parametrize("family", IMAGES)
@pytest.mark.parametrize("kernel", ["winograd", "onednn", "aten"])
def test_every_kernel(family, kernel, monkeypatch):
    if backends.unavailable_reason("cpp") is not None:
        pytest.skip(backends.unavailable_reason("cpp"))
    model, input, used = make_model(family), batch(family, 3), set()
    choose = choice.conv_act_kernel

    def force(image, size, geometry, pool):
        applies = kernel != "winograd" or choice._is_winograd(size, *geometry)
        used.add(kernel if applies else "other")
        return kernel if applies else choose(image, size, geometry, pool)

    monkeypatch.setattr(choice, "conv_act_kernel", force)
    assert_near(run(prepare(model), input), exact_logits(model, input))
    assert kernel in used


@pytest.mark.parametrize("family", IMAGES)
@pytest.mark.parametrize("size", [(8, 8), (9, 11), (12, 21), (15, 13)], ids=str)
def test_odd_sizes(family, size):
    model, input = make_model(family), batch(family, 2, size=size)
    with choice.use_winograd(True):
        assert_near(run(prepare(model), input), exact_logits(model, input))


@FAMILY
@pytest.mark.parametrize(
    "options",
    [
        {"variant": "dense"},
        {"variant": "detach"},
        {"variant": "split"},
        {"reference": False},
        {"variant": "dense", "reference": False},
        {"beta": 0.0},
        {"beta": 1.0, "exit_gradient": "whole"},
        {"beta": 0.3, "reference": False, "exit_gradient": "whole"},
        {"backend": "aten"},
    ],
    ids=lambda options: "-".join(map(str, options.values())),
)
def test_every_variant(family, options):
    model, input = make_model(family, **options), batch(family, 3)
    assert_near(run(prepare(model), input), exact_logits(model, input), 5e-4 if family == "resnet50" else 1e-4)


@FAMILY
def test_float64_and_features(family):
    model, input = make_model(family, torch.float64), batch(family, 3, torch.float64)
    prepared = prepare(model)
    assert_near(run(prepared, input), run(model, input), 1e-9)
    for which in ("blocks", True) if family == "attached" else ("blocks", "exits", True):
        found, expected = run(prepared, input, return_features=which), run(model, input, return_features=which)
        assert_near(found[0], expected[0], 1e-9)
        assert_near(found[1], expected[1], 1e-9)


@FAMILY
def test_bf16_autocast(family):
    model, input = make_model(family), batch(family, 3)
    prepared, exact = prepare(model), exact_logits(model, input)
    with torch.autocast("cpu", torch.bfloat16):
        found, plain = run(prepared, input), run(model, input)
    assert [logits.dtype for logits in found] == [logits.dtype for logits in plain]
    for ours, theirs, expected in zip(found, plain, exact, strict=True):
        norm = expected.square().mean().sqrt()
        error, plain_error = ((each.double() - expected).square().mean().sqrt() / norm for each in (ours, theirs))
        assert error < 3 * plain_error + 0.05  # either is rounding noise, of many layers


@FAMILY
def test_a_bf16_model(family):
    model = make_model(family).bfloat16()
    input = batch(family, 3) if family == "bert" else batch(family, 3).bfloat16()
    found, plain = run(prepare(model), input), run(model, input)
    exact = exact_logits(model, input)
    for ours, theirs, expected in zip(found, plain, exact, strict=True):
        assert ours.dtype == torch.bfloat16
        norm = expected.square().mean().sqrt()
        error, plain_error = ((each.double() - expected).square().mean().sqrt() / norm for each in (ours, theirs))
        assert error < 3 * plain_error + 0.05  # either is rounding noise, of many layers


@FAMILY
def test_the_model_is_left_as_it_was_and_trains_on(family):
    model, input = make_model(family).train(), batch(family, 4)
    state, modes = copy.deepcopy(model.state_dict()), {name: one.training for name, one in model.named_modules()}
    classes = [type(module) for module in model.modules()]
    prepared = prepare(model)
    before = run(prepared, input)
    torch.testing.assert_close(dict(model.state_dict()), dict(state), rtol=0, atol=0)
    assert {name: one.training for name, one in model.named_modules()} == modes
    assert [type(module) for module in model.modules()] == classes
    shared = {each.data_ptr() for each in model.state_dict().values() if each.numel() > 0}
    assert not shared & {each.data_ptr() for each in prepared.state_dict().values() if each.numel() > 0}

    sum(logits.square().mean() for logits in run_model(model, input)).backward()
    assert all(parameter.grad is not None for parameter in model.parameters() if parameter.requires_grad)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter))
    for found, expected in zip(run(prepared, input), before, strict=True):
        assert torch.equal(found, expected)


@FAMILY
@pytest.mark.parametrize("num_samples", [1, 7, 64])
def test_early_exit_is_that_of_the_model(family, num_samples):
    model, input = make_model(family), batch(family, num_samples)
    logits = run(model, input)
    limits = [each[:, 0].median() for each in logits]

    def policy(logits: Tensor, exit_index: int, state: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        return logits[:, 0] > limits[exit_index], logits[:, 0]

    found, expected = EarlyExit(prepare(model), policy), EarlyExit(model, policy)
    found, expected = (call(**input) if isinstance(input, dict) else call(input) for call in (found, expected))
    # Of those that rounding might have sent elsewhere nothing is said: the median ones of each exit.
    away = [(each[:, 0] - limit).abs() > 1e-5 * each.abs().max() for each, limit in zip(logits, limits, strict=True)]
    clear = torch.stack(away[:-1]).all(0)
    assert num_samples == 1 or (~clear).sum() <= 2 * model.num_exits
    assert torch.equal(found.exits[clear], expected.exits[clear])
    torch.testing.assert_close(found.logits[clear], expected.logits[clear], rtol=1e-3, atol=1e-3)
    assert num_samples < 7 or len(simulate(logits, policy).exits.unique()) > 1


@pytest.mark.parametrize("family", [family for family in IMAGES if family != "attached"])
def test_no_normalisation_stays_where_a_convolution_can_take_it(family):
    prepared = prepare(make_model(family))
    left = [name for name, module in prepared.named_modules() if isinstance(module, nn.BatchNorm2d)]
    assert all(name.endswith("gate_bn") for name in left)
    assert any(isinstance(module, ConvAct) for module in prepared.modules())
    assert not any(parameter.requires_grad for parameter in prepared.parameters())


def test_what_is_folded_in_a_backbone_of_ones_own():
    prepared = prepare(make_model("attached"))
    kinds = {name: type(module) for name, module in prepared.backbone.named_modules()}
    assert kinds["first.0"] is kinds["conv2"] is kinds["conv3"] is kinds["conv4"] is ConvAct
    assert kinds["first.1"] is kinds["first.2"] is kinds["bn2"] is nn.Identity
    assert prepared.backbone.first[0].relu
    assert not prepared.backbone.conv2.relu
    # An exit waits for bn3, and two read conv4.
    assert issubclass(kinds["bn3"], nn.BatchNorm2d)
    assert issubclass(kinds["bn4"], nn.BatchNorm2d)


def test_a_backbone_that_cannot_be_traced(caplog):
    model, input = make_model("attached", backbone=Untraceable), batch("attached", 3)
    with caplog.at_level(logging.WARNING):
        prepared = prepare(model)
    assert "its batch normalisations stay apart" in caplog.text
    assert_near(run(prepared, input), exact_logits(model, input))


def test_hooks_are_kept():
    model, input, seen = make_model("resnet18"), batch("resnet18", 2), []
    layer = model.blocks[1].residual_blocks[0].layers[0]
    layer.bn.register_forward_hook(lambda *_: seen.append("bn"))
    prepared = prepare(model)
    assert_near(run(prepared, input), exact_logits(model, input))
    assert len(seen) == 2


def test_layers_that_are_not_stock_are_left_alone():
    model, input = make_model("vgg7_64", variant="dense"), batch("vgg7_64", 2)
    nn.utils.parametrizations.weight_norm(model.blocks[1].conv)
    model.blocks[2].bn = nn.BatchNorm2d(34, track_running_stats=False)
    model.blocks[3].conv.padding_mode = "reflect"
    prepared = prepare(model)
    assert_near(run(prepared, input), exact_logits(model, input))


def test_it_moves_copies_and_pickles(tmp_path):
    model, input = make_model("vgg7_64"), batch("vgg7_64", 3)
    prepared, exact = prepare(model), exact_logits(model, input)
    assert_near(run(prepared, input), exact)
    assert_near(run(copy.deepcopy(prepared), input), exact)
    torch.save(prepared, tmp_path / "prepared.pt")
    assert_near(run(torch.load(tmp_path / "prepared.pt", weights_only=False), input), exact)
    assert_near(run(copy.deepcopy(prepared).double(), input.double()), exact)
    assert_near(run(prepare(prepared), input), exact)
    assert_near(run(prepared.train(), input), exact)


def test_it_runs_in_inference_mode_and_refuses_gradient():
    prepared, input = prepare(make_model("vgg7_64")), batch("vgg7_64", 2)
    with torch.inference_mode():
        expected = prepared(input)
    assert_near(prepared(input), [logits.double() for logits in expected], 1e-6)
    with pytest.raises(RuntimeError, match="expected an input that needs no gradient, got one that does"):
        prepared(input.requires_grad_())


def test_under_torch_compile():
    model, input = make_model("vgg7_64", variant="dense"), batch("vgg7_64", 2)
    compiled = torch.compile(prepare(model), backend="aot_eager", fullgraph=True)
    assert_near(run(compiled, input), exact_logits(model, input))


def test_without_the_extension_stock_operators_serve(monkeypatch):
    monkeypatch.setattr(backends, "_extension_missing", "it is not built")
    model, input = make_model("vgg7_64"), batch("vgg7_64", 2)
    assert_near(run(prepare(model), input), exact_logits(model, input))
    assert backends.last_used("conv_act") == "aten"


@pytest.mark.parametrize("wrap", [nn.DataParallel, nn.Sequential])
def test_models_that_are_none(wrap):
    with pytest.raises(TypeError, match="prepare: expected a MultiExitModel, got model="):
        prepare(wrap(create_model("vgg7_64", width=4)))


def test_a_snapshot_has_no_backbone_to_give_back():
    model = make_model("attached")
    with pytest.raises(TypeError, match="got a snapshot that prepare"):
        prepare(model).to_backbone()
    assert model.to_backbone() is model.backbone
