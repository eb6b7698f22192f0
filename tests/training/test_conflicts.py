"""`dfs conflicts` on a tiny digits run, and `dfs train --conflicts_every`, which changes nothing of a run."""

import csv
import json
from dataclasses import replace

import pytest
import torch

from dfs_engine.cli import main
from dfs_engine.data import DataConfig
from dfs_engine.models import create_model
from dfs_engine.models.weights import save_model
from dfs_engine.training.conflicts import ConflictsConfig, read_rows, run
from dfs_engine.training.trainer import Trainer

TINY = [
    *("--data.name", "digits", "--data.image_size", "8", "--model.options", "{width: 4}", "--batch_size", "400"),
    *("--num_threads", "1", "--device", "cpu"),
]


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("conflicts") / "run"
    line = ["train", *TINY, "--epochs", "2", "--tensorboard", "false", "--conflicts_every", "1"]
    assert main([*line, "--run_dir", str(folder)]) == 0
    return folder


def measure(*line):
    return main(["conflicts", *map(str, line), "--batches", "2", "--batch_size", "200", "--device", "cpu"])


def test_the_command_measures_a_run_on_its_own_data(run_dir, capsys, tmp_path):
    assert measure(run_dir, "--json", tmp_path / "conflicts.json") == 0
    printed = capsys.readouterr().out
    assert "scikit-learn digits (real" in printed
    assert "disjoint" in printed
    result = json.loads((tmp_path / "conflicts.json").read_text())
    (weights,) = result["weights"]
    assert weights["epoch"] == 2
    assert weights["summary"][-1]["name"] == "network"
    assert weights["summary"][-1]["num_disjoint"] == 50
    files = {f"conflicts{name}" for name in (".csv", "_blocks.png", "_layers.png")}
    assert {path.rpartition("/")[2] for path in result["files"]} == files
    folder = run_dir / "conflicts"
    assert all((folder / name).stat().st_size > 0 for name in files)
    with (folder / "conflicts.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(weights["pairs"])
    assert all(-1 <= float(row["cosine"]) <= 1 for row in rows)
    assert {row["kind"] for row in rows} == {"shared", "disjoint"}


def test_a_run_records_every_epoch(run_dir):
    rows = read_rows(run_dir / "conflicts" / "over_training.csv")
    assert {row["epoch"] for row in rows} == {1, 2}
    assert {row["level"] for row in rows} == {"network", "block", "parameter"}
    assert (run_dir / "conflicts" / "over_training.png").stat().st_size > 0


def test_several_weights_and_a_new_model(run_dir, tmp_path, capsys):
    assert measure(run_dir, run_dir / "model.safetensors", "--output", tmp_path) == 0
    assert {path.name for path in tmp_path.iterdir()} == {
        "conflicts.csv", "conflicts_blocks_1.png", "conflicts_blocks_2.png", "conflicts_layers_1.png",
        "conflicts_layers_2.png", "conflicts_over_training.png",
    }  # fmt: skip
    first, second = ([row for row in read_rows(tmp_path / "conflicts.csv") if row["source"] == str(source)]
                     for source in (run_dir, run_dir / "model.safetensors"))  # fmt: skip
    assert [row["cosine"] for row in first] == [row["cosine"] for row in second]  # the same weights and batches
    new = ["--model.variant", "dense", "--model.options", "{width: 4}", "--data.name", "digits"]
    assert measure(*new, "--data.image_size", "8", "--output", tmp_path / "new") == 0
    rows = read_rows(tmp_path / "new" / "conflicts.csv")
    assert {(row["source"], row["epoch"]) for row in rows} == {("new", 0)}
    assert {row["kind"] for row in rows} == {"shared"}


def test_errors_are_one_line(tmp_path, capsys):
    with pytest.raises(SystemExit) as caught:
        measure(tmp_path / "nothing")
    assert caught.value.code == 2
    assert "expected a run folder with model.safetensors" in capsys.readouterr().err
    options = "{num_exits: 1, channels: 4, growth: 2}"
    with pytest.raises(SystemExit):
        measure("--model.name", "msdnet_cifar", "--model.options", options, "--data.name", "digits")
    assert "expected one with two exits or more" in capsys.readouterr().err.splitlines()[-1]
    with pytest.raises(SystemExit):
        measure("--data.name", "cifar10", "--data.root", tmp_path)
    assert str(tmp_path) in capsys.readouterr().err.splitlines()[-1]
    with pytest.raises(ValueError, match="batches: expected"):
        ConflictsConfig(batches=0)


def test_recording_changes_nothing_of_a_run_and_a_resumed_one_records_the_same(make_config, make_model, tmp_path):
    results = {}
    for every in (0, 1):
        config = replace(make_config(run_dir=tmp_path / f"run{every}"), conflicts_every=every)
        trainer = Trainer(config, model=make_model(num_classes=10))
        trainer.fit()
        results[every] = {name: value.clone() for name, value in trainer.raw_model.state_dict().items()}
    assert all(torch.equal(value, results[1][name]) for name, value in results[0].items())
    whole = read_rows(tmp_path / "run1" / "conflicts" / "over_training.csv")
    short = replace(make_config(run_dir=tmp_path / "again"), conflicts_every=1)
    Trainer(replace(short, epochs=2), model=make_model(num_classes=10)).fit()
    Trainer(replace(short, resume=True), model=make_model(num_classes=10)).fit()
    again = read_rows(tmp_path / "again" / "conflicts" / "over_training.csv")
    assert [row["epoch"] for row in again] == [row["epoch"] for row in whole]
    assert {row["epoch"] for row in whole} == {1, 2, 3}


def test_a_compiled_run_is_refused(make_config):
    with pytest.raises(ValueError, match="conflicts_every: expected 0 with compile=true"):
        make_config(compile=True, conflicts_every=1)


def test_weights_of_other_classes_are_refused(tmp_path):
    save_model(create_model("vgg7_64", num_classes=3, width=4), tmp_path, {"epoch": 1})
    data = DataConfig(name="digits", image_size=8)
    with pytest.raises(ValueError, match="data: expected 3 classes"):
        run(ConflictsConfig(paths=(tmp_path,), data=data, batches=1, device="cpu"))
