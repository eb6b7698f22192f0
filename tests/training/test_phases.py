"""Runs by methods that learn something of their own, or make several passes over the data in an epoch."""

import logging
from dataclasses import replace

import pytest
import torch

from dfs_engine.methods import DRMGFConfig, MetaGFConfig, WPNConfig
from dfs_engine.models.weights import load_model
from dfs_engine.training import build
from dfs_engine.training.adapters import load_adapters
from dfs_engine.training.config import OptimConfig, TrainConfig
from dfs_engine.training.trainer import Trainer

STEPS = 3  # of a pass, in batches of 16
PASSES = 7  # of an epoch: 6 exits, and the fusion


class CrashError(Exception):
    """What the test interrupts a run with."""


def crash_at(trainer, step):
    train_step = trainer.train_step

    def crashing(images, target):
        if trainer.progress.step == step:
            raise CrashError
        return train_step(images, target)

    trainer.train_step = crashing
    return trainer


def rows_of(trainer):
    return [{name: value for name, value in row.items() if "second" not in name} for row in trainer.progress.rows]


@pytest.mark.parametrize(
    ("method", "crashes"),
    [
        ("bdl2", [(2, 5, 4)]),
        ("wpn", [(2, 5, 4)]),
        # Within an exit's pass; at the end of one; within the fusion of the second epoch.
        ("meta_gf", [(4, 5, 4), (6, 7, 6), (20, 41, 40)]),
        # Within a gated pass; within the fusion, before and after kernels are trained as they are.
        ("dr_mgf", [(4, 5, 4), (20, 41, 40)]),
    ],
)
def test_resumes_bit_for_bit(make_config, make_model, tmp_path, method, crashes):
    variant = "detach" if method == "wpn" else "dfs"
    options = {
        "method": method,
        "epochs": 2,
        "optim": OptimConfig(lr=0.02),
        "batch_size": 16,
        "dr_mgf": DRMGFConfig(start=1),
    }
    if method != "wpn":
        options["micro_batch_size"] = 5
    whole = Trainer(make_config(run_dir=tmp_path / "whole", **options), model=make_model(variant))
    whole.fit()
    assert whole.raw_method.state_dict() or method == "bdl2"
    for every, step, resumed_at in crashes:
        config = make_config(run_dir=tmp_path / f"crash-{step}", checkpoint_every_steps=every, **options)
        with pytest.raises(CrashError):
            crash_at(Trainer(config, model=make_model(variant)), step).fit()
        torch.manual_seed(99)
        resumed = Trainer(replace(config, resume=True), model=make_model(variant))
        assert resumed.progress.step == resumed_at
        resumed.fit()
        for one, other in ((whole.raw_model, resumed.raw_model), (whole.raw_method, resumed.raw_method)):
            for name, value in one.state_dict().items():
                assert torch.equal(value, other.state_dict()[name]), (step, name)
        momenta = [trainer.optimizer.state_dict()["state"] for trainer in (whole, resumed)]
        for index, state in momenta[0].items():
            assert torch.equal(state["momentum_buffer"], momenta[1][index]["momentum_buffer"]), index
        assert rows_of(whole) == rows_of(resumed)
    assert load_adapters(config.run_dir) == {}  # what is learned is no part of the weights
    load_model(config.run_dir)


def test_an_epoch_of_several_passes(make_config, make_model, caplog):
    optim = OptimConfig(lr=0.02, schedule="multistep", milestones=(1,), warmup_epochs=0.67)
    trainer = Trainer(make_config(method="meta_gf", epochs=2, optim=optim, batch_size=16), model=make_model())
    seen, step = [], trainer.train_step

    def observed(images, target):
        seen.append((trainer.optimizer.param_groups[0]["lr"], trainer.step.epoch, trainer.step.phase, images.sum()))
        return step(images, target)

    trainer.train_step = observed
    with caplog.at_level(logging.INFO):
        result = trainer.fit()
    assert len(seen) == 2 * PASSES * STEPS
    assert [place[1:3] for place in seen[::STEPS]] == [(epoch, phase) for epoch in (0, 1) for phase in range(PASSES)]
    rates = [rate for rate, *_ in seen]
    for start in range(0, PASSES * STEPS, STEPS):
        assert rates[start : start + STEPS] == pytest.approx([0.01, 0.02, 0.02])
    assert rates[PASSES * STEPS :] == pytest.approx([0.002] * PASSES * STEPS)
    assert len({float(total) for *_, total in seen}) == len(seen)  # every pass has its own batches
    assert [row["step"] for row in result.rows] == [21, 42]
    assert 1.0 < result.rows[0]["train_loss_exit1"] < 4.0  # the mean over all passes
    assert "for 2 epochs of 7 passes over 38 samples" in caplog.text


@pytest.mark.parametrize("method", ["bdl1", "wpn", "meta_gf", "dr_mgf"])
def test_trains_in_bf16(make_config, make_model, method):
    config = make_config(epochs=2, batch_size=16, precision="bf16", method=method, optim=OptimConfig(lr=0.02))
    trainer = Trainer(config, model=make_model("detach", dropout=0.0))
    rows = trainer.fit().rows
    assert rows[-1]["train_loss"] < rows[0]["train_loss"] * 1.2
    assert {parameter.dtype for parameter in trainer.raw_model.parameters()} == {torch.float32}


def test_options_reach_the_method(make_config, make_model):
    config = make_config(method="wpn", wpn=WPNConfig(epsilon=0.3, constraint_dimension="mat"))
    assert Trainer(config, model=make_model("dense")).raw_method.config == config.wpn
    config = make_config(method="meta_gf", meta_gf=MetaGFConfig(aux=0.3))
    assert Trainer(config, model=make_model()).raw_method.config == config.meta_gf


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("bdl1", {"compile": True}, r"compile: expected false with method=bdl1, got true: a compiled backward"),
        (
            "meta_gf",
            {"optim": OptimConfig(ema_decay=0.9)},
            r"optim\.ema_decay: expected 0 with method=meta_gf, got 0.9",
        ),
        ("meta_gf", {"precision": "fp16"}, r"precision: expected fp32 or bf16 with method=meta_gf, got fp16"),
        ("wpn", {"micro_batch_size": 4}, r"micro_batch_size: expected none with method=wpn, got 4: the weights are"),
        (
            "wpn",
            {"optim": OptimConfig(name="adamw")},
            r"optim\.name: expected sgd with method=wpn, got adamw: the step",
        ),
    ],
)
def test_what_a_method_does_not_go_with(make_model, method, options, message):
    with pytest.raises(ValueError, match=message):
        build.build_method(TrainConfig(method=method, **options), make_model("dense"))
