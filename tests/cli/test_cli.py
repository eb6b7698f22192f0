import json
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from dfs_engine.cli import main
from dfs_engine.cli.parser import normalise
from dfs_engine.cli.recipes import list_recipes, recipe_path

CONFIGS = Path(__file__).parents[2] / "configs"

TINY = [
    *("--data.name", "synthetic", "--data.synthetic_train", "4", "--data.synthetic_test", "3"),
    *("--data.image_size", "8", "--batch_size", "2", "--epochs", "1", "--num_threads", "1", "--device", "cpu"),
    *("--tensorboard", "false"),
]


def fails(capsys, *line):
    """Runs the command; returns its one line of error."""
    with pytest.raises(SystemExit) as caught:
        main(line)
    assert caught.value.code == 2
    *log, error = capsys.readouterr().err.strip().splitlines()
    assert error.startswith("dfs")
    assert all(line.startswith("data:") for line in log)
    return error


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli")
    assert main(["train", *TINY, "--run_dir", str(folder / "run"), "--json", str(folder / "train.json")]) == 0
    return folder / "run"


def test_train_writes_json_and_prints_a_table(run_dir, capsys):
    result = json.loads((run_dir.parent / "train.json").read_text())
    assert result["run_dir"] == str(run_dir)
    assert len(result["metrics"]["exits"]) == 6
    assert [row["epoch"] for row in result["epochs"]] == [1]


def test_eval_repeats_the_last_evaluation(run_dir, capsys, tmp_path):
    expected = json.loads((run_dir.parent / "train.json").read_text())["metrics"]
    for path in (run_dir, run_dir / "model.safetensors"):
        assert main(["eval", str(path), "--device", "cpu", "--json", str(tmp_path / "eval.json")]) == 0
        result = json.loads((tmp_path / "eval.json").read_text())
        assert result["ensemble"]["top1"] == expected["ensemble"]["top1"]
        assert result["exits"][5]["loss"] == pytest.approx(expected["exits"][5]["loss"], rel=1e-4)
        printed = capsys.readouterr().out
        assert "exit 6" in printed
        assert "ensemble" in printed
    assert (
        main(["eval", str(run_dir), "--device", "cpu", "--data.synthetic_test", "5", "--json", str(tmp_path / "e")])
        == 0
    )
    assert json.loads((tmp_path / "e").read_text())["num_samples"] == 5


def test_eval_normalises_as_the_run_did_unless_told_otherwise(capsys, tmp_path):
    def ensemble(*flags):
        assert main(["eval", str(tmp_path / "run"), "--device", "cpu", "--json", str(tmp_path / "eval"), *flags]) == 0
        result = json.loads((tmp_path / "eval").read_text())
        return result["ensemble"], result["normalization"], capsys.readouterr().out

    line = ["train", *TINY, "--data.mean", "published", "--run_dir", str(tmp_path / "run")]
    assert main([*line, "--json", str(tmp_path / "train")]) == 0
    trained = json.loads((tmp_path / "train").read_text())["metrics"]["ensemble"]
    published = {"mean": [0.4914, 0.4822, 0.4465], "std": [0.2023, 0.1994, 0.201]}
    saved = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["data"]
    assert {name: saved[name] for name in published} == published
    capsys.readouterr()
    found, used, printed = ensemble()
    assert found["loss"] == pytest.approx(trained["loss"], rel=1e-4)
    assert used == published
    assert "images normalised by mean 0.4914 0.4822 0.4465, std 0.2023 0.1994 0.201 (published)" in printed
    found, used, printed = ensemble("--data.mean", "cifar100")
    assert found["loss"] != pytest.approx(trained["loss"], rel=1e-4)
    assert used["std"] == [0.2675, 0.2565, 0.2761]
    assert "(cifar100)" in printed
    assert main(["train", *TINY, "--resume", "--run_dir", str(tmp_path / "run"), "--epochs", "2"]) == 0
    other = ["--data.mean", "cifar10", "--data.std", "cifar100"]
    with pytest.raises(SystemExit):
        main(["train", *TINY, "--resume", "--run_dir", str(tmp_path / "run"), *other])
    assert "data.std: expected [0.2023, 0.1994, 0.201] as in the run to resume" in capsys.readouterr().err


def test_eval_on_data_with_other_classes(run_dir, capsys):
    error = fails(capsys, "eval", str(run_dir), "--data.synthetic_classes", "4")
    assert "data: expected 10 classes" in error


def test_second_run_in_the_same_folder(run_dir, capsys):
    error = fails(capsys, "train", *TINY, "--run_dir", str(run_dir))
    assert f"expected a folder without a run, got {run_dir}" in error
    assert "--resume true" in error


def test_resume_takes_the_config_of_the_run(run_dir, capsys):
    before = (run_dir / "metrics.csv").read_bytes()
    assert main(["train", "--resume", "--run_dir", str(run_dir)]) == 0
    assert (run_dir / "metrics.csv").read_bytes() == before
    assert "synthetic" in capsys.readouterr().out


def test_config_file_and_override(tmp_path, capsys):
    config = {"data": {"name": "synthetic", "synthetic_train": 4, "synthetic_test": 2, "image_size": 8}, "epochs": 7}
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump({**config, "batch_size": 2, "tensorboard": False, "device": "cpu"}))
    line = ["train", "--config", str(file), "--epochs", "1", "--run-dir", str(tmp_path / "run")]
    assert main([*line, "--model.beta=0.3"]) == 0
    saved = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert (saved["epochs"], saved["batch_size"], saved["model"]["beta"]) == (1, 2, 0.3)


def test_config_by_the_name_of_a_recipe(monkeypatch, tmp_path):
    """Also where the working directory has no configs/."""
    monkeypatch.chdir(tmp_path)
    path = recipe_path("digits_vgg7_dfs")
    assert normalise(["train", "--config", "digits_vgg7_dfs"]) == ["train", "--config", str(path)]
    assert normalise(["train", "--config=digits_vgg7_dfs"]) == ["train", f"--config={path}"]
    assert path.read_text() == (CONFIGS / "digits_vgg7_dfs.yaml").read_text()
    assert list_recipes() == sorted(path.stem for path in CONFIGS.glob("*.yaml"))


def test_a_file_comes_before_a_recipe_of_its_name(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    Path("digits_vgg7_dfs").write_text("epochs: 3\n")
    assert recipe_path("digits_vgg7_dfs") == Path("digits_vgg7_dfs")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (["train", "--model.bata", "0.3"], "Did you mean model.beta?"),
        (["train", "--beta", "0.3"], "Did you mean model.beta?"),
        (["train", "--epoch", "3"], "Did you mean epochs?"),
        (["trian"], "Did you mean train?"),
        (["train", "--model.beta", "1.5"], "model.beta: expected a number in [0, 1], got 1.5"),
        (["train", "--model.beta", "half"], "model.beta: "),
        (["train", "--epochs", "2.5"], "epochs: "),
        (["train", "--model.name", "vgg7"], "Did you mean 'vgg7_64'?"),
        (["train", "--model.variant", "dsf"], "Did you mean 'dfs'?"),
        (["train", "--model.backend", "cuda"], "model.backend: expected one of"),
        (["train", "--data.name", "cifar11"], "Did you mean 'cifar10'?"),
        (["train", "--data.name", "cifar10", "--data.root", "/nowhere"], "/nowhere"),
        (["train", "--resume"], "Add --run_dir"),
        (["train", "--config", "/nowhere.yaml"], "/nowhere.yaml"),
        (["train", "--config", "digits_vgg7_df"], "Did you mean 'digits_vgg7_dfs'?"),
        (["train", "--json", "/nowhere/out.json"], "/nowhere/out.json"),
        (["eval", "/nowhere"], "/nowhere"),
        (["validate", "--quikc"], "Did you mean quick?"),
        (["bench", "train", "--batch-sise", "3"], "Did you mean batch_size?"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_wrong_input_is_one_line_and_status_2(capsys, line, message):
    assert message in fails(capsys, *line)


@pytest.mark.parametrize(
    ("text", "valid", "nearest"),
    [("model: {bata: 0.3}", "model.variant", "model.beta"), ("batchsize: 3", "eval_batch_size", "batch_size")],
)
def test_unknown_key_in_a_config_file(capsys, tmp_path, text, valid, nearest):
    file = tmp_path / "config.yaml"
    file.write_text(text)
    error = fails(capsys, "train", "--config", str(file))
    assert valid in error
    assert f"Did you mean {nearest}?" in error


def test_foreign_weights(capsys, tmp_path):
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"not a safetensors file")
    assert str(file) in fails(capsys, "eval", str(file))


def test_loss_that_is_not_finite_is_status_1(capsys, tmp_path):
    line = ["train", *TINY, "--run_dir", str(tmp_path / "run"), "--optim.lr", "1e38", "--epochs", "4"]
    with pytest.raises(SystemExit) as caught:
        main(line)
    assert caught.value.code == 1
    assert "expected finite losses and gradients, got at step" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(("ok", "status"), [(True, 0), (False, 1)])
def test_validate_status_follows_the_report(monkeypatch, capsys, tmp_path, ok, status):
    from dfs_engine import validate

    seen = []

    def run(config):
        seen.append(config)
        return SimpleNamespace(ok=ok, table=lambda: "the table", to_json=lambda: {"ok": ok})

    monkeypatch.setattr(validate, "run", run)
    assert main(["validate", "--quick", "--dtypes", "fp32", "--json", str(tmp_path / "out.json")]) == status
    assert seen == [validate.ValidateConfig(quick=True, dtypes="fp32")]
    assert "the table" in capsys.readouterr().out
    assert json.loads((tmp_path / "out.json").read_text()) == {"ok": ok}


def test_bench_train_passes_its_flags(monkeypatch, capsys, tmp_path):
    from dfs_engine.benchmarks import train

    seen = []

    def run(config):
        seen.append(config)
        return SimpleNamespace(table=lambda: "the table", to_json=lambda: {"rows": []})

    monkeypatch.setattr(train, "run", run)
    line = ["bench", "train", "--model", "vgg7_64", "--batch-size", "3", "--compile", "off", "--dtypes", "fp32,bf16"]
    assert main([*line, "--json", str(tmp_path / "out.json")]) == 0
    assert (seen[0].batch_size, seen[0].compile, seen[0].dtypes) == ("3", "off", "fp32,bf16")
    assert json.loads((tmp_path / "out.json").read_text()) == {"rows": []}


def test_doctor(capsys, tmp_path):
    assert main(["doctor", "--json", str(tmp_path / "doctor.json")]) == 0
    assert "torch" in capsys.readouterr().out
    assert json.loads((tmp_path / "doctor.json").read_text())


@pytest.mark.parametrize("command", ["train", "eval", "predict", "convert", "validate", "info", "doctor", "bench"])
def test_help_teaches(capsys, command):
    with pytest.raises(SystemExit) as caught:
        main([command, "--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    assert f"dfs {command}" in text.partition("examples:")[2]


@pytest.mark.parametrize(
    "line",
    [
        *("", "train", "eval", "predict", "convert", "validate", "info", "doctor"),
        *("bench", "bench train", "bench ops", "bench plot", "bench tune"),
    ],
)
def test_help_is_for_people(capsys, line):
    """Its first line fits a screen, every flag has a text, and Python's types stay out of it."""
    with pytest.raises(SystemExit):
        main([*line.split(), "--help"])
    text = capsys.readouterr().out
    usage, _, rest = text.partition("\n\n")
    assert usage.startswith(f"usage: dfs {line}".rstrip())
    assert usage.endswith("[options]")
    assert "\n" not in usage
    for word in ("type:", "<class '", "default: null", "None", "Optional["):
        assert word not in rest
    flags = re.findall(r"^  (?:-h, )?(--[\w.]+)(.*\n(?: {20,}\S.*\n)*)", text, re.MULTILINE)
    assert flags
    for flag, explanation in flags:
        assert re.search(r"[a-z]{2}", re.sub(r"[{\[].*?[}\]]|\(default.*", "", explanation)), flag


def test_every_flag_of_train_is_explained(capsys):
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    words = capsys.readouterr().out.split()
    for explanation in (
        "Share of each feature's channels",
        "Learning rate before any decay",
        "Passes over the training",
    ):
        assert explanation in " ".join(words)


def test_doctor_works_without_the_optional_packages(tmp_path):
    script = """
import sys
for name in ("accelerate", "torchvision", "matplotlib", "sklearn", "tensorboard", "rich", "pyarrow", "timm"):
    sys.modules[name] = None
from dfs_engine.cli import main
sys.exit(main(["doctor"]))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_missing_package_is_named(tmp_path):
    script = """
import sys
sys.modules["accelerate"] = None
from dfs_engine.cli import main
sys.exit(main(["train"]))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, cwd=tmp_path)
    assert done.returncode == 2
    assert "pip install 'dfs_engine[train]'" in done.stderr
    assert "Traceback" not in done.stderr
