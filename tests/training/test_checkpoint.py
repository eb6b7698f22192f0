import contextlib
import json

import pytest
import torch
from safetensors.torch import save_file

from dfs_engine.models import create_model
from dfs_engine.models.weights import load_model, read_description, save_model
from dfs_engine.runtime.files import atomic_file, write_text


@pytest.fixture
def weights(tmp_path):
    """A weight file of a model whose values are not the initial ones."""
    model = create_model("vgg7_64", width=4, beta=0.3, variant="split", num_classes=7)
    model.to(memory_format=torch.channels_last)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    path = tmp_path / "model.safetensors"
    save_model(model, path, {"data": {"name": "digits"}, "epoch": 3})
    return path, model


def test_weights_rebuild_the_model(weights):
    path, model = weights
    loaded = load_model(path)
    assert loaded.get_config() == model.get_config()
    assert read_description(path)["epoch"] == 3
    for name, value in model.state_dict().items():
        assert torch.equal(value, loaded.state_dict()[name]), name
    images = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    for ours, theirs in zip(loaded.double().eval()(images), model.double().eval()(images), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_run_folder_stands_for_its_weights(weights):
    path, _ = weights
    assert read_description(path.parent) == read_description(path)


def test_truncated_weights(weights):
    path, _ = weights
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"path: expected a whole safetensors file, got .*model\.safetensors"):
        load_model(path)


def test_weights_of_somebody_else(tmp_path):
    path = tmp_path / "other.safetensors"
    save_file({"weight": torch.ones(2)}, path)
    with pytest.raises(ValueError, match="expected weights written by dfs_engine"):
        load_model(path)


def test_weights_that_do_not_fit_their_description(weights, tmp_path):
    _, model = weights
    path = tmp_path / "odd.safetensors"
    header = json.dumps({"model": {**model.get_config(), "width": 6}})
    save_file(
        {name: value.contiguous() for name, value in model.state_dict().items()}, path, metadata={"dfs_engine": header}
    )
    with pytest.raises(ValueError, match=r"path: expected .*odd.safetensors to fit the model that it describes"):
        load_model(path)


def test_weights_from_before_their_start_was_recorded(tmp_path):
    """Old VGGs started as torch starts a layer, and did not say so."""
    model = create_model("vgg7_64", width=4, init="torch")
    config = {key: value for key, value in model.get_config().items() if key != "init"}
    path = tmp_path / "model.safetensors"
    save_file(model.state_dict(), path, metadata={"dfs_engine": json.dumps({"model": config})})
    assert read_description(path)["model"]["init"] == load_model(path).get_config()["init"] == "torch"


def test_missing_weights(tmp_path):
    with pytest.raises(FileNotFoundError, match="path: expected a run folder"):
        load_model(tmp_path)


def test_failed_write_keeps_the_old_file(tmp_path):
    path = tmp_path / "file"
    write_text(path, "old")
    with contextlib.suppress(RuntimeError), atomic_file(path) as partial:
        partial.write_text("half")
        raise RuntimeError
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
