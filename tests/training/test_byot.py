"""A method with parameters of its own: trained, checkpointed, resumed, and no part of the saved model."""

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from dfs_engine.training.adapters import load_adapters
from dfs_engine.training.trainer import Trainer


def test_adapters_are_trained_and_resumed_exactly(make_config, make_model, tmp_path):
    options = {"method": "byot", "checkpoint_every_steps": 2, "epochs": 2}
    whole = Trainer(make_config(run_dir=tmp_path / "whole", **options), model=make_model("dense"))
    initial = {name: value.clone() for name, value in whole.raw_method.state_dict().items()}
    whole.fit()
    assert len(initial) == 5
    assert all(not torch.equal(value, initial[name]) for name, value in whole.raw_method.state_dict().items())

    config = make_config(**options)
    first = Trainer(config, model=make_model("dense"))
    train_step = first.train_step

    def crashing(images, target):
        if first.progress.step == 7:
            raise ZeroDivisionError
        return train_step(images, target)

    first.train_step = crashing  # type: ignore[method-assign]
    with pytest.raises(ZeroDivisionError):
        first.fit()
    torch.manual_seed(99)
    resumed = Trainer(replace(config, resume=True), model=make_model("dense"))
    assert resumed.progress.step == 6
    resumed.fit()
    for one, other in ((whole.raw_model, resumed.raw_model), (whole.raw_method, resumed.raw_method)):
        for name, value in one.state_dict().items():
            assert torch.equal(value, other.state_dict()[name]), name
    assert not any("adapter" in name for name in load_file(config.run_dir / "model.safetensors"))
    beside = load_adapters(config.run_dir)
    assert beside.keys() == initial.keys()
    assert all(torch.equal(value, resumed.raw_method.state_dict()[name]) for name, value in beside.items())
