"""Fine-tuning a BERT on sentences: the run folder, exact resume, regression, the command."""

import csv
import json
import random
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
import yaml

from dfs_engine.cli import main
from dfs_engine.data import DataConfig, load_data
from dfs_engine.models.weights import load_model, read_description
from dfs_engine.training.config import ModelConfig, OptimConfig, TrainConfig
from dfs_engine.training.trainer import Trainer

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")


@pytest.fixture
def make_config(tmp_path, tiny_bert):
    """Sentences of few words, whose label is whether, or how much, they are of the second half of the vocabulary."""

    def make(task: str = "sst2", num_train: int = 22, **changes) -> TrainConfig:
        root = tmp_path / task
        root.mkdir(exist_ok=True)
        for split, count in (("train", num_train), ("validation", 9)):
            labels = [index % 2 for index in range(count)]
            words = [
                [f"w{random.randrange(20) + 20 * label}" for _ in range(random.randrange(2, 8))] for label in labels
            ]
            table = {"sentence": [" ".join(one) for one in words], "label": labels}
            if task == "stsb":
                table = {"sentence1": table["sentence"], "sentence2": table["sentence"]}
                table["label"] = [5.0 * label - 0.1 * len(one) for label, one in zip(labels, words, strict=True)]
            if not list(root.glob(f"{split}*")):
                pq.write_table(pa.table(table), root / f"{split}.parquet")
        config = TrainConfig(
            model=ModelConfig(name="bert", pretrained=str(tiny_bert)),
            data=DataConfig(name=task, root=str(root), tokenizer=str(tiny_bert), max_tokens=18),
            optim=OptimConfig(name="adamw", lr=0.01, schedule="linear", warmup_epochs=0.5, weight_decay=0.01),
            epochs=2,
            batch_size=4,
            eval_batch_size=4,
            run_dir=tmp_path / "run",
            tensorboard=False,
            device="cpu",
        )
        return replace(config, **changes)

    return make


def rows_of(run_dir):
    with (run_dir / "metrics.csv").open() as file:
        return [{key: value for key, value in row.items() if "second" not in key} for row in csv.DictReader(file)]


def assert_same_state(one, other):
    for name, value in one.raw_model.state_dict().items():
        assert torch.equal(value, other.raw_model.state_dict()[name]), name
    left, right = (trainer.optimizer.state_dict()["state"] for trainer in (one, other))
    assert left.keys() == right.keys()
    for index, state in left.items():
        assert {"exp_avg", "exp_avg_sq", "step"} <= state.keys()
        assert all(torch.equal(value, right[index][name]) for name, value in state.items()), index


@pytest.mark.parametrize("variant", ["dense", "dfs"])
def test_it_learns(make_config, variant):
    config = make_config(num_train=160, epochs=5)
    trainer = Trainer(replace(config, model=replace(config.model, variant=variant)))
    result = trainer.fit()
    first, last = result.rows[0], result.rows[-1]
    assert last["train_loss"] < 0.5 * first["train_loss"]
    assert all(values["top1"] > 80 for values in result.metrics["exits"])
    assert result.metrics["ensemble"].keys() == {"top1", "loss"}
    assert "test_top5_exit1" not in last
    assert (config.run_dir / "accuracy_per_exit.png").exists()
    weights, description = load_model(config.run_dir), read_description(config.run_dir)
    assert weights.get_config() == trainer.raw_model.get_config()
    assert description["data"]["name"] == "sst2"


def test_resumed_run_is_bit_exact(make_config, tmp_path):
    """With dropout, AdamW's moments, a schedule, and a subset per epoch."""
    config = make_config(checkpoint_every_steps=2)
    config = replace(config, data=replace(config.data, max_train=14))
    whole = Trainer(replace(config, run_dir=tmp_path / "whole"))
    whole.fit()
    crashed = Trainer(config)
    step = crashed.train_step

    def crash(input, target):
        if crashed.progress.step == 7:
            raise KeyboardInterrupt
        return step(input, target)

    crashed.train_step = crash
    with pytest.raises(KeyboardInterrupt):
        crashed.fit()
    torch.manual_seed(99)
    resumed = Trainer(replace(config, resume=True))
    assert resumed.progress.step == 6
    resumed.fit()
    assert_same_state(whole, resumed)
    assert rows_of(config.run_dir) == rows_of(tmp_path / "whole")
    with pytest.raises(ValueError, match=r"data\.max_train: expected 14 as in the run to resume, got 12"):
        Trainer(replace(config, resume=True, data=replace(config.data, max_train=12)))


def test_regression(make_config):
    config = make_config("stsb", num_train=160, epochs=5)
    trainer = Trainer(replace(config, optim=replace(config.optim, lr=0.003)))
    assert trainer.raw_model.num_classes == 1
    result = trainer.fit()
    assert result.metrics["ensemble"].keys() == {"pearson", "spearman", "loss"}
    assert result.metrics["exits"][-1]["pearson"] > 80
    assert result.rows[-1]["train_loss"] < result.rows[0]["train_loss"]


def test_byot_distils_classes_and_refuses_a_regression(make_config):
    Trainer(make_config(method="byot", epochs=1)).fit()
    with pytest.raises(ValueError, match="method: expected joint for a regression, got byot"):
        Trainer(make_config("stsb", method="byot", run_dir=None))


def test_workers_do_not_change_the_run(make_config, tmp_path):
    runs = []
    for workers in (0, 1):
        config = make_config(run_dir=tmp_path / str(workers), epochs=1)
        runs.append(Trainer(replace(config, data=replace(config.data, num_workers=workers))))
        runs[-1].fit()
    assert_same_state(*runs)


def test_command_trains_and_evaluates(make_config, tiny_bert, tmp_path, capsys):
    data = make_config().data
    line = [
        "--model.name",
        "bert",
        "--model.pretrained",
        str(tiny_bert),
        "--data.name",
        "sst2",
        "--data.root",
        data.root,
    ]
    line += [
        "--data.tokenizer",
        str(tiny_bert),
        "--data.max_tokens",
        "18",
        "--data.max_train",
        "8",
        "--batch_size",
        "4",
    ]
    line += ["--optim.name", "adamw", "--optim.schedule", "linear", "--epochs", "1", "--tensorboard", "false"]
    run_dir = tmp_path / "run"
    assert main(["train", *line, "--device", "cpu", "--run_dir", str(run_dir), "--json", str(tmp_path / "out")]) == 0
    result = json.loads((tmp_path / "out").read_text())
    assert result["epochs"][-1]["step"] == 2
    assert "top-1 %" in capsys.readouterr().out
    assert main(["eval", str(run_dir), "--device", "cpu", "--json", str(tmp_path / "eval")]) == 0
    again = json.loads((tmp_path / "eval").read_text())
    assert again["ensemble"] == pytest.approx(result["metrics"]["ensemble"], rel=1e-5)
    assert "top-5" not in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("task", ["sst2", "stsb"])
def test_two_processes_train_and_measure_as_one(make_config, tmp_path, task):
    """The test sentences are shared unevenly, 5 and 4, and correlations need all predictions in one place."""
    # Not AdamW: it makes steps of rounding where a gradient is nothing else.
    off = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    config = make_config(task, 20, run_dir=None, num_threads=1, optim=OptimConfig(lr=0.02, momentum=0.5))
    config = replace(config, model=replace(config.model, options={"config": off}))
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(config.to_dict()))
    results = []
    for count in (1, 2):
        launcher = ["torch.distributed.run", "--standalone", "--nproc_per_node", str(count), "-m", "dfs_engine"]
        line = [
            "train",
            "--config",
            str(file),
            "--run_dir",
            str(tmp_path / f"run{count}"),
            "--json",
            f"{tmp_path}/{count}",
        ]
        command = [sys.executable, "-m", *launcher, *line]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-3000:]
        results.append(json.loads((tmp_path / str(count)).read_text()))
    one, two = (result["metrics"] for result in results)
    assert two["num_samples"] == 9
    for left, right in zip([*two["exits"], two["ensemble"]], [*one["exits"], one["ensemble"]], strict=True):
        assert left == pytest.approx(right, rel=1e-3)


def test_data_and_model_that_do_not_fit(make_config, tiny_bert):
    config = make_config()
    with pytest.raises(ValueError, match=r"data\.name: expected one of cola, .*text_files"):
        Trainer(replace(config, data=DataConfig(name="digits")))
    with pytest.raises(ValueError, match=r"data\.name: expected one of digits"):
        Trainer(replace(config, model=ModelConfig(name="vgg7_64")))
    with pytest.raises(TypeError, match="pretrained"):
        Trainer(replace(config, model=ModelConfig(name="vgg7_64", pretrained=str(tiny_bert)), data=DataConfig()))


def test_token_batches_stay_integers_on_their_way(make_config):
    trainer = Trainer(make_config(channels_last=True))
    input, target = next(iter(trainer.train_loader))
    assert {value.dtype for value in input.values()} == {torch.int64}
    assert target.dtype == torch.int64
    assert trainer.train_step(input, target).shape == (3,)
    assert len(load_data(trainer.config.data, input_shape=(20,)).train) == 22
