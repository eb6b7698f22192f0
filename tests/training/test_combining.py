"""Runs with methods that combine gradients: exact resume, precision, and what they do not go with."""

from dataclasses import replace

import pytest
import torch

from dfs_engine.methods import CAGradConfig, NashMTLConfig
from dfs_engine.training import build
from dfs_engine.training.adapters import load_adapters
from dfs_engine.training.config import TrainConfig
from dfs_engine.training.trainer import Trainer


class CrashError(Exception):
    """What the test interrupts a run with."""


@pytest.mark.parametrize("method", ["nash_mtl", "pcgrad", "ge"])
def test_resumes_bit_for_bit(make_config, make_model, tmp_path, method):
    options = {
        "method": method,
        "nash_mtl": NashMTLConfig(update_weights_every=2),
        "checkpoint_every_steps": 3,
        "epochs": 2,
        "micro_batch_size": 5,
    }
    whole = Trainer(make_config(run_dir=tmp_path / "whole", **options), model=make_model())
    whole.fit()
    config = make_config(**options)
    crashed = Trainer(config, model=make_model())
    step = crashed.train_step

    def crashing(images, target):
        if crashed.progress.step == 7:
            raise CrashError
        return step(images, target)

    crashed.train_step = crashing
    with pytest.raises(CrashError):
        crashed.fit()
    torch.manual_seed(99)
    resumed = Trainer(replace(config, resume=True), model=make_model())
    assert resumed.progress.step == 6
    resumed.fit()
    for one, other in ((whole.raw_model, resumed.raw_model), (whole.raw_method, resumed.raw_method)):
        for name, value in one.state_dict().items():
            assert torch.equal(value, other.state_dict()[name]), name
    assert len(whole.raw_method.state_dict()) == (2 if method == "nash_mtl" else 0)
    assert load_adapters(config.run_dir) == {}  # state, but nothing that was trained


@pytest.mark.parametrize("method", ["pcgrad", "cagrad", "nash_mtl", "ge"])
def test_trains_in_bf16(make_config, make_model, method):
    trainer = Trainer(make_config(epochs=2, precision="bf16", method=method), model=make_model(dropout=0.0))
    rows = trainer.fit().rows
    assert rows[-1]["train_loss"] < rows[0]["train_loss"] * 1.2
    assert {parameter.grad.dtype for parameter in trainer.raw_model.parameters()} == {torch.float32}


def test_options_reach_the_method(make_config, make_model):
    config = make_config(method="cagrad", cagrad=CAGradConfig(c=0.5, scale="mean"))
    assert Trainer(config, model=make_model()).raw_method.config == config.cagrad


def test_does_not_go_with_several_processes(make_config, make_model, monkeypatch):
    class Two:
        num_processes = 2

    monkeypatch.setattr(build, "accelerator_for", lambda *_: Two())
    with pytest.raises(ValueError, match=r"method: expected joint, byot, ge or meta_gf with 2 processes, got nash_mtl"):
        Trainer(make_config(method="nash_mtl"), model=make_model())


@pytest.mark.parametrize("option", [{"compile": True}, {"precision": "fp16"}])
def test_does_not_go_with_what_hides_an_exits_own_gradient(make_model, option):
    (name,) = option
    with pytest.raises(ValueError, match=rf"{name}: expected .*method=pcgrad"):
        build.build_method(TrainConfig(method="pcgrad", **option), make_model())
