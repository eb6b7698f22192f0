"""`save_model` and `load_model` for plain loops and attached models, and folders as the Hugging Face Hub has them."""

import json

import pytest
import torch
from torch import nn

from dfs_engine import attach_exits, create_model, load_model, read_description, save_model

pytest.importorskip("safetensors")


def small(**options):
    model = create_model("vgg7_64", **{"width": 4, "num_classes": 7, "beta": 0.3} | options)
    for buffer in model.buffers():
        if buffer.is_floating_point():
            buffer.copy_(torch.rand_like(buffer) + 0.5)
    return model


class Backbone(nn.Module):
    def __init__(self, width=8, num_classes=5):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 6, 3), nn.Conv2d(6, width, 3, stride=2)
        self.head = nn.Linear(width, num_classes)

    def forward(self, images):
        return self.head(self.second(self.first(images)).relu().mean((2, 3)))


def attached(at=("first",), beta=0.5, **options):
    return attach_exits(Backbone(**options), list(at), beta=beta, example_input=torch.randn(1, 3, 16, 16))


def assert_same(one, other):
    assert one.state_dict().keys() == other.state_dict().keys()
    for name, value in one.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]), name


@pytest.mark.parametrize("place", ["weights.safetensors", "new/folder"])
def test_a_model_comes_back(tmp_path, place):
    model = small(variant="split", reference=False)
    file = save_model(model, tmp_path / place, {"accuracy": 0.5})
    assert file == tmp_path / (place if place.endswith("safetensors") else f"{place}/model.safetensors")
    loaded = load_model(tmp_path / place)
    assert loaded.get_config() == model.get_config()
    assert loaded.training
    assert_same(loaded, model)
    assert read_description(tmp_path / place)["accuracy"] == 0.5
    assert read_description(tmp_path / place)["model"] == model.get_config()


def test_saving_again_replaces(tmp_path):
    save_model(small(), tmp_path)
    model = small()
    save_model(model, tmp_path)
    assert_same(load_model(tmp_path), model)


def test_into_a_skeleton(tmp_path):
    model, other = attached(), attached()
    save_model(model, tmp_path)
    assert load_model(tmp_path, model=other) is other
    assert_same(other, model)
    images = torch.randn(2, 3, 16, 16)
    assert all(torch.equal(*pair) for pair in zip(other(images), model(images), strict=True))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: attached(beta=0.25), r"expected a model with beta=0\.25, got .* of a model with beta=0\.5"),
        (lambda: attached(["second"]), r"expected a model with at=\['second'\], got .*at=\['first'\]"),
        (lambda: attached(num_classes=4), "expected a model with num_classes=4, got .* num_classes=5"),
        (lambda: attached(width=9), r"second\.weight of shape \(8, 6, 3, 3\) where the model has \(9, 6, 3, 3\)"),
        (small, "expected a model with"),
    ],
    ids=["beta", "place", "classes", "width", "another model"],
)
def test_another_skeleton_is_refused_and_left_alone(tmp_path, make, message):
    save_model(attached(), tmp_path)
    other = make()
    before = {name: value.clone() for name, value in other.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        load_model(tmp_path, model=other)
    for name, value in other.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_what_create_model_cannot_build_says_so(tmp_path):
    save_model(attached(), tmp_path)
    with pytest.raises(ValueError, match=r"Make that model in Python and give it: load_model\(path, model=\.\.\.\)"):
        load_model(tmp_path)


def test_missing_and_further_tensors_are_named(tmp_path):
    from safetensors.torch import save_file

    model = small()
    tensors = {name: value.contiguous() for name, value in model.state_dict().items()}
    tensors["odd"] = tensors.pop("exits.0.linear.weight")
    save_file(tensors, tmp_path / "a.safetensors", metadata={"dfs_engine": json.dumps({"model": model.get_config()})})
    with pytest.raises(ValueError, match=r"got no exits\.0\.linear\.weight, odd, which the model does not have"):
        load_model(tmp_path / "a.safetensors")


def test_what_cannot_be_saved_is_said_before_anything_is_written(tmp_path):
    with pytest.raises(ValueError, match=r"path: expected a folder, or a file that ends in \.safetensors, got .*\.pth"):
        save_model(small(), tmp_path / "model.pth")
    with pytest.raises(TypeError, match="model: expected a MultiExitModel, got a Linear"):
        save_model(nn.Linear(2, 2), tmp_path)
    assert not list(tmp_path.iterdir())


def test_hub_folder(tmp_path):
    pytest.importorskip("huggingface_hub")
    from dfs_engine.models.hub import HubModel

    model = small().eval()
    HubModel(model).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text()) == model.get_config()
    card = (tmp_path / "README.md").read_text()
    assert "library_name: dfs_engine" in card
    assert "# vgg7_64 with 6 exits" in card
    assert "list of 6 tensors (N, 7)" in card
    loaded = HubModel.from_pretrained(str(tmp_path)).model
    assert type(loaded) is type(model)
    assert not loaded.training
    assert_same(loaded, model)
    assert_same(load_model(tmp_path), model)


def test_hub_folder_of_an_attached_model(tmp_path):
    pytest.importorskip("huggingface_hub")
    from dfs_engine.models.hub import HubModel

    model, other = attached(), attached()
    HubModel(model).save_pretrained(tmp_path)
    assert "# Backbone with 2 exits" in (tmp_path / "README.md").read_text()
    assert HubModel.from_pretrained(str(tmp_path), model=other).model is other
    assert_same(other, model)
    with pytest.raises(ValueError, match=r"load_model\(path, model=\.\.\.\)"):
        HubModel.from_pretrained(str(tmp_path))


def test_hub_folder_of_a_timm_model(tmp_path):
    pytest.importorskip("timm")
    pytest.importorskip("huggingface_hub")
    from dfs_engine.models.hub import HubModel

    options = {"depth": 3, "embed_dim": 12, "num_heads": 3, "img_size": 32, "start_block": 1}
    model = create_model("vit_tiny_patch16_224", num_classes=3, **options).eval()
    HubModel(model).save_pretrained(tmp_path)
    loaded = HubModel.from_pretrained(str(tmp_path)).model
    assert_same(loaded, model)
    images = torch.randn(2, 3, 32, 32)
    assert all(torch.equal(*pair) for pair in zip(loaded(images), model(images), strict=True))
