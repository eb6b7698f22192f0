"""What a run measures besides the test samples; dying workers, broken images, classes that differ, own texts."""

import csv
import json
import multiprocessing
import os
import signal
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image
from torch.utils.data import get_worker_info

from dfs_engine.cli import main
from dfs_engine.data import ImageDataset, load_data
from dfs_engine.training.trainer import Trainer


def columns(run_dir):
    with (run_dir / "metrics.csv").open() as file:
        return list(csv.DictReader(file))[-1]


def with_val(config, fraction=0.25, **changes):
    return replace(config, data=replace(config.data, val_fraction=fraction, **changes))


def test_val_is_measured_after_each_epoch_and_shown(make_config, make_model, caplog, capsys, tmp_path):
    config = with_val(make_config(epochs=2, log_every_steps=0))
    with caplog.at_level("INFO"):
        result = Trainer(config, model=make_model(dropout=0)).fit()
    assert result.further_metrics.keys() == {"val"}
    val = result.further_metrics["val"]
    assert (val["num_samples"], result.metrics["num_samples"]) == (10, 11)
    row = columns(config.run_dir)
    assert float(row["val_top1_exit2"]) == val["exits"][1]["top1"]
    assert float(row["val_loss_ensemble"]) == pytest.approx(val["ensemble"]["loss"])
    assert float(row["test_loss_ensemble"]) == pytest.approx(result.metrics["ensemble"]["loss"])
    assert int(row["step"]) == 2 * 4  # 28 samples in batches of 8
    assert "val top-1 of the exits" in caplog.text

    line = ["eval", str(config.run_dir), "--device", "cpu", "--num_threads", "1", "--json", str(tmp_path / "eval")]
    assert main(line) == 0
    assert "val, 10 samples" in capsys.readouterr().out
    again = json.loads((tmp_path / "eval").read_text())
    assert again["num_samples"] == 11
    assert again["further"]["val"]["ensemble"]["loss"] == pytest.approx(val["ensemble"]["loss"], rel=1e-4)


def test_the_seed_of_the_run_does_not_move_val(make_config):
    drawn = [
        Trainer(with_val(make_config(seed=seed), split_seed=split_seed)).data.val.indices
        for seed, split_seed in ((0, 0), (1, 0), (0, 1))
    ]
    assert drawn[0] == drawn[1] != drawn[2]


@pytest.mark.parametrize(("name", "value"), [("val_fraction", 0.5), ("split_seed", 3)])
def test_resume_refuses_other_samples(make_config, make_model, name, value):
    config = with_val(make_config(epochs=1))
    Trainer(config, model=make_model()).fit()
    resumed = replace(config, resume=True, epochs=2)
    with pytest.raises(ValueError, match=rf"data\.{name}: expected .* as in the run to resume, got {value}"):
        Trainer(replace(resumed, data=replace(config.data, **{name: value})), model=make_model())
    other = replace(config.data, synthetic_train=30)
    with pytest.raises(ValueError, match=r"number of training samples: expected 28 as in the run to resume, got 22"):
        Trainer(resumed, model=make_model(), data=load_data(other, input_shape=(3, 32, 32)))
    assert len(Trainer(resumed, model=make_model()).fit().rows) == 2


def test_further_test_sets_are_measured(make_config, make_model):
    config = make_config(epochs=1)
    data = load_data(config.data, input_shape=(3, 32, 32))
    data = data._replace(further_tests={"test_mismatched": data.train})
    result = Trainer(config, model=make_model(), data=data).fit()
    assert result.further_metrics["test_mismatched"]["num_samples"] == 38
    row = columns(config.run_dir)
    assert {"test_top1_exit1", "test_mismatched_top1_exit1"} <= row.keys()
    assert float(row["test_mismatched_loss_exit6"]) == pytest.approx(
        result.further_metrics["test_mismatched"]["exits"][5]["loss"]
    )


@pytest.fixture
def photos(tmp_path):
    """Two classes, 12 training images and 4 test images of noise."""

    def write(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.random.randint(0, 256, (40, 40, 3), np.uint8)).save(path)

    for name in ("ant", "bee"):
        for index in range(6):
            write(tmp_path / "photos/train" / name / f"{index}.png")
        for index in range(2):
            write(tmp_path / "photos/val" / name / f"{index}.png")
    return tmp_path / "photos"


def train_line(photos, run_dir, *flags):
    data = ["--data.name", "image_folder", "--data.root", str(photos), "--data.image_size", "8", "--batch_size", "4"]
    run = ["--device", "cpu", "--num_threads", "1", "--tensorboard", "false", "--run_dir", str(run_dir)]
    return ["train", *data, *run, *flags]


def one_line_of_error(capsys, line, status):
    with pytest.raises(SystemExit) as caught:
        main(line)
    error = capsys.readouterr().err
    assert caught.value.code == status
    assert "Traceback" not in error
    last = error.strip().splitlines()[-1]
    assert last.startswith("dfs: error: ")
    return last


@pytest.mark.skipif(multiprocessing.get_start_method() != "fork", reason="the patch has to reach the worker")
@pytest.mark.parametrize("how", ["killed", "exits"])
def test_a_worker_that_dies(photos, tmp_path, capsys, monkeypatch, how):
    """In the second epoch: the first one's checkpoint stays."""
    fetch = ImageDataset.__getitems__
    calls = multiprocessing.Value("i", 0)

    def dies(self, indices):
        if get_worker_info() is not None:
            calls.value += 1
            if calls.value > 5:  # of 3 batches to train on and 1 to test on in each epoch
                os.kill(os.getpid(), signal.SIGKILL) if how == "killed" else os._exit(3)
        return fetch(self, indices)

    monkeypatch.setattr(ImageDataset, "__getitems__", dies)
    line = train_line(photos, tmp_path / "run", "--data.num_workers", "1", "--epochs", "3")
    error = one_line_of_error(capsys, line, 1)
    assert "data.num_workers: expected worker processes that live, but DataLoader worker" in error  # in torch's words
    assert "lower --data.num_workers; 0 prepares the batches in this process" in error
    assert "step-00000003. Go on with: dfs train --resume" in error
    monkeypatch.undo()
    assert main([*train_line(photos, tmp_path / "run", "--epochs", "3"), "--resume"]) == 0

    monkeypatch.setattr(ImageDataset, "__getitems__", dies)
    line = ["eval", str(tmp_path / "run"), "--device", "cpu", "--data.num_workers", "1"]
    assert "data.num_workers: expected worker processes that live" in one_line_of_error(capsys, line, 1)


@pytest.mark.parametrize("workers", ["0", "1"])
def test_an_image_that_breaks_while_training_is_named(photos, tmp_path, capsys, workers):
    path = photos / "train" / "bee" / "3.png"
    path.write_bytes(path.read_bytes()[:900])  # its first bytes are an image's
    flags = ["--data.num_workers", workers, "--epochs", "1"]
    error = one_line_of_error(capsys, train_line(photos, tmp_path / "run", *flags), 2)
    assert error.startswith(f"dfs: error: data.root: expected an image, got {path} (")
    assert error.endswith("leave out all such images: --data.skip_broken true.")
    assert main(train_line(photos, tmp_path / "kept", *flags, "--data.skip_broken")) == 0
    assert "image folder" in (log := capsys.readouterr()).out
    assert f"left out 1 of 12 images of the training images, which cannot be decoded: {path}" in log.err
    assert "(11 train / 4 test)" in log.out


def test_weights_are_measured_on_their_own_classes(photos, tmp_path, capsys):
    assert main(train_line(photos, tmp_path / "run", "--epochs", "1")) == 0
    for split in ("train", "val"):
        (photos / split / "bee").rename(photos / split / "wasp")
    error = one_line_of_error(capsys, ["eval", str(tmp_path / "run"), "--device", "cpu"], 2)
    assert "expected the classes of" in error
    assert "ant, bee, got ant, wasp in image folder" in error


def test_weights_are_measured_on_another_dataset(photos, tmp_path, capsys):
    """Which does not have all options of the one that they were trained on."""
    assert main(train_line(photos, tmp_path / "run", "--epochs", "1", "--data.crop_pct", "0.9")) == 0
    other = ["--data.name", "synthetic", "--data.synthetic_classes", "2", "--data.synthetic_test", "5"]
    assert main(["eval", str(tmp_path / "run"), "--device", "cpu", *other]) == 0
    assert "on synthetic patterns" in (printed := capsys.readouterr().out)
    assert "(imagenet)" in printed  # as the weights were trained


def test_own_texts_from_the_command(tmp_path, tiny_bert, capsys):
    lines = [
        f"w{index % 20 + 20 * (index % 2)} w{index % 7 + 20 * (index % 2)}," + ("no", "yes")[index % 2]
        for index in range(40)
    ]
    (tmp_path / "reviews.csv").write_text("\n".join(["review,liked", *lines]) + "\n")
    line = ["--model.name", "bert", "--model.pretrained", str(tiny_bert), "--data.name", "text_files", "--epochs", "2"]
    line += [
        "--data.root",
        str(tmp_path / "reviews.csv"),
        "--data.text_column",
        "review",
        "--data.label_column",
        "liked",
    ]
    line += ["--data.max_tokens", "18", "--data.val_fraction", "0.25", "--optim.name", "adamw", "--optim.lr", "0.01"]
    run = ["--batch_size", "4", "--device", "cpu", "--tensorboard", "false", "--run_dir", str(tmp_path / "run")]
    assert main(["train", *line, *run, "--json", str(tmp_path / "out")]) == 0
    result = json.loads((tmp_path / "out").read_text())
    assert (result["metrics"]["num_samples"], result["further"]["val"]["num_samples"]) == (8, 8)
    assert main(["eval", str(tmp_path / "run"), "--device", "cpu", "--json", str(tmp_path / "eval")]) == 0
    again = json.loads((tmp_path / "eval").read_text())
    assert again["ensemble"] == pytest.approx(result["metrics"]["ensemble"], rel=1e-4)
    assert again["further"]["val"]["ensemble"] == pytest.approx(result["further"]["val"]["ensemble"], rel=1e-4)


def test_pairs_of_texts_survive_the_run_folder(tmp_path, tiny_bert):
    """`text_column` is a list in YAML and on the command line."""
    rows = [{"asked": f"w{index % 40}", "answer": f"w{index % 9}", "label": index % 2} for index in range(12)]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    line = ["--model.name", "bert", "--model.pretrained", str(tiny_bert), "--data.name", "text_files", "--epochs", "1"]
    line += [
        "--data.root",
        str(tmp_path / "pairs.jsonl"),
        "--data.text_column",
        "[asked,answer]",
        "--data.max_tokens",
        "18",
    ]
    run = ["--batch_size", "4", "--device", "cpu", "--tensorboard", "false", "--run_dir", str(tmp_path / "run")]
    assert main(["train", *line, *run]) == 0
    assert main(["eval", str(tmp_path / "run"), "--device", "cpu"]) == 0
    assert main(["train", "--resume", "--run_dir", str(tmp_path / "run"), "--epochs", "2"]) == 0
