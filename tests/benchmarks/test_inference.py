"""`dfs bench inference`: every case on the same batches, early exit with thresholds from validation samples."""

import json

import pytest

from dfs_engine.benchmarks import inference
from dfs_engine.benchmarks.inference_config import BenchInferenceConfig
from dfs_engine.benchmarks.results import Measurements

QUICK = {"batch_size": "1,3", "rounds": 2, "samples": 2, "warmup": 1, "compile": "off", "progress": False}


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    """A run on synthetic images, with validation samples and without."""
    pytest.importorskip("accelerate")
    from dfs_engine.data import DataConfig
    from dfs_engine.training.config import ModelConfig, TrainConfig
    from dfs_engine.training.trainer import Trainer

    def train(val_fraction):
        folder = tmp_path_factory.mktemp("run") / "run"
        data = DataConfig(name="synthetic", synthetic_train=60, synthetic_test=40, val_fraction=val_fraction)
        model = ModelConfig(name="vgg7_64", options={"width": 8})
        config = TrainConfig(data=data, model=model, epochs=1, run_dir=str(folder), batch_size=20, progress=False)
        Trainer(config).fit()
        return folder

    return train


@pytest.mark.parametrize("dtypes", ["fp32,bf16"])
def test_without_a_run_the_full_model_alone(dtypes, tmp_path):
    config = BenchInferenceConfig(**QUICK, options={"width": 8}, dtypes=dtypes, output=str(tmp_path / "inference.csv"))
    report = inference.run(config)
    cases = {(row.dtype, row.batch_size, row.variant, row.mode, row.layout) for row in report.rows}
    assert cases == {
        (dtype, size, variant, "eager", layout)
        for dtype in ("fp32", "bf16")
        for size in (1, 3)
        for variant, layout in (
            ("stock", "nchw"), ("stock", "channels_last"), ("model", "channels_last"), ("prepared", "channels_last")
        )
    }  # fmt: skip
    assert "Without a run folder" in report.table()
    assert all("accuracy" not in row for row in report.rows)
    assert not (tmp_path / "inference.png").exists()
    read = Measurements.read(tmp_path / "inference.csv")
    assert [row.metrics for row in read] == [row.metrics for row in report.rows]
    json.dumps(report.to_json(), allow_nan=False)


def test_a_run(run_dir, tmp_path):
    folder = run_dir(0.5)
    config = BenchInferenceConfig(**QUICK, run_dir=folder, drops="0,0.5", output=str(tmp_path / "inference.csv"))
    report = inference.run(config)
    early = report.rows.of(variant="early exit")
    assert {row.mode for row in early} == {"drop 0", "drop 0.5"}
    full = report.rows.of(variant="prepared")[0]
    for row in early:
        shares = [row[f"share_exit{index + 1}"].median for index in range(6)]
        assert sum(shares) == pytest.approx(1)
        assert row["operations"].median <= full["operations"].median
        assert report.gain_by_operations(row) == full["operations"].median / row["operations"].median
    cheap = early.of(mode="drop 0.5")[0]
    assert cheap["operations"].median <= early.of(mode="drop 0")[0]["operations"].median
    assert (tmp_path / "inference.png").stat().st_size > 0
    assert "kept out of training" in report.table()
    assert "%" in report.table()
    json.dumps(report.to_json(), allow_nan=False)


def test_thresholds_are_those_of_validation_samples(run_dir, monkeypatch):
    seen, find = [], inference.find_thresholds

    def noted(logits, *rest, **more):
        seen.append(len(logits[0]))
        return find(logits, *rest, **more)

    monkeypatch.setattr(inference, "find_thresholds", noted)
    report = inference.run(BenchInferenceConfig(**QUICK, run_dir=run_dir(0.5), drops="0.1"))
    assert seen == [30]
    assert len(report.rows.of(variant="early exit")) == 2


def test_a_run_without_validation_samples(run_dir):
    folder = run_dir(0.0)
    with pytest.raises(ValueError, match=r"run_dir: expected a run with data\.val_fraction above 0"):
        inference.run(BenchInferenceConfig(**QUICK, run_dir=folder))
    report = inference.run(BenchInferenceConfig(**QUICK, run_dir=folder, drops=""))
    assert not report.rows.of(variant="early exit")
    assert all("accuracy" in row for row in report.rows)


def test_nothing_is_timed_where_the_prepared_model_is_wrong(monkeypatch):
    prepare = inference.prepare

    def wrong(model):
        prepared = prepare(model)
        prepared.exits[2].linear.weight.mul_(1.1)
        return prepared

    monkeypatch.setattr(inference, "prepare", wrong)
    with pytest.raises(RuntimeError, match=r"expected prepared/eager/channels_last to compute .* exit 3"):
        inference.run(BenchInferenceConfig(**QUICK, options={"width": 8}))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"drops": "1.5"}, r"drops: expected comma-separated shares in \[0, 1\), got '1.5'"),
        ({"batch_size": "0"}, "batch_size: expected"),
        ({"dtypes": "fp64"}, "dtypes: expected"),
        ({"data_root": "x"}, "data_root: expected a run_dir beside it"),
        ({"rounds": 0}, "rounds: expected at least 1"),
    ],
)
def test_wrong_flags(options, message):
    with pytest.raises(ValueError, match=message):
        BenchInferenceConfig(**options)
