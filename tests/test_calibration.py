"""The choice of kernels is measured once and kept, and survives any state of its file."""

import json

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from dfs_engine import calibration
from dfs_engine.backend import unavailable_reason
from dfs_engine.calibration import Speedups, Wins
from dfs_engine.models import create_model

pytestmark = pytest.mark.skipif(unavailable_reason("cpp") is not None, reason=str(unavailable_reason("cpp")))


@pytest.fixture
def measured(tmp_path, monkeypatch):
    """A fresh cache folder; gives the list of measurements made."""
    calls = []
    monkeypatch.setenv("DFS_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(calibration, "measure", lambda: calls.append(1) or Speedups(2.5, 1.1, 1.5, 0.5))
    calibration._settle.cache_clear()
    yield calls
    calibration._settle.cache_clear()


def settle_again() -> Wins:
    calibration._settle.cache_clear()
    return calibration.settle()


def test_measured_once_and_kept(measured, tmp_path):
    assert calibration.settle() == (True, True, True, False)
    assert settle_again() == (True, True, True, False)
    assert len(measured) == 1
    (file,) = (tmp_path / "cache").iterdir()
    assert json.loads(file.read_text())["speed_over_aten"] == {
        "linear": 2.5,
        "onednn_linear": 1.1,
        "conv_grad_weight": 1.5,
        "half_conv": 0.5,
    }


@pytest.mark.parametrize("content", ["", "{", "[]", '{"key": {}, "speed_over_aten": 9.0}', '{"speed_over_aten": "x"}'])
def test_a_broken_or_foreign_file_is_measured_again(measured, tmp_path, content):
    calibration.settle()
    (file,) = (tmp_path / "cache").iterdir()
    file.write_text(content)
    settle_again()
    assert len(measured) == 2


def test_an_unwritable_folder_is_no_error(measured, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("DFS_CACHE_DIR", str(tmp_path / "file"))
    assert calibration.settle()


def test_atens_kernels_stay_within_noise(measured, monkeypatch):
    monkeypatch.setattr(calibration, "measure", lambda: Speedups(1.04, 1.2, 1.06, 1.05))
    assert calibration.settle() == (False, True, True, False)


def test_the_measurement_gives_a_ratio_and_restores_the_switches():
    from dfs_engine import _C

    switches = (_C.set_own_gemm, _C.set_onednn_linear, _C.set_own_grad_weight, _C.set_half_winograd)
    before = [switch(False) for switch in switches]
    assert min(calibration.measure()) > 0
    after = [switch(value) for switch, value in zip(switches, before, strict=True)]
    assert not any(after)


def test_a_model_settles_when_it_is_made_whatever_the_device(measured):
    """So that a first step that is compiled runs what this machine is fastest with."""
    options = {"width": 4}
    create_model("vgg7_64", variant="dense", **options)
    assert not measured
    with torch.device("meta"):
        create_model("vgg7_64", variant="dfs", **options)
    assert len(measured) == 1
    calibration.settle()
    assert len(measured) == 1


def test_fake_tensors_are_not_measured(measured):
    with FakeTensorMode():
        assert calibration.settle() == (True, True, True, True)
    assert not measured
    assert calibration.settle() == (True, True, True, False)
    assert len(measured) == 1
