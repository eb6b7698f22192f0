"""`dfs eval` on a short run: what it measures against the model itself, what it writes, and that the file suffices."""

import csv
import json

import pytest
import torch
import torch.nn.functional as F

from dfs_engine.cli import main
from dfs_engine.data import DataConfig, load_data
from dfs_engine.evaluation.operations import count_operations
from dfs_engine.inference.budgeted import budgeted_batch
from dfs_engine.inference.evaluate import EvalConfig, run
from dfs_engine.inference.figure import read_curves
from dfs_engine.inference.per_sample import Outputs, Saved, is_per_sample_file, load_per_sample, save_per_sample
from dfs_engine.models import create_model
from dfs_engine.models.weights import load_model

FILES = ("accuracy.png", "budgeted.csv", "eval.json", "exits.csv", "per_sample.safetensors")


def fails(capsys, *line):
    """Runs the command; returns its one line of error."""
    with pytest.raises(SystemExit) as caught:
        main(line)
    assert caught.value.code == 2
    return capsys.readouterr().err.strip().splitlines()[-1]


@pytest.fixture(scope="module")
def result(digits_run):
    assert main(["eval", str(digits_run), "--device", "cpu", "--time_batch_size", "3"]) == 0
    return json.loads((digits_run / "eval" / "eval.json").read_text())


@torch.no_grad()
def logits_of(run_dir):
    """Every exit's logits and the labels of the test and of the held-out samples, by the model alone."""
    model = load_model(run_dir)
    data = load_data(DataConfig(name="digits", val_fraction=0.2), input_shape=model.input_shape)
    found = {}
    for split in ("test", "val"):
        images, labels = zip(*getattr(data, split), strict=True)
        found[split] = model.eval()(torch.stack(images)), torch.tensor(labels)
    return found


def test_it_writes_tables_a_picture_and_outputs(digits_run, result):
    assert sorted(path.name for path in (digits_run / "eval").iterdir()) == sorted(FILES)
    assert (digits_run / "eval" / "accuracy.png").read_bytes().startswith(b"\x89PNG")
    with (digits_run / "eval" / "exits.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["exit"] for row in rows] == [*"123456", "ensemble"] * 2
    assert [float(row["top1"]) for row in rows[:6]] == [values["top1"] for values in result["exits"]]
    with (digits_run / "eval" / "budgeted.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [float(row["accuracy"]) for row in rows] == [point["accuracy"] for point in result["budgeted"]]
    assert all(sum(float(row[f"share_exit{k}"]) for k in range(1, 7)) == pytest.approx(1) for row in rows)


def test_it_measures_what_the_model_does(digits_run, result):
    found = logits_of(digits_run)
    (test, labels), (val, val_labels) = found["test"], found["val"]
    assert len(val_labels) == 288
    for index, logits in enumerate(test):
        accuracy = 100 * (logits.argmax(-1) == labels).double().mean().item()
        assert result["exits"][index]["top1"] == pytest.approx(accuracy)
        assert result["exits"][index]["loss"] == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-3)
        temperature = result["calibration"]["test"][index]["temperature"]
        assert F.cross_entropy(val[index] / temperature, val_labels) <= F.cross_entropy(val[index], val_labels) + 1e-6
    points = budgeted_batch(Outputs.of("val", val, val_labels), Outputs.of("test", test, labels), result["operations"])
    for point, expected in zip(result["budgeted"], points, strict=True):  # one sample near a threshold may differ
        assert point["accuracy"] == pytest.approx(100 * expected.accuracy, abs=0.6)
        assert point["operations"] == pytest.approx(expected.cost, rel=0.02)


def test_operations_are_those_of_dfs_info_and_times_are_measured(result):
    stock = create_model("vgg7_64", num_classes=10, width=4, variant="dense", device="meta")
    assert result["operations"] == [cost.operations for cost in count_operations(stock)]
    assert all(seconds > 0 for seconds in result["seconds"])
    assert len(result["seconds"]) == 6
    for point in result["budgeted"]:
        expected = sum(share * each for share, each in zip(point["exits"], result["seconds"], strict=True))
        assert point["seconds"] == pytest.approx(expected)


def test_the_outputs_alone_give_the_same_tables(digits_run, result, tmp_path, capsys):
    file = digits_run / "eval" / "per_sample.safetensors"
    assert main(["eval", str(file), "--output", str(tmp_path / "again")]) == 0
    assert "budgeted batch classification" in capsys.readouterr().out
    for name in ("eval.json", "exits.csv", "budgeted.csv"):
        assert (tmp_path / "again" / name).read_bytes() == (digits_run / "eval" / name).read_bytes(), name
    before, after = load_per_sample(file), load_per_sample(tmp_path / "again" / "per_sample.safetensors")
    assert before.description == after.description
    assert before.outputs.keys() == after.outputs.keys() == {"test", "val"}


def test_outputs_of_ten_thousand_images_take_less_than_a_megabyte(tmp_path):
    outputs = {split: Outputs.of(split, torch.randn(7, n, 10), torch.randint(10, (n,))) for split, n in
               (("test", 10_000), ("val", 5_000))}  # fmt: skip
    file = tmp_path / "outputs.safetensors"
    save_per_sample(file, Saved(outputs, {"metrics": {"test": {}, "val": {}}}))
    assert file.stat().st_size < 1e6


@pytest.mark.parametrize("num_classes", [2, 256, 257, 40_000])
def test_outputs_come_back_as_they_were(tmp_path, num_classes):
    outputs = Outputs.of("test", torch.randn(3, 5, num_classes), torch.randint(num_classes, (5,)))
    outputs.labels[0] = num_classes - 1
    description = {"metrics": {"test": {"top1": 1.5}}, "data": "words"}
    save_per_sample(tmp_path / "file", Saved({"test": outputs}, description))
    found = load_per_sample(tmp_path / "file")
    assert found.description == description
    assert list(found.outputs) == ["test"]
    assert all(torch.equal(one, other) for one, other in zip(found.outputs["test"][1:], outputs[1:], strict=True))
    assert is_per_sample_file(tmp_path / "file")
    assert not is_per_sample_file(tmp_path / "other")


def test_without_held_out_samples_the_rest_is_reported(digits_run_without_val, capsys):
    assert main(["eval", str(digits_run_without_val), "--device", "cpu"]) == 0
    printed = capsys.readouterr().out
    assert "left out: temperatures and budgeted batch classification need samples kept out of training" in printed
    assert "train with --data.val_fraction 0.1" in printed
    folder = digits_run_without_val / "eval"
    assert sorted(path.name for path in folder.iterdir()) == sorted(set(FILES) - {"budgeted.csv"})
    found = json.loads((folder / "eval.json").read_text())
    assert found["budgeted"] is None
    assert len(found["calibration"]["test"]) == 6
    assert found["calibration"]["test"][0]["temperature"] is None
    assert found["calibration"]["test"][0]["ece"] > 0


def test_thresholds_asked_of_the_test_samples_are_refused(digits_run, capsys):
    error = fails(capsys, "eval", str(digits_run), "--thresholds", "test")
    assert "thresholds: expected val or none, got test" in error
    assert "--data.val_fraction 0.1" in error
    with pytest.raises(ValueError, match="thresholds: expected val or none, got test_mismatched"):
        EvalConfig(path=digits_run, thresholds="test_mismatched")


def test_samples_that_were_trained_on_are_no_held_out_ones(digits_run, digits_run_without_val, capsys):
    error = fails(capsys, "eval", str(digits_run_without_val), "--data.val_fraction", "0.1", "--device", "cpu")
    assert "data.val_fraction: expected data.val_fraction=0.0" in error
    error = fails(capsys, "eval", str(digits_run), "--data.split_seed", "3", "--device", "cpu")
    assert "data.split_seed=0 as the weights were trained with, got data.val_fraction=0.2, data.split_seed=3" in error


def test_what_is_wrong_is_said_before_the_work(digits_run, capsys, tmp_path):
    (tmp_path / "file").write_text("no folder")
    for flags, message in (
        (["--output", str(tmp_path / "file" / "below")], "output: expected a folder that can be written"),
        (["--curve", str(tmp_path / "no.csv")], "curve: expected a CSV file, got"),
        (["--curve", str(tmp_path / "file")], "curve: expected a column operations"),
        (["--time_batch_size", "5000"], "time_batch_size: expected at most the 359 test samples, got 5000"),
        (["--thresholds", "vall"], "Did you mean 'val'?"),
    ):
        assert message in fails(capsys, "eval", str(digits_run), "--device", "cpu", *flags)


def test_thresholds_can_be_left_out(digits_run, tmp_path):
    found = run(EvalConfig(path=digits_run / "eval" / "per_sample.safetensors", output=tmp_path, thresholds="none"))
    assert (found["budgeted"], found["left_out"]) == (None, "not asked for")


def test_curves_of_others(tmp_path, digits_run, result):
    published = tmp_path / "flops-vs-acc.csv"
    published.write_text("ONE,,TWO,\nFLOPs,Acc,FLOPs,Acc\n58.2,67.45,60.1,70\n66.2,68.26,,\n")
    one, two = read_curves(published)
    assert (one.name, one.operations, one.accuracy) == ("ONE", [58.2e6, 66.2e6], [67.45, 68.26])
    assert (two.name, two.operations, two.accuracy) == ("TWO", [60.1e6], [70.0])
    (own,) = read_curves(digits_run / "eval" / "budgeted.csv")
    assert own.name == "budgeted"
    assert sorted(own.operations) == sorted(point["operations"] for point in result["budgeted"])
    shares = tmp_path / "shares.csv"
    shares.write_text("operations,accuracy\n2e6,0.7\n1e6,0.5\n")
    assert read_curves(shares)[0][1:] == ([1e6, 2e6], [50, 70])
    shares.write_text("operations,accuracy\n2e6,many\n")
    with pytest.raises(ValueError, match=r"curve: expected numbers, got 2e6, many in line 2 of"):
        read_curves(shares)
    line = ["eval", str(digits_run / "eval" / "per_sample.safetensors"), "--output", str(tmp_path / "out")]
    assert main([*line, "--curve", str(published)]) == 0
    plain = (digits_run / "eval" / "accuracy.png").read_bytes()
    assert (tmp_path / "out" / "accuracy.png").read_bytes() != plain
