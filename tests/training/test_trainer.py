import csv
import json
import logging
from dataclasses import replace

import pytest
import torch
import yaml

from dfs_engine.data import DataConfig
from dfs_engine.runtime import memory
from dfs_engine.runtime.backend import BACKENDS
from dfs_engine.training import checkpoint
from dfs_engine.training.config import ModelConfig, OptimConfig, TrainConfig
from dfs_engine.training.trainer import Trainer


class CrashError(Exception):
    """What the tests interrupt a run with."""


def crash_at(trainer, step):
    train_step = trainer.train_step

    def crashing(images, target):
        if trainer.progress.step == step:
            raise CrashError
        return train_step(images, target)

    trainer.train_step = crashing
    return trainer


def csv_rows(run_dir):
    with (run_dir / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    # Times are the machine's, all the rest is the run's.
    return [{name: value for name, value in row.items() if "second" not in name} for row in rows]


def assert_same_state(one, other):
    for name, value in one.raw_model.state_dict().items():
        assert torch.equal(value, other.raw_model.state_dict()[name]), name
    momenta = [trainer.optimizer.state_dict()["state"] for trainer in (one, other)]
    assert len(momenta[0]) > 0
    for index, state in momenta[0].items():
        assert torch.equal(state["momentum_buffer"], momenta[1][index]["momentum_buffer"]), index


def test_run_folder(make_config, make_model):
    config = make_config(tensorboard=True)
    result = Trainer(config, model=make_model()).fit()
    names = {path.name for path in config.run_dir.iterdir()}
    assert names == {
        ".lock",
        "accuracy_per_exit.png",
        "checkpoints",
        "config.yaml",
        "environment.yaml",
        "metrics.csv",
        "model.safetensors",
        "tensorboard",
    }
    assert (config.run_dir / "accuracy_per_exit.png").read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in (config.run_dir / "checkpoints").iterdir()] == ["step-00000015"]
    rows = csv_rows(config.run_dir)
    assert [row["epoch"] for row in rows] == ["1", "2", "3"]
    last = result.rows[-1]
    assert last["train_loss"] == pytest.approx(sum(last[f"train_loss_exit{index}"] for index in range(1, 7)))
    assert last["test_top1_exit6"] == result.metrics["exits"][5]["top1"]
    assert result.metrics["num_samples"] == 11
    environment = yaml.safe_load((config.run_dir / "environment.yaml").read_text())
    assert environment["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert environment["backend"] in BACKENDS
    assert "synthetic" in environment["data"]


def test_first_step_is_sgd_on_the_sum_of_cross_entropies(make_config, make_model):
    optim = OptimConfig(lr=0.1, momentum=0.9, weight_decay=0.01)
    trainer = Trainer(make_config(optim=optim, channels_last=False), model=make_model(dropout=0.0))
    expected = make_model(dropout=0.0).train()
    images, target = next(iter(trainer.train_loader))
    trainer.model.train()
    losses = trainer.train_step(images, target)
    logits = expected(images)
    parts = [torch.nn.functional.cross_entropy(exit_logits, target) for exit_logits in logits]
    sum(parts).backward()
    torch.testing.assert_close(losses, torch.stack(parts).detach())
    for name, parameter in expected.named_parameters():
        updated = parameter - 0.1 * (parameter.grad + 0.01 * parameter)
        torch.testing.assert_close(
            trainer.raw_model.get_parameter(name), updated, msg=lambda text, n=name: f"{n}: {text}"
        )


@pytest.mark.skipif(not memory.is_available(), reason="needs the C++ extension")
@pytest.mark.parametrize("wanted", [True, False])
def test_memory_is_cached_while_training_and_as_asked(make_config, make_model, monkeypatch, wanted):
    seen, step = set(), Trainer.train_step

    def observed(self, *batch):
        seen.add(memory.caching_allocator_enable(wanted))
        return step(self, *batch)

    monkeypatch.setattr(Trainer, "train_step", observed)
    Trainer(make_config(caching_allocator=wanted, epochs=1), model=make_model()).fit()
    assert seen == {wanted}
    assert not memory.caching_allocator_enable(False), "switched back after training"


def test_weight_decay_can_spare_norms_and_biases(make_config, make_model):
    optim = OptimConfig(lr=0.1, momentum=0.0, weight_decay=0.1, decay_norm_and_bias=False)
    trainer = Trainer(make_config(optim=optim), model=make_model())
    before = {name: p.detach().clone() for name, p in trainer.raw_model.named_parameters()}
    for parameter in trainer.raw_model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    trainer.optimizer.step()
    for name, parameter in trainer.raw_model.named_parameters():
        factor = 0.99 if parameter.ndim > 1 else 1.0
        torch.testing.assert_close(parameter, before[name] * factor)


def test_same_seed_same_run_and_other_seed_another(make_config, make_model, tmp_path):
    def run(name, seed):
        trainer = Trainer(make_config(run_dir=tmp_path / name, seed=seed, epochs=2), model=make_model())
        trainer.fit()
        return trainer

    first, again, other = run("first", 3), run("again", 3), run("other", 4)
    assert_same_state(first, again)
    assert csv_rows(tmp_path / "first") == csv_rows(tmp_path / "again")
    assert csv_rows(tmp_path / "first") != csv_rows(tmp_path / "other")
    assert not torch.equal(first.raw_model.blocks[0].conv.weight, other.raw_model.blocks[0].conv.weight)


def test_workers_do_not_change_the_run(make_config, make_model, tmp_path):
    data = make_config().data
    runs = []
    for workers in (0, 2):
        config = make_config(run_dir=tmp_path / str(workers), data=replace(data, num_workers=workers), epochs=2)
        runs.append(Trainer(config, model=make_model()))
        runs[-1].fit()
    assert_same_state(*runs)


@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "channels_last"])
@pytest.mark.parametrize(
    ("every", "step", "resumed_at"), [(2, 8, 8), (3, 8, 6), (0, 7, 5), (0, 5, 5)], ids=lambda value: str(value)
)
def test_resumed_run_is_bit_exact(make_config, make_model, tmp_path, channels_last, every, step, resumed_at):
    options = {"checkpoint_every_steps": every, "channels_last": channels_last}
    whole = Trainer(make_config(run_dir=tmp_path / "whole", **options), model=make_model())
    whole.fit()
    config = make_config(**options)
    with pytest.raises(CrashError):
        crash_at(Trainer(config, model=make_model()), step).fit()
    torch.manual_seed(99)
    resumed = Trainer(replace(config, resume=True), model=make_model())
    assert resumed.progress.step == resumed_at
    resumed.fit()
    assert_same_state(whole, resumed)
    assert csv_rows(config.run_dir) == csv_rows(tmp_path / "whole")


def test_crash_between_report_and_checkpoint_gives_no_duplicate_rows(make_config, make_model, monkeypatch):
    config = make_config(epochs=2)
    trainer = Trainer(config, model=make_model())
    save = checkpoint.save

    def crash(accelerator, run_dir, *, step, description):
        if step == 10:
            accelerator.save_state(str(run_dir / "checkpoints" / ".step-00000010.partial"))
            raise CrashError
        return save(accelerator, run_dir, step=step, description=description)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save", crash)
        with pytest.raises(CrashError):
            trainer.fit()
    assert len(csv_rows(config.run_dir)) == 2
    Trainer(replace(config, resume=True), model=make_model()).fit()
    assert [row["epoch"] for row in csv_rows(config.run_dir)] == ["1", "2"]
    assert [path.name for path in (config.run_dir / "checkpoints").iterdir()] == ["step-00000010"]


def test_resuming_a_finished_run_evaluates_it(make_config, make_model):
    config = make_config(epochs=1)
    first = Trainer(config, model=make_model()).fit()
    again = Trainer(replace(config, resume=True), model=make_model()).fit()
    assert again.metrics == first.metrics
    assert again.rows == first.rows


def test_more_epochs_on_resume_says_so(make_config, make_model, caplog):
    config = make_config(epochs=1)
    Trainer(config, model=make_model()).fit()
    with caplog.at_level(logging.WARNING):
        result = Trainer(replace(config, resume=True, epochs=2), model=make_model()).fit()
    assert "another epochs: 2, was 1" in caplog.text
    assert len(result.rows) == 2


@pytest.mark.parametrize("change", [{"seed": 5}, {"batch_size": 4}], ids=str)
def test_resume_refuses_another_run(make_config, make_model, tree, change):
    config = make_config(epochs=1)
    Trainer(config, model=make_model()).fit()
    before = tree(config.run_dir)
    name = next(iter(change))
    with pytest.raises(ValueError, match=f"{name}: expected {getattr(config, name)} as in the run to resume"):
        Trainer(replace(config, resume=True, **change), model=make_model())
    assert tree(config.run_dir) == before


def test_resume_refuses_another_model(make_config, make_model, tree):
    config = make_config(epochs=1)
    Trainer(config, model=make_model()).fit()
    before = tree(config.run_dir)
    with pytest.raises(ValueError, match=r"expected a model with width=6, got .* of a model with width=4"):
        Trainer(replace(config, resume=True), model=make_model(width=6))
    assert tree(config.run_dir) == before


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.bin", "random_states_0.pkl", "manifest.json"])
def test_resume_refuses_a_truncated_checkpoint(make_config, make_model, tree, name):
    config = make_config(epochs=1)
    Trainer(config, model=make_model()).fit()
    file = config.run_dir / "checkpoints" / "step-00000005" / name
    file.write_bytes(file.read_bytes()[:-7])
    before = tree(config.run_dir)
    with pytest.raises(ValueError, match=rf"checkpoint: expected .*{name}.* Train anew"):
        Trainer(replace(config, resume=True), model=make_model())
    assert tree(config.run_dir) == before


def test_run_folder_that_holds_a_run(make_config, make_model, tree):
    config = make_config(epochs=1)
    Trainer(config, model=make_model()).fit()
    before = tree(config.run_dir)
    with pytest.raises(FileExistsError, match=r"run_dir: .*--resume true"):
        Trainer(config, model=make_model())
    assert tree(config.run_dir) == before


def test_resume_without_a_checkpoint(make_config, make_model):
    config = make_config(resume=True)
    with pytest.raises(FileNotFoundError, match="run_dir: expected a checkpoint"):
        Trainer(config, model=make_model())
    assert not config.run_dir.exists()


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_nan_stops_and_keeps_the_last_good_checkpoint(make_config, make_model, tree, where):
    config = make_config()
    trainer = Trainer(config, model=make_model())
    train_step = trainer.train_step

    def poison(images, target):
        if trainer.progress.step == 7 and where == "loss":
            images = images * float("nan")
        if trainer.progress.step == 7 and where == "gradient":
            trainer.raw_model.blocks[2].conv.weight.register_hook(lambda grad: grad * float("inf"))
        return train_step(images, target)

    trainer.train_step = poison
    with pytest.raises(FloatingPointError, match=r"at step 8 \(epoch 2\): exit 1 .*step-00000005") as caught:
        trainer.fit()
    assert ("exit 6 nan" in str(caught.value)) == (where == "loss")
    assert "the gradient of" in str(caught.value)
    assert all(parameter.isfinite().all() for parameter in trainer.raw_model.parameters())
    _, saved = checkpoint.latest(config.run_dir, trainer.raw_model.get_config())
    assert saved["progress"]["step"] == 5
    assert len(csv_rows(config.run_dir)) == 1


def test_bf16_trains_and_resumes(make_config, make_model):
    config = make_config(precision="bf16", epochs=2)
    with pytest.raises(CrashError):
        crash_at(Trainer(config, model=make_model()), 6).fit()
    trainer = Trainer(replace(config, resume=True), model=make_model())
    seen = []
    trainer.raw_model.exits[0].register_forward_hook(lambda _module, _input, logits: seen.append(logits.dtype))
    trainer.fit()
    assert set(seen) == {torch.bfloat16}
    assert {parameter.dtype for parameter in trainer.raw_model.parameters()} == {torch.float32}


def test_fp16_on_the_cpu_is_refused(make_config, make_model):
    with pytest.raises(ValueError, match="precision: expected fp32 or bf16 on the CPU"):
        Trainer(make_config(precision="fp16"), model=make_model())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_gpu_trains_and_resumes(make_config, make_model, precision):
    config = make_config(precision=precision, epochs=2, device="auto")
    with pytest.raises(CrashError):
        crash_at(Trainer(config, model=make_model()), 6).fit()
    result = Trainer(replace(config, resume=True), model=make_model()).fit()
    assert len(result.rows) == 2


def test_channels_last_reaches_weights_and_images(make_config, make_model):
    trainer = Trainer(make_config(epochs=1), model=make_model())
    seen = []
    trainer.raw_model.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0]))
    trainer.fit()
    assert all(images.is_contiguous(memory_format=torch.channels_last) for images in seen)
    assert trainer.raw_model.blocks[1].conv.weight.is_contiguous(memory_format=torch.channels_last)


def test_compile_keeps_the_names_of_the_weights(make_config, make_model, monkeypatch):
    compiled = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module: compiled.append(module))
    trainer = Trainer(make_config(compile=True), model=make_model())
    assert compiled == [trainer.raw_model]


def test_without_run_dir_each_run_gets_its_own(make_config, make_model, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    result = Trainer(make_config(run_dir=None, epochs=1), model=make_model()).fit()
    assert result.run_dir.parent.name == "runs"
    assert result.run_dir.name.endswith("synthetic-vgg7_64-dfs")


def test_step_lines_without_a_terminal(make_config, make_model, caplog):
    with caplog.at_level(logging.INFO):
        Trainer(make_config(epochs=1, log_every_steps=2), model=make_model()).fit()
    assert "epoch 1, step 4/5: training loss" in caplog.text
    assert "epoch 1/1: training loss" in caplog.text


def test_milestone_after_the_end_is_said(make_config, make_model, caplog):
    optim = OptimConfig(schedule="multistep", milestones=(2, 9))
    with caplog.at_level(logging.WARNING):
        Trainer(make_config(optim=optim), model=make_model())
    assert "[9] come after the last of 3 epochs" in caplog.text


def test_model_and_data_of_the_config_are_built(tmp_path):
    config = TrainConfig(
        model=ModelConfig(beta=0.3, variant="detach"),
        data=DataConfig(name="synthetic", synthetic_classes=7, synthetic_train=4, synthetic_test=2),
        run_dir=tmp_path / "run",
        device="cpu",
        batch_size=4,
    )
    trainer = Trainer(config)
    built = trainer.raw_model.get_config()
    assert (built["num_classes"], built["beta"], built["variant"]) == (7, 0.3, "detach")
    assert trainer.data.train[0][0].shape == (3, 32, 32)
    assert not config.run_dir.exists()


def test_config_file_of_the_run_folder_is_complete(make_config, make_model):
    config = make_config(epochs=1)
    trainer = Trainer(config, model=make_model())
    trainer.fit()
    saved = yaml.safe_load((config.run_dir / "config.yaml").read_text())
    assert saved == json.loads(json.dumps(trainer.config.to_dict()))
    assert (saved["data"]["mean"], saved["data"]["std"]) == ([0.5] * 3, [0.2] * 3)
    assert saved["data"]["synthetic_train"] == 38
