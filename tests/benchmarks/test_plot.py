"""`dfs bench plot` draws what a CSV suffices for, from the last run in it."""

import csv

import pytest

from dfs_engine.benchmarks.measure import CSV_COLUMNS
from dfs_engine.benchmarks.plot import BenchPlotConfig, run
from dfs_engine.benchmarks.results import Measurements

pytest.importorskip("matplotlib")


def write(path, rows):
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, CSV_COLUMNS, restval="")
        writer.writeheader()
        writer.writerows({"device_name": "a CPU", "num_threads": 2, "mode": "eager"} | row for row in rows)


def train_rows(batches, betas, seconds=1.0):
    for batch in batches:
        for variant, beta in [("dense", None), ("byot", None), *(("dfs", beta) for beta in betas)]:
            key = {"suite": "train", "case": f"beta={beta}/nchw" if beta else "nchw", "model": "vgg7_64"}
            key |= {"dtype": "fp32", "variant": variant, "shape": f"{batch}x3x32x32"}
            for metric in ("forward", "loss", "backward", "update", "step", "flops_backward"):
                yield key | {"metric": metric, "median": seconds * batch}


def ops_rows(betas):
    yield {"suite": "ops", "op": "machine", "dtype": "fp32", "metric": "peak", "median": 4e11}
    yield {"suite": "ops", "op": "machine", "metric": "bandwidth", "median": 2e10}
    for variant, beta in [("dense", None), *(("dfs", beta) for beta in betas)]:
        key = {"suite": "ops", "op": "conv2d", "model": "vgg7", "dtype": "fp32", "shape": "2x4", "variant": variant}
        key |= {"case": f"beta={beta}/nchw" if beta else "nchw"}
        for metric in ("forward", "backward"):
            yield key | {"metric": metric, "median": 1e-3}
            yield key | {"metric": f"flops_{metric}", "median": 1e8}
        yield key | {"metric": "bytes", "median": 1e6}


def names(report):
    assert all(file.read_bytes().startswith(b"\x89PNG") for file in report.files)
    return {file.name for file in report.files}


def test_each_figure_appears_where_the_measurements_suffice(tmp_path):
    write(tmp_path / "one.csv", train_rows([100], [0.5]))
    assert names(run(BenchPlotConfig(results=tmp_path))) == {"one_vgg7_64_fp32_parts.png"}
    write(tmp_path / "sweep.csv", train_rows([25, 50], [0.3, 0.5]))
    assert names(run(BenchPlotConfig(results=tmp_path / "sweep.csv"))) == {
        "sweep_vgg7_64_fp32_throughput.png",
        "sweep_vgg7_64_fp32_parts.png",
        "sweep_vgg7_64_fp32_backward_beta.png",
    }
    write(tmp_path / "ops.csv", ops_rows([0.3, 0.5]))
    report = run(BenchPlotConfig(results=tmp_path / "ops.csv"))
    assert names(report) == {"ops_conv2d_fp32_backward_beta.png", "ops_fp32_roofline.png"}
    assert "ops_fp32_roofline.png" in report.table()


def test_the_last_run_in_a_file_counts(tmp_path):
    write(tmp_path / "t.csv", [*train_rows([8], [0.5], seconds=9.0), *train_rows([8], [0.5], seconds=2.0)])
    fastest = Measurements.read(tmp_path / "t.csv").of(variant="dfs", beta=0.5).fastest()
    assert fastest["step"].median == 16.0


def test_what_is_no_measurement_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"results: expected CSV files, got none at .*nowhere"):
        run(BenchPlotConfig(results=tmp_path / "nowhere"))
    (tmp_path / "other.csv").write_text("epoch,loss\n1,2\n")
    with pytest.raises(ValueError, match=r"results: expected a CSV file of .*other.csv"):
        run(BenchPlotConfig(results=tmp_path / "other.csv"))


def test_a_folder_may_hold_other_files(tmp_path):
    write(tmp_path / "train.csv", train_rows([8], [0.5]))
    (tmp_path / "metrics.csv").write_text("epoch,loss\n1,2.0\n")
    drawn = names(run(BenchPlotConfig(results=tmp_path, batch_size=8)))
    assert drawn
    assert all(name.startswith("train_") for name in drawn)
