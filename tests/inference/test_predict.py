"""`dfs predict`: what it says of images and texts against the model and simulated routing, and its errors."""

import csv
import json

import numpy as np
import pytest
import torch

from dfs_engine.cli import main
from dfs_engine.data import DataConfig, load_data
from dfs_engine.data.digits import is_test
from dfs_engine.inference import Entropy, MaxProbability, Patience, simulate
from dfs_engine.inference.predict import PredictConfig, run
from dfs_engine.models.weights import load_model

Image = pytest.importorskip("PIL.Image")

NUM_IMAGES = 40


def fails(capsys, *line):
    """Runs the command; returns its one line of error."""
    with pytest.raises(SystemExit) as caught:
        main(line)
    assert caught.value.code == 2
    return capsys.readouterr().err.strip().splitlines()[-1]


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """A folder with the first test digits as image files, some of them in a folder of their own."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    folder = tmp_path_factory.mktemp("images")
    (folder / "more").mkdir()
    for index, pixels in enumerate(digits.images[is_test(digits.target)][:NUM_IMAGES]):
        place = folder / ("more" if index >= 30 else "") / f"{index:02d}.{'PNG' if index % 2 else 'png'}"
        Image.fromarray(np.round(pixels * (255 / 16)).astype(np.uint8)).save(place)
    (folder / "notes.txt").write_text("no image")
    return folder


@pytest.fixture(scope="module")
@torch.no_grad()
def logits(digits_run):
    """Every exit's logits of those digits, as the run measures them."""
    model = load_model(digits_run)
    data = load_data(DataConfig(name="digits"), input_shape=model.input_shape)
    return model.eval()(torch.stack([data.test[index][0] for index in range(NUM_IMAGES)]))


@pytest.mark.parametrize(
    ("flags", "policy"),
    [
        (["--policy", "max_probability", "--threshold", "0.3"], MaxProbability(0.3)),
        (["--policy", "entropy", "--threshold", "1.9"], Entropy(1.9)),
        (["--policy", "patience", "--threshold", "2"], Patience(2)),
        (["--threshold", "[0.12,0.13,0.2,0.5,0.6]"], MaxProbability([0.12, 0.13, 0.2, 0.5, 0.6])),
        ([], MaxProbability(float("inf"))),
    ],
    ids=["max_probability", "entropy", "patience", "list", "none"],
)
def test_it_says_what_simulated_routing_does(digits_run, images, logits, flags, policy, tmp_path):
    output = tmp_path / "classes.csv"
    line = ["predict", str(digits_run), str(images), "--device", "cpu", "--batch_size", "7", "--output", str(output)]
    assert main([*line, *flags]) == 0
    with output.open() as file:
        rows = list(csv.DictReader(file))
    assert [row["input"].rpartition("/")[2][:2] for row in rows] == [f"{index:02d}" for index in range(NUM_IMAGES)]
    expected = simulate(logits, policy)
    assert [int(row["exit"]) for row in rows] == (expected.exits + 1).tolist()
    assert [int(row["class"]) for row in rows] == expected.classes.tolist()
    confidence = torch.tensor([float(row["confidence"]) for row in rows])
    torch.testing.assert_close(confidence, expected.logits.softmax(-1).amax(-1), rtol=1e-4, atol=1e-5)


def test_one_image_on_the_terminal(digits_run, images, logits, capsys):
    assert main(["predict", str(digits_run), str(images / "00.png"), "--device", "cpu"]) == 0
    heading, row = capsys.readouterr().out.strip().splitlines()
    assert heading.split("\t") == ["input", "class", "exit", "confidence"]
    assert row.split("\t")[1:3] == [str(logits[-1][0].argmax().item()), "6"]


@pytest.mark.parametrize("policy", ["max_probability", "entropy", "patience"])
def test_thresholds_for_a_budget_come_from_held_out_samples(digits_run, images, policy, tmp_path):
    line = ["predict", str(digits_run), str(images), "--device", "cpu", "--policy", policy, "--budget", "0.6"]
    assert main([*line, "--json", str(tmp_path / "out.json"), "--output", str(tmp_path / "out.jsonl")]) == 0
    found = json.loads((tmp_path / "out.json").read_text())
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert rows == found["predictions"]
    counts = [sum(row["exit"] == index for row in rows) for index in range(1, 7)]
    assert found["exits"] == counts
    assert counts[-1] < NUM_IMAGES
    model = load_model(digits_run)
    data = load_data(DataConfig(name="digits", val_fraction=0.2), input_shape=model.input_shape)
    inputs, labels = zip(*data.val, strict=True)
    with torch.no_grad():
        held_out = model.eval()(torch.stack(inputs))
    names = {"MaxProbability": MaxProbability, "Entropy": Entropy, "Patience": Patience, "inf": float("inf")}
    accuracy = (simulate(held_out, eval(found["policy"], names)).classes == torch.tensor(labels)).double().mean().item()
    assert found["held_out"]["accuracy"] == pytest.approx(accuracy, abs=0.008)  # a sample or two at a threshold


def test_an_accuracy_is_kept_on_held_out_samples(digits_run, images):
    data = DataConfig(name="digits", val_fraction=0.2)
    found = run(PredictConfig(path=digits_run, data=data, input=images, accuracy=0.15, device="cpu"))
    assert found["held_out"]["accuracy"] >= 0.15


def test_broken_images_are_errors_or_left_out_and_counted(digits_run, images, tmp_path, capsys, caplog):
    folder = tmp_path / "images"
    folder.mkdir()
    (folder / "good.png").write_bytes((images / "00.png").read_bytes())
    (folder / "cut.png").write_bytes((images / "00.png").read_bytes()[:60])
    error = fails(capsys, "predict", str(digits_run), str(folder), "--device", "cpu")
    assert f"input: expected an image, got {folder / 'cut.png'}" in error
    assert "--skip_broken true" in error
    line = ["predict", str(digits_run), str(folder), "--device", "cpu", "--skip_broken"]
    assert main([*line, "--output", str(tmp_path / "out.csv")]) == 0
    printed = capsys.readouterr()
    assert "1 predictions" in printed.out
    assert "1 skipped" in printed.out
    assert str(folder / "cut.png") in printed.err


def test_images_of_other_shapes_are_cut_to_the_models(digits_run, images, tmp_path):
    """A wide image is its centre."""
    square = Image.open(images / "01.PNG")
    wide = Image.new("L", (square.width + 4, square.height), 200)
    wide.paste(square, (2, 0))
    wide.save(tmp_path / "wide.png")
    found = [
        run(PredictConfig(path=digits_run, data=DataConfig(mean=(0.3,) * 3, std=(0.4,) * 3), input=path, device="cpu"))
        for path in (images / "01.PNG", tmp_path / "wide.png")
    ]
    one, other = (each["predictions"][0] for each in found)
    assert (one["class"], one["confidence"]) == (other["class"], pytest.approx(other["confidence"], rel=1e-5))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--threshold", "0.5", "--budget", "0.5"], "threshold: expected one of threshold, accuracy and budget"),
        (["--threshold", "1.5"], "MaxProbability: expected 0 <= threshold <= 1, got threshold=1.5"),
        (["--policy", "patience", "--threshold", "1.5"], "threshold: expected a whole number of exits"),
        (["--policy", "confidence"], "policy: expected one of max_probability, entropy, patience, got 'confidence'"),
        (["--accuracy", "93"], "accuracy: expected a number in [0, 1], got 93"),
        (["--accuracy", "1"], "target_accuracy: expected at most"),
        (["--budget", "0.001"], "target_cost: expected at least"),
        (["--threshold", "[0.5,0.5]"], "expected one threshold for all exits, or 5"),
        (["--output", "classes.txt"], "output: expected a file that ends in .csv or .jsonl, got classes.txt"),
        (["--output", "nowhere/classes.csv"], "output: expected a file in a folder that can be written"),
    ],
)
def test_errors_name_the_argument(digits_run, images, capsys, flags, message):
    assert message in fails(capsys, "predict", str(digits_run), str(images), "--device", "cpu", *flags)


def test_errors_about_the_input(digits_run, digits_run_without_val, images, capsys, tmp_path):
    assert "input: expected a file or a folder" in fails(capsys, "predict", str(digits_run), str(tmp_path / "none"))
    assert "input: expected images (.jpg" in fails(capsys, "predict", str(digits_run), str(tmp_path))
    error = fails(capsys, "predict", str(digits_run_without_val), str(images), "--budget", "0.5", "--device", "cpu")
    assert "budget: expected a run that classifies and kept samples out of training" in error
    assert "--data.val_fraction 0.1, or give --threshold" in error


def sentences(count: int):
    """Of few words each, all different in length."""
    words = [[f"w{torch.randint(40, ()).item()}" for _ in range(2 + index % 7)] for index in range(count)]
    return [" ".join(each) for each in words]


@pytest.fixture(scope="module")
def text_run(tiny_bert, tmp_path_factory):
    """A run folder of a small BERT on pairs of word and label, with held-out samples."""
    pytest.importorskip("pyarrow")
    root = tmp_path_factory.mktemp("texts")
    with (root / "texts.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label"])
        writer.writerows(zip(sentences(60), ["bad", "good"] * 30, strict=True))
    line = ["train", "--model.name", "bert", "--model.pretrained", str(tiny_bert), "--data.name", "text_files"]
    line += ["--data.root", str(root / "texts.csv"), "--data.tokenizer", str(tiny_bert), "--data.max_tokens", "18"]
    line += ["--data.val_fraction", "0.3", "--epochs", "1", "--batch_size", "8", "--tensorboard", "false"]
    assert main([*line, "--device", "cpu", "--run_dir", str(root / "run")]) == 0
    return root / "run"


@pytest.mark.parametrize("kind", ["txt", "csv", "jsonl"])
def test_texts(text_run, kind, tmp_path):
    texts = sentences(11)
    file = tmp_path / f"texts.{kind}"
    if kind == "txt":
        file.write_text("\n".join(texts) + "\n\n")
    elif kind == "csv":
        file.write_text("number,text\n" + "".join(f"{index},{text}\n" for index, text in enumerate(texts)))
    else:
        file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    line = ["predict", str(text_run), str(file), "--device", "cpu", "--threshold", "0.51", "--batch_size", "4"]
    assert main([*line, "--json", str(tmp_path / "out.json"), "--output", str(tmp_path / "out.csv")]) == 0
    rows = json.loads((tmp_path / "out.json").read_text())["predictions"]
    assert [row["input"] for row in rows] == texts
    model = load_model(text_run)
    for row in rows:
        ids = torch.tensor([[2, *(4 + int(word[1:]) for word in row["input"].split()), 3]])
        with torch.no_grad():
            found = simulate(list(model.eval()(ids)), MaxProbability(0.51))
        assert (row["class"], row["exit"]) == (["bad", "good"][found.classes.item()], found.exits.item() + 1)
        assert row["confidence"] == pytest.approx(found.confidence.item(), rel=1e-3)


def test_texts_for_a_budget_and_measured(text_run, tmp_path, capsys):
    (tmp_path / "texts.txt").write_text("\n".join(sentences(5)))
    line = ["predict", str(text_run), str(tmp_path / "texts.txt"), "--device", "cpu", "--budget", "0.7"]
    assert main([*line, "--json", str(tmp_path / "out.json")]) == 0
    assert len(json.loads((tmp_path / "out.json").read_text())["predictions"]) == 5
    assert main(["eval", str(text_run), "--device", "cpu"]) == 0
    result = json.loads((text_run / "eval" / "eval.json").read_text())
    assert len(result["budgeted"]) == 40
    assert result["operations"] == sorted(result["operations"])
    assert len(result["operations"]) == 3
    (tmp_path / "photo.png").write_bytes(b"")
    error = fails(capsys, "predict", str(text_run), str(tmp_path / "photo.png"), "--device", "cpu")
    assert "input: expected a text in each line of a .txt file" in error
    (tmp_path / "other.csv").write_text("sentence\nw1\n")
    error = fails(capsys, "predict", str(text_run), str(tmp_path / "other.csv"), "--device", "cpu")
    assert "input: expected a text in each line" in error
    assert "--data.text_column" in error


def write_glue(root, task: str) -> None:
    """Parquet files of a GLUE task, of few short texts."""
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    columns = {"mnli": ("premise", "hypothesis"), "stsb": ("sentence1", "sentence2")}[task]
    splits = {"mnli": ("train", "validation_matched", "validation_mismatched"), "stsb": ("train", "validation")}[task]
    root.mkdir()
    for split in splits:
        labels = [index % 3 if task == "mnli" else index / 4 for index in range(20)]
        table = {columns[0]: sentences(20), columns[1]: sentences(20), "label": labels}
        pq.write_table(pa.table(table), root / f"{split}.parquet")


def glue_run(root, tiny_bert, task: str) -> None:
    write_glue(root / "data", task)
    line = ["train", "--model.name", "bert", "--model.pretrained", str(tiny_bert), "--data.name", task]
    line += ["--data.root", str(root / "data"), "--data.tokenizer", str(tiny_bert), "--data.max_tokens", "18"]
    line += ["--data.val_fraction", "0.4", "--epochs", "1", "--batch_size", "8", "--tensorboard", "false"]
    assert main([*line, "--device", "cpu", "--run_dir", str(root / "run")]) == 0


def test_a_network_that_predicts_numbers(tiny_bert, tmp_path, capsys):
    glue_run(tmp_path, tiny_bert, "stsb")
    assert main(["eval", str(tmp_path / "run"), "--device", "cpu"]) == 0
    assert "left out: the network predicts numbers" in capsys.readouterr().out
    result = json.loads((tmp_path / "run" / "eval" / "eval.json").read_text())
    assert result["calibration"] == {}
    assert "pearson" in result["exits"][0]
    again = ["eval", str(tmp_path / "run" / "eval" / "per_sample.safetensors"), "--output", str(tmp_path / "again")]
    assert main(again) == 0
    (tmp_path / "pairs.txt").write_text("w1 w2\tw3\nw4\tw5 w6\n")
    line = ["predict", str(tmp_path / "run"), str(tmp_path / "pairs.txt"), "--device", "cpu"]
    assert main([*line, "--json", str(tmp_path / "out.json")]) == 0
    rows = json.loads((tmp_path / "out.json").read_text())["predictions"]
    assert [(row["input"], row["exit"]) for row in rows] == [("w1 w2\tw3", 3), ("w4\tw5 w6", 3)]
    model = load_model(tmp_path / "run")
    with torch.no_grad():
        ids, kinds = torch.tensor([[2, 5, 6, 3, 7, 3]]), torch.tensor([[0, 0, 0, 0, 1, 1]])
        expected = list(model.eval()(ids, token_type_ids=kinds))[-1].item()
    assert rows[0]["value"] == pytest.approx(expected, rel=1e-3)
    assert "num_classes=1" in fails(capsys, *line, "--threshold", "0.5")
    assert "budget: expected a run that classifies" in fails(capsys, *line, "--budget", "0.5")
    (tmp_path / "pairs.txt").write_text("w1 w2\tw3\nw4\n")
    assert "got 1 in line 2 of" in fails(capsys, *line)


def test_a_further_test_set_is_measured_too(tiny_bert, tmp_path):
    glue_run(tmp_path, tiny_bert, "mnli")
    assert main(["eval", str(tmp_path / "run"), "--device", "cpu"]) == 0
    result = json.loads((tmp_path / "run" / "eval" / "eval.json").read_text())
    assert set(result["further"]) == {"test_mismatched", "val"}
    assert list(result["calibration"]) == ["test", "test_mismatched", "val"]
    assert all(each["ece_at_temperature"] is not None for each in result["calibration"]["test_mismatched"])
    assert len(result["budgeted"]) == 40
