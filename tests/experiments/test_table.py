"""Tables of runs that are written by hand."""

import csv

import numpy as np
import pytest

from dfs_engine.experiments.collect import Plan, chosen_factor, collect, copy_records
from dfs_engine.experiments.record import Record, read_run
from dfs_engine.experiments.report import write_report
from dfs_engine.experiments.rows import Row
from dfs_engine.training.config import TrainConfig
from dfs_engine.training.report import write_csv as write_metrics


def write_run(folder, row, seed, accuracies, *, flags=None, seconds=2.0, status="finished", val=None, factor=None):
    """`accuracies`: (epochs, exits + 1), the last column the ensemble's."""
    import yaml

    flags = flags or {}
    record = Record(row=row, seed=seed, flags=flags, lr_factor=factor, status=status, operations=[1_000_000, 3_000_000])
    path = folder / record.name
    config = Row(row, {**flags, **({} if factor is None else {"optim.lr": 0.1 * factor})}).config(TrainConfig())
    record.write(path)
    (path / "config.yaml").write_text(yaml.safe_dump({**config.to_dict(), "seed": seed}))
    lines = []
    for epoch, (*exits, ensemble) in enumerate(accuracies, start=1):
        line = {"epoch": epoch, **{f"train_loss_exit{index}": 1.0 for index in range(1, len(exits) + 1)}}
        for split, shift in (("test", 0.0), *((("val", val),) if val is not None else ())):
            line |= {f"{split}_top1_exit{index}": value + shift for index, value in enumerate(exits, start=1)}
            line |= {f"{split}_loss_exit{index}": 1.0 for index in range(1, len(exits) + 1)}
            line |= {f"{split}_top1_ensemble": ensemble, f"{split}_loss_ensemble": 1.0}
        lines.append({**line, "seconds": seconds})
    write_metrics(path / "metrics.csv", lines)
    return path


DENSE = {"model.variant": "dense"}


def test_means_deviations_and_relative_times(tmp_path):
    generator = np.random.default_rng()
    accuracies = generator.uniform(10, 90, (3, 4, 3))  # seeds, epochs, exits and ensemble
    for seed in range(3):
        write_run(tmp_path, "plain", seed, accuracies[seed], flags=DENSE, seconds=4.0)
    write_run(tmp_path, "dfs", 0, accuracies[0], seconds=3.0)
    report = write_report(collect([tmp_path]), tmp_path)
    with (tmp_path / "results.csv").open() as file:
        rows = {row["row"]: row for row in csv.DictReader(file)}
    for column, place in (("exit1", 0), ("exit2", 1), ("ensemble", 2)):
        last = accuracies[:, -1, place]
        assert float(rows["plain"][f"top1_{column}_mean"]) == pytest.approx(np.mean(last), abs=1e-4)
        assert float(rows["plain"][f"top1_{column}_deviation"]) == pytest.approx(np.std(last, ddof=1), abs=1e-4)
        assert float(rows["dfs"][f"top1_{column}_mean"]) == pytest.approx(last[0], abs=1e-4)
        assert rows["dfs"][f"top1_{column}_deviation"] == ""
    assert float(rows["dfs"]["relative_time"]) == 0.75
    assert (rows["plain"]["seeds"], rows["dfs"]["operations_exit2"]) == ("0 1 2", "3000000")
    text = (tmp_path / "results.md").read_text()
    assert f"{np.mean(accuracies[:, -1, 2]):.2f} ± {np.std(accuracies[:, -1, 2], ddof=1):.2f}" in text
    assert report.ok


def test_what_is_not_in_the_table_is_named(tmp_path):
    Plan({"dense": [0, 1], "dfs": [0], "late": [0]}, []).write(tmp_path)
    write_run(tmp_path, "dense", 0, [[1, 2, 3]], flags=DENSE)
    write_run(tmp_path, "dfs", 0, [[1, 2, 3]], status="running")
    report = write_report(collect([tmp_path]), tmp_path)
    assert [tuple(run) for run in report.missing] == [
        ("dense-seed1", "not begun", False),
        ("dfs-seed0", "not finished: 1 of 10 epochs are done", False),
        ("late-seed0", "not begun", False),
    ]


def test_without_a_finished_run_there_is_a_list_of_what_is_missing(tmp_path):
    write_run(tmp_path, "dfs", 0, [[1, 2, 3]], status="failed")
    report = write_report(collect([tmp_path]), tmp_path)
    assert not report.ok
    assert "- dfs-seed0: failed" in (tmp_path / "results.md").read_text()
    assert report.tables() == []


def test_rows_of_another_recipe_are_named(tmp_path):
    write_run(tmp_path, "dense", 0, [[1, 2, 3]], flags=DENSE)
    path = write_run(tmp_path, "dfs", 0, [[1, 2, 3]])
    (path / "config.yaml").write_text((path / "config.yaml").read_text().replace("batch_size: 100", "batch_size: 50"))
    with pytest.raises(ValueError, match=r"dense-seed0 and .*dfs-seed0, which differ in batch_size \(100 and 50\)"):
        collect([tmp_path])


def test_seeds_of_a_row_have_the_same_flags(tmp_path):
    write_run(tmp_path, "steep", 0, [[1, 2, 3]], flags={"optim.lr": 0.1})
    write_run(tmp_path, "steep", 1, [[1, 2, 3]], flags={"optim.lr": 0.3})
    with pytest.raises(ValueError, match=r"steep-seed0 and .*steep-seed1, which differ in optim.lr"):
        collect([tmp_path])


@pytest.mark.parametrize(("scores", "best"), [((1, 3, 2), 1.0), ((5, 3, 2), 0.3), ((None, 3, 4), 3.0)])
def test_the_learning_rate_is_the_best_on_held_out_samples(scores, best, tmp_path):
    """None diverged."""
    factors, runs = (0.3, 1.0, 3.0), []
    for factor, score in zip(factors, scores, strict=True):
        status = "diverged" if score is None else "finished"
        test = [[50 - (score or 0), 50 - (score or 0), 9]]  # the worse, the better on val
        runs.append(read_run(write_run(tmp_path, "dense", 0, test, val=2 * (score or 0), status=status, factor=factor)))
    plan = Plan({"dense": [0]}, list(factors))
    assert chosen_factor(runs, plan) == best
    assert chosen_factor(runs[:2], plan) is None
    plan.write(tmp_path)
    (summary,) = write_report(collect([tmp_path]), tmp_path).summaries
    assert summary.lr == pytest.approx(0.1 * best)
    assert "Learning rates chosen" in (tmp_path / "results.md").read_text()


def test_copies_say_nothing_of_the_machines_folders(tmp_path):
    path = write_run(tmp_path / "from", "dfs", 0, [[1, 2, 3]])
    text = (path / "config.yaml").read_text()
    text = text.replace("root: null", "root: /somewhere/data").replace("run_dir: null", "run_dir: /somewhere/run")
    (path / "config.yaml").write_text(text)
    (path / "environment.yaml").write_text("device: a CPU\nprocess: {host: box, pid: 7}\n")
    (path / "model.safetensors").write_bytes(b"weights")
    copy_records(collect([tmp_path / "from"]), tmp_path / "to")
    copied = {file.name: file.read_text() for file in (tmp_path / "to" / "dfs-seed0").iterdir()}
    assert copied.keys() == {"run.yaml", "config.yaml", "environment.yaml", "metrics.csv"}
    assert not any(word in text for text in copied.values() for word in ("somewhere", "box"))
    assert "a CPU" in copied["environment.yaml"]
