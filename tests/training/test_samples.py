"""What a run measures besides the test samples: those kept out of training, and further test sets."""

import csv
import json
from dataclasses import replace

import pytest

from dfs_engine.cli import main
from dfs_engine.data import load_data
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
