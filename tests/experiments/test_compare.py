"""Comparisons of tiny models, trained for real, each run in its process."""

import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from dfs_engine.cli import main
from dfs_engine.data import DataConfig
from dfs_engine.experiments.compare import CompareConfig, compare, merge, run
from dfs_engine.experiments.process import RunProcess
from dfs_engine.experiments.record import read_record, read_run
from dfs_engine.experiments.rows import Row
from dfs_engine.experiments.sweep import SweepBetaConfig
from dfs_engine.experiments.sweep import run as sweep
from dfs_engine.training.config import ModelConfig, OptimConfig, TrainConfig
from dfs_engine.training.signals import Interrupted

RECIPE = TrainConfig(
    model=ModelConfig(options={"width": 4}),
    data=DataConfig(name="synthetic", synthetic_train=24, synthetic_test=16, image_size=8, val_fraction=0.25),
    optim=OptimConfig(lr=0.01),
    epochs=2,
    batch_size=6,
    device="cpu",
    num_threads=1,
    tensorboard=False,
    progress=False,
)
FLAGS = [
    *("--model.options", "{width: 4}", "--data.name", "synthetic", "--data.synthetic_train", "24"),
    *("--data.synthetic_test", "16", "--data.image_size", "8", "--data.val_fraction", "0.25", "--optim.lr", "0.01"),
    *("--epochs", "2", "--batch_size", "6", "--device", "cpu", "--num_threads", "1", "--tensorboard", "false"),
]
ROWS = {"dense": {"model.variant": "dense"}, "dfs": {"model.variant": "dfs"}}


def config(output, **options):
    return CompareConfig(**{"output": output, "rows": ROWS, "seeds": 2, **options})


def results(folder):
    """Of each run, the lines of metrics.csv without what they took."""
    times = ("seconds", "samples_per_second")
    runs = {path.name: read_run(path) for path in sorted(folder.iterdir()) if path.is_dir()}
    assert all(run.record.status == "finished" for run in runs.values())
    return {
        name: ([{key: value for key, value in line.items() if key not in times} for line in run.epochs], run.budget)
        for name, run in runs.items()
    }


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A comparison that ran through."""
    folder = tmp_path_factory.mktemp("whole")
    report = run(config(folder), RECIPE)
    assert report.ok
    return folder


def test_runs_table_and_pictures(whole):
    found = results(whole)
    assert list(found) == ["dense-seed0", "dense-seed1", "dfs-seed0", "dfs-seed1"]
    for epochs, budget in found.values():
        assert [line["epoch"] for line in epochs] == [1, 2]
        assert [line["p"] for line in budget] == [round(0.05 * step, 2) for step in range(1, 41)]
        assert budget[0]["test_operations"] < budget[-1]["test_operations"]
        assert all(0 <= line["test_top1"] <= 100 for line in budget)
    one = read_run(whole / "dfs-seed1")
    assert one.record.flags == {"model.variant": "dfs"}
    assert (one.config["seed"], one.config["model"]["variant"], one.config["epochs"]) == (1, "dfs", 2)
    assert len(one.record.operations) == 6
    assert one.record.peak_memory_mib > 50
    files = {path.name for path in whole.iterdir() if path.is_file()}
    pictures = {f"accuracy_{name}.png" for name in ("operations", "time", "budget")}
    assert files == {"comparison.yaml", "results.md", "results.csv", *pictures}


def test_each_run_is_what_train_makes_of_its_flags(whole, tmp_path):
    line = ["train", *FLAGS, "--model.variant", "dense", "--seed", "1", "--run_dir", str(tmp_path / "alone")]
    assert main(line) == 0
    (tmp_path / "alone" / "run.yaml").write_bytes((whole / "dense-seed1" / "run.yaml").read_bytes())
    alone = results(tmp_path)["alone"][0]
    assert alone == results(whole)["dense-seed1"][0]


def test_what_has_ended_is_not_run_again(whole):
    before = {path: path.stat().st_mtime_ns for path in whole.glob("*/*")}
    assert run(config(whole), RECIPE).ok
    assert {path: path.stat().st_mtime_ns for path in whole.glob("*/*")} == before


def wait_for(condition):
    deadline = time.monotonic() + 240
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def has_lines(folder, number):
    path = folder / "metrics.csv"
    return path.is_file() and path.read_text().count("\n") > number


def test_a_killed_comparison_goes_on(tmp_path):
    """SIGKILL, which nobody can catch: the run's process sees that it is alone, saves and ends."""
    long = [*FLAGS, "--epochs", "5"]
    (tmp_path / "rows.yaml").write_text("dense: {model.variant: dense, epochs: 1}\ndfs: {model.variant: dfs}\n")
    line = ["compare", *long, "--rows", str(tmp_path / "rows.yaml"), "--output", str(tmp_path / "cut")]
    process = subprocess.Popen([sys.executable, "-m", "dfs_engine", *line], stderr=subprocess.DEVNULL)
    running = tmp_path / "cut" / "dfs-seed0"
    wait_for(lambda: has_lines(running, 1))
    process.kill()
    process.wait()
    wait_for(lambda: not is_locked(running))
    left = read_run(running)
    assert left.record.status == "running"
    assert 1 <= len(left.epochs) < 5
    assert main(line) == 0
    assert "resume: " in (running / "log.txt").read_text()
    line[line.index("--output") + 1] = str(tmp_path / "whole")
    assert main(line) == 0
    assert results(tmp_path / "cut") == results(tmp_path / "whole")


def is_locked(run_dir):
    from filelock import FileLock, Timeout

    try:
        with FileLock(run_dir / ".lock").acquire(timeout=0):
            return False
    except Timeout:
        return True


@pytest.fixture
def heeds_ctrl_c():
    """Also where the shell began the tests in the background, which ignores SIGINT for them."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("heeds_ctrl_c")
def test_a_signal_saves_the_run_of_the_moment(tmp_path):
    recipe = replace(RECIPE, epochs=200)
    rows = [Row("dfs", {}), Row("dense", {"model.variant": "dense"})]

    def interrupt():
        wait_for(lambda: has_lines(tmp_path / "dfs-seed0", 1))
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt, daemon=True).start()
    with pytest.raises(Interrupted, match=r"SIGINT with 2 of 2 runs to do\. The same command goes on") as caught:
        compare(rows, recipe, config(tmp_path, seeds=1))
    assert caught.value.signum == signal.SIGINT
    found = read_run(tmp_path / "dfs-seed0")
    assert found.record.status == "running"
    assert list((tmp_path / "dfs-seed0" / "checkpoints").glob("step-*"))
    assert not (tmp_path / "dense-seed0").exists()
    report = merge([tmp_path], None)
    assert [(run.name, run.why) for run in report.missing] == [
        ("dfs-seed0", f"not finished: {len(found.epochs)} of 200 epochs are done"),
        ("dense-seed0", "not begun"),
    ]


def test_parts_together_are_the_whole(whole, tmp_path):
    for part in ("1/3", "2/3", "3/3"):
        run(config(tmp_path / part[0], part=part), RECIPE)
    assert len(list(tmp_path.glob("*/*-seed*"))) == 4
    line = ["compare", "--collect", *(str(tmp_path / name) for name in "123"), "--output", str(tmp_path / "all")]
    assert main(line) == 0
    assert results(tmp_path / "all") == results(whole)
    tables = [(path / "results.csv").read_text().splitlines() for path in (tmp_path / "all", whole)]
    scores = [[row.split(",seconds_per_epoch")[0].split(",")[:22] for row in table] for table in tables]
    assert scores[0] == scores[1]
    kept = {path.name for path in (tmp_path / "all" / "dfs-seed0").iterdir()}
    assert kept == {"run.yaml", "config.yaml", "environment.yaml", "metrics.csv", "budget.csv"}
    for path in (tmp_path / "all").rglob("*.yaml"):
        assert str(tmp_path) not in path.read_text(), path
    again = merge([tmp_path / "all"], None)  # from the small files alone
    assert not again.missing


def test_a_run_that_fails_is_named_and_the_others_go_on(tmp_path, capsys):
    rows = "fails: {model.beta: .3}\ndiverges: {optim.lr: 1.0e+9}\ndense: {model.variant: dense}\n"
    (tmp_path / "rows.yaml").write_text(rows)
    output = tmp_path / "out"
    (output / "fails-seed0" / "metrics.csv").mkdir(parents=True)  # where a file is to be
    line = ["compare", *FLAGS, "--rows", str(tmp_path / "rows.yaml"), "--output", str(output)]
    assert main(line) == 1
    assert "dense" in capsys.readouterr().out
    assert read_record(output / "dense-seed0").status == "finished"
    text = (output / "results.md").read_text()
    assert "- fails-seed0: failed: " in text
    assert "- diverges-seed0: diverged: training: expected finite losses" in text
    assert "Traceback" in (output / "fails-seed0" / "log.txt").read_text()
    (output / "fails-seed0" / "metrics.csv").rmdir()
    assert main(line) == 1  # the one that diverged
    assert read_record(output / "fails-seed0").status == "finished"
    assert "| fails |" in (output / "results.md").read_text()


def test_a_process_that_dies_is_a_failed_run(tmp_path):
    process = RunProcess(replace(RECIPE, epochs=1000, run_dir=tmp_path / "run"))
    wait_for(lambda: has_lines(tmp_path / "run", 1))
    process._process.kill()
    while (outcome := process.wait(1)) is None:
        pass
    assert outcome.status == "failed"
    assert outcome.error.startswith("its process died (killed by SIGKILL, as the system does where memory runs out)")


@pytest.mark.parametrize(
    ("recipe", "rows", "expected"),
    [
        (replace(RECIPE, epochs=3), ROWS, "dense-seed0 .*: epochs was 2 and is 3 now"),
        (replace(RECIPE, data=replace(RECIPE.data, mean="imagenet")), ROWS, "data.mean was"),
        (RECIPE, {**ROWS, "dfs": {"model.beta": 0.7}}, "dfs-seed0 .*: model.beta was 0.5 and is 0.7 now"),
    ],
)
def test_another_recipe_under_the_same_name_is_told_before(whole, recipe, rows, expected):
    before = sorted(whole.rglob("*"))
    with pytest.raises(ValueError, match=f"output: expected the runs of this comparison, got .*{expected}"):
        run(config(whole, rows=rows), recipe)
    assert sorted(whole.rglob("*")) == before


def test_runs_of_two_recipes_are_not_merged(whole, tmp_path):
    merge([whole], tmp_path / "one")
    merge([whole], tmp_path / "two")
    for path in (tmp_path / "two").glob("*/*.yaml"):
        path.write_text(path.read_text().replace("row: ", "row: other_").replace("batch_size: 6", "batch_size: 4"))
    with pytest.raises(ValueError, match=r"differ in batch_size \(6 and 4\)\. Remove the one that is out of date"):
        merge([tmp_path / "one", tmp_path / "two"], tmp_path / "both")
    metrics = tmp_path / "two" / "dense-seed0" / "metrics.csv"
    merge([whole], tmp_path / "two")
    metrics.write_text(metrics.read_text().replace("\n1,", "\n1.5,"))
    with pytest.raises(ValueError, match=r"expected dense-seed0 once, got it in .* with other results"):
        merge([tmp_path / "one", tmp_path / "two"], tmp_path / "both")


def test_other_machines_and_places_are_the_same_recipe(whole):
    recipe = replace(RECIPE, num_threads=2, data=replace(RECIPE.data, root="elsewhere", num_workers=1), progress=True)
    recipe = replace(recipe, data=replace(recipe.data, mean=(0.5, 0.5, 0.5), std=(0.2, 0.2, 0.2)))  # the data's own
    assert run(config(whole), recipe).ok


def test_a_learning_rate_is_chosen_on_held_out_samples(tmp_path):
    recipe = replace(RECIPE, epochs=1)
    report = compare([Row("dense", {"model.variant": "dense"})], recipe, config(tmp_path, seeds=2, lr_search=True))
    names = sorted(path.name for path in tmp_path.iterdir() if path.is_dir())
    scores = {}
    for factor in (0.3, 1, 3):
        found = read_run(tmp_path / f"dense-lrx{factor:g}-seed0")
        assert found.config["optim"]["lr"] == pytest.approx(0.01 * factor)
        last = found.epochs[-1]
        scores[factor] = sum(last[f"val_top1_exit{index}"] for index in range(1, 7))
    best = max(scores, key=scores.get)
    assert names == sorted([*(f"dense-lrx{factor:g}-seed0" for factor in scores), f"dense-lrx{best:g}-seed1"])
    (summary,) = report.summaries
    assert [run.folder.name for run in summary.runs] == [f"dense-lrx{best:g}-seed{seed}" for seed in (0, 1)]
    assert f"dense {0.01 * best:.4g} of 0.003, 0.01, 0.03" in (tmp_path / "results.md").read_text()


def test_a_learning_rate_is_not_chosen_on_the_test_samples(tmp_path):
    recipe = replace(RECIPE, data=replace(RECIPE.data, val_fraction=0.0))
    with pytest.raises(ValueError, match=r"lr_search: expected data\.val_fraction > 0"):
        run(config(tmp_path, lr_search=True), recipe)
    assert not list(tmp_path.iterdir())


def test_steps_are_timed_in_turns(whole):
    report = run(config(whole, time_steps=3), RECIPE)
    times = {summary.row: summary for summary in report.summaries}
    assert times["dense"].relative_time == 1
    assert times["dfs"].relative_time == times["dfs"].step_seconds / times["dense"].step_seconds
    assert times["dfs"].step_memory_mib > 0
    assert "time per step" in (whole / "results.md").read_text()
    (whole / "step_time.csv").unlink()


def test_sweep_of_beta(tmp_path):
    report = sweep(SweepBetaConfig(output=tmp_path, betas="0.25,.75"), replace(RECIPE, epochs=1))
    assert [summary.row for summary in report.summaries] == ["dense", "dfs-beta0.25", "dfs-beta0.75"]
    assert [summary.config["model"]["beta"] for summary in report.summaries[1:]] == [0.25, 0.75]
    assert (tmp_path / "accuracy_beta.png").stat().st_size > 10_000


def test_a_sweep_needs_something_to_split():
    recipe = replace(RECIPE, model=ModelConfig(variant="dense"))
    with pytest.raises(ValueError, match=r"model\.variant: .*got dense, which has no beta"):
        sweep(SweepBetaConfig(output=Path("nowhere")), recipe)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"output": None}, "output: expected a folder, got none"),
        ({"part": "3/2"}, "part: expected N/M"),
        ({"seeds": 0}, "seeds: expected a number >= 1"),
        ({"methods": "joint"}, "methods: expected none beside rows"),
        ({"rows": None, "only": "dense"}, "only: expected rows"),
        ({"only": "dens"}, "only: .*Did you mean 'dense'"),
        (
            {"rows": {"a": {"model.variant": "dfs", "model.beta": 1, "method": "pcgrad"}}},
            "rows: a: method: .*leave this",
        ),
    ],
)
def test_what_cannot_be_run_is_told_before(options, expected, tmp_path):
    with pytest.raises(ValueError, match=expected):
        run(config(**{"output": tmp_path / "out", **options}), RECIPE)
    assert not (tmp_path / "out").exists()


def test_a_folder_without_runs(tmp_path):
    with pytest.raises(FileNotFoundError, match="collect: expected a folder that `dfs compare` wrote"):
        merge([tmp_path], None)
    with pytest.raises(ValueError, match="output: expected a folder to merge 2 folders into"):
        merge([tmp_path, tmp_path], None)
