"""`to_variant`: the same weights and outputs in another variant."""

from typing import Any

import pytest
import torch
from torch import nn

from dfs_engine import attach_exits, create_model
from dfs_engine.models import VARIANTS, MultiExitModel
from dfs_engine.runtime.backend import use_backend

FAMILIES: dict[str, dict[str, Any]] = {
    "vgg7_64": {"width": 5},
    "resnet18": {"width": 5},
    "msdnet_cifar_lin_grow": {"num_exits": 3, "channels": 6, "growth": 4, "num_scales": 3, "head_width": 16},
    "vit_tiny_patch16_224": {
        "img_size": 32, "patch_size": 16, "depth": 4, "embed_dim": 18, "num_heads": 3, "start_block": 1
    },
    "bert": {"config": {
        "vocab_size": 30, "hidden_size": 14, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 16,
        "max_position_embeddings": 12,
    }},
}  # fmt: skip
NEEDS = {"vit_tiny_patch16_224": "timm", "bert": "transformers"}
FAMILY = pytest.mark.parametrize("family", FAMILIES)
BETAS = pytest.mark.parametrize("beta", [0.0, 0.3, 0.5, 1.0])


def make_model(family: str, **options: Any) -> MultiExitModel:
    if family in NEEDS:
        pytest.importorskip(NEEDS[family])
    model = create_model(family, num_classes=5, **FAMILIES[family], **options)
    return with_statistics(model)


def with_statistics(model: Any) -> Any:
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.weight, module.running_var):
                nn.init.uniform_(tensor, 0.5, 1.5)
            for tensor in (module.bias, module.running_mean):
                nn.init.normal_(tensor, std=0.3)
    return model.eval()


@torch.no_grad()
def assert_same_outputs(model: Any, other: Any, **tolerance: float) -> None:
    input = model.example_inputs(4)
    for found, expected in zip(other(**input), model(**input), strict=True):
        torch.testing.assert_close(found, expected, **tolerance)


@FAMILY
@BETAS
def test_dense_computes_the_same_on_stock_layers(family, beta):
    model = make_model(family, beta=beta)
    dense = model.to_variant("dense")
    with use_backend("aten"):  # Winograd's rounding is its own
        assert_same_outputs(model, dense, rtol=1e-6, atol=1e-6)
    assert {type(module).__module__.split(".")[:2] == ["dfs_engine", "ops"] for module in dense.modules()} == {False}
    assert not any(getattr(module, "takes_slices", False) for module in dense.modules() if not list(module.children()))
    assert dense.get_config() == {**model.get_config(), "variant": "dense"}
    assert_same_outputs(model.double(), dense.double(), rtol=1e-12, atol=1e-12)


@FAMILY
def test_every_way_and_back(family):
    model = make_model(family, beta=0.3).double()
    for variant in VARIANTS:
        other = model.to_variant(variant)
        assert other.variant == variant
        assert_same_outputs(model, other, rtol=1e-12, atol=1e-12)
        back = other.to_variant("dfs")
        assert_same_outputs(model, back, rtol=0, atol=0)
        torch.testing.assert_close(dict(back.state_dict()), dict(model.state_dict()), rtol=0, atol=0)


@pytest.mark.parametrize("family", ["vgg7_64", "msdnet_cifar_lin_grow"])
@BETAS
@pytest.mark.parametrize("variant", ["dfs", "detach"])
def test_without_referencing_columns_that_are_not_read_are_zeroed(family, beta, variant):
    model = make_model(family, beta=beta, reference=False, variant=variant).double()
    kept = {name: value.clone() for name, value in model.state_dict().items()}
    dense = model.to_variant("dense")
    assert_same_outputs(model, dense, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(dict(model.state_dict()), kept, rtol=0, atol=0)
    weights = dict(model.named_parameters())
    zeroed = {name for name, value in dense.named_parameters() if not torch.equal(value, weights[name])}
    assert zeroed
    assert all(name.endswith("weight") for name in zeroed)
    if family == "vgg7_64" and beta == 0.5:
        changed = dense.blocks[1].conv.weight != model.blocks[1].conv.weight
        assert changed.any((0, 2, 3)).tolist() == [False] * 2 + [True] * 3  # 5 channels: round(2.5) are shared


@pytest.mark.parametrize("family", ["resnet18", "vit_tiny_patch16_224", "bert"])
def test_what_zero_columns_cannot_say(family):
    model = make_model(family, reference=False)
    with pytest.raises(ValueError, match=r"as in 'dfs', got other logits at exit \d: .*residual sum, a product or"):
        model.to_variant("dense")
    assert_same_outputs(model, model.to_variant("detach"), rtol=1e-5, atol=1e-5)


def test_a_dense_model_cannot_lose_what_it_reads():
    model = make_model("vgg7_64", reference=False, variant="dense")
    with pytest.raises(ValueError, match=r"reads all channels.*Build it with reference=True"):
        model.to_variant("dfs")


class Backbone(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.second = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.Conv2d(6, 8, 3)
        self.last = nn.Linear(8, 5)

    def forward(self, images):
        return self.last(self.second(self.norm(self.first(images)).relu()).tanh().mean((2, 3)))


class Head(nn.Module):
    def __init__(self, channels: int, num_classes: int) -> None:
        super().__init__()
        self.conv, self.linear = nn.Conv2d(channels, 7, 1), nn.Linear(7, num_classes)

    def forward(self, feature):
        return self.linear(self.conv(feature).relu().mean((2, 3)))


@pytest.mark.parametrize("head", [None, Head])
def test_attached_exits(head):
    example = torch.zeros(1, 3, 8, 8)
    model = attach_exits(Backbone(), ["norm", "second"], head=head, example_input=example)
    model = with_statistics(model).double()
    before = model(example.double())
    for variant in VARIANTS:
        other = model.to_variant(variant)
        assert other.get_config() == {**model.get_config(), "variant": variant}
        assert_same_outputs(model, other, rtol=1e-12, atol=1e-12)
        assert all(a is not b for a, b in zip(model.parameters(), other.parameters(), strict=True))
        assert_same_outputs(model, other.to_variant("dfs"), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(model(example.double()), before, rtol=0, atol=0)  # as it was


def test_a_copy_is_one():
    model = make_model("vgg7_64").train()
    model.blocks[0].eval()
    model.exits[1].linear.weight.requires_grad_(False)
    state = torch.get_rng_state()
    other = model.to_variant("dense")
    assert torch.equal(torch.get_rng_state(), state)
    assert other.training
    assert not other.blocks[0].training
    assert not other.exits[1].linear.weight.requires_grad
    with torch.no_grad():
        other.blocks[0].conv.weight.zero_()
    assert model.blocks[0].conv.weight.abs().sum() > 0


def test_wrong_variants_and_models_of_ones_own():
    model = make_model("vgg7_64")
    with pytest.raises(ValueError, match=r"variant: expected one of dense, detach, split, dfs, got 'dens'"):
        model.to_variant("dens")
    own = MultiExitModel(list(model.blocks), list(model.exits), model.fork, num_classes=5, input_shape=(3, 32, 32))
    with pytest.raises(TypeError, match=r"to_variant: expected a model of create_model or attach_exits, got a Multi"):
        own.to_variant("dense")
