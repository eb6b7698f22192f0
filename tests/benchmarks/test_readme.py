"""The documents' figures are those of the result files: ratios of the best forms, misses and losses included."""

import csv
from pathlib import Path

import pytest

from dfs_engine.benchmarks.markdown import fill
from dfs_engine.benchmarks.measure import CSV_COLUMNS
from dfs_engine.benchmarks.readme import headline, render
from dfs_engine.benchmarks.results import Measurements, compare_steps
from dfs_engine.benchmarks.results_accuracy import accuracy_section
from dfs_engine.benchmarks.results_inference import inference_section
from dfs_engine.benchmarks.results_tables import losses_section, train_section
from dfs_engine.benchmarks.results_targets import COMMANDS, missing_section, targets_section

ROOT = Path(__file__).parents[2]

OPS = {"suite": "ops", "model": "vgg7", "op": "conv2d", "mode": "eager", "shape": "100x64x32x32->64,k3s1"}


@pytest.fixture
def write(tmp_path):
    def write(name: str, rows: list[dict]) -> None:
        common = {"timestamp_utc": "2026-01-01T00:00:00+00:00", "dtype": "fp32", "n": 20, "unit": "s"}
        with (tmp_path / name).open("w", newline="") as file:
            writer = csv.DictWriter(file, CSV_COLUMNS)
            writer.writeheader()
            writer.writerows(common | row for row in rows)
        return tmp_path

    return write


def op(variant: str, backend: str, seconds: float, *, automatic: int = 0, beta: float | None = 0.5) -> list[dict]:
    case = "nchw" if beta is None else f"beta={beta:g}/nchw"
    key = OPS | {"variant": variant, "backend_used": backend, "case": case}
    times = dict.fromkeys(("median", "min", "p20", "p80"), seconds)
    rows = [key | times | {"metric": metric} for metric in ("forward", "backward", "step")]
    return [*rows, key | {"metric": "automatic", "median": automatic, "unit": "bool"}]


def step(variant: str, seconds: float, batch: int = 100, mode: str = "eager") -> list[dict]:
    key = {"suite": "train", "model": "vgg7_64", "mode": mode, "variant": variant, "shape": f"{batch}x3x32x32"}
    values = {"step": seconds, "flops_forward": 3.0, "flops_backward": 3.0, "peak_memory": 7.0}
    return [
        key | {"case": "nchw", "backend_used": "cpp", "metric": metric, "median": value, "min": value / 2}
        for metric, value in values.items()
    ]


def test_ratios_are_of_the_best_forms(write):
    results = write(
        "train_vgg7_64.csv", [*step("dense", 6.0), *step("split", 5.0), *step("detach", 8.0), *step("dfs", 2.0)]
    )
    lines = list(targets_section(results))
    assert "| best stock | 2.3 | 2.5 | 2.50 (2.50); FLOPs alone 1.00 | yes |" in "\n".join(lines)
    assert "| best `split` or `detach` | 1.2 | 1.5 | 2.50 (2.50)" in "\n".join(lines)
    assert "| peak memory of the step | `dense` eager | 0.8 | 0.6 | 1.00 | **no** |" in "\n".join(lines)
    assert lines[-1].startswith("- `dfs bench train")


def test_time_per_image_is_compared_over_batch_sizes(write):
    rows = [row for batch, seconds in ((25, 1.5), (50, 2.0), (100, 4.0)) for row in step("dfs", seconds, batch)]
    text = "\n".join(targets_section(write("train_batch.csv", rows)))
    assert "50% at worst from the median; ms per image at batch 25: 60.00, 50: 40.00, 100: 40.00 | **no**" in text


@pytest.mark.parametrize(("seconds", "met"), [(0.5, "yes"), (0.9, "**no**")])
def test_ops_are_those_that_auto_takes(write, seconds, met):
    rows = [*op("dense", "stock", 1.0, beta=None), *op("dfs", "aten", seconds, automatic=1), *op("dfs", "cpp", 0.1)]
    text = "\n".join(targets_section(write("ops_fp32.csv", rows)))
    assert f"| {1 / seconds:.2f} to {1 / seconds:.2f}, median {1 / seconds:.2f};" in text
    assert f"| {met} |" in text


def test_latency_against_beta(write):
    rows = [
        row
        for beta, seconds in ((0.1, 1.0), (0.5, 3.0), (0.9, 2.0))
        for row in op("dfs", "cpp", seconds, automatic=1, beta=beta)
    ]
    text = "\n".join(targets_section(write("ops_beta.csv", rows)))
    assert "on 0 of 1 shapes; time at 0.1 over that at 0.9: 0.50 to 0.50" in text


def test_losses_are_listed(write):
    rows = [*op("dense", "stock", 1.0, beta=None), *op("dfs", "aten", 0.7), *op("dfs", "cpp", 0.8, automatic=1)]
    text = "\n".join(losses_section(write("ops_fp32.csv", rows) / "ops_fp32.csv"))
    assert "Slower than stock" in text
    assert ": none." in text
    assert "- conv2d vgg7 100x64x32x32->64,k3s1 nchw (cpp): 800.00 ms against aten's 700.00" in text


def test_allocators_are_told_apart(write):
    rows = [*step("dense", 6.0), *step("dense", 5.0, mode="eager, caching"), *step("dfs", 2.0, mode="eager, caching")]
    found = compare_steps(Measurements.read(write("t.csv", rows) / "t.csv"))
    assert (found.median, found.min, found.one_allocator, found.flops) == (3.0, 3.0, 2.5, 1.0)


def test_targets_tell_attentions_apart_and_how_near_the_limit_is(write):
    rows = [*step("dense", 6.0), *step("dense", 3.0, mode="eager, plain attention"), *step("dfs", 2.5)]
    limits = [row | {"metric": "attainable", "median": 2.0} for row in rows if row["metric"] == "step"]
    bf16 = [row | {"dtype": "bf16", "model": "bert"} for row in (*rows, *limits)]
    text = "\n".join(targets_section(write("train_bert_bf16.csv", bf16)))
    assert "| best stock, its default attention | 1.5 | 1.8 | 2.40 (2.40); FLOPs alone 1.00 | yes |" in text
    assert "| best stock | 1.2 | 1.4 | 1.20 (1.20); FLOPs alone 1.00 | yes |" in text
    assert "| bert, batch 100, bf16 | its attainable limit | 0.75 | 0.85 | 0.80; limit 2000 ms | yes |" in text
    assert "| peak memory, bert, bf16 | the fastest stock step | 1.05 |  | 1.00 of 0 MB | yes |" in text


def test_small_batches(write):
    rows = [
        row
        for size, seconds in ((1, 2.0), (8, 2.2))
        for row in (*step("dense", 2.1, size), *step("dfs", seconds, size))
    ]
    text = "\n".join(targets_section(write("train_small_vgg7_64.csv", rows)))
    assert "| `dense`, eager | 1 |  | batch 1: 1.05 (1.05); batch 8: 0.95 (0.95) | **no** |" in text


def inferred(variant: str, seconds: float, size: int, mode: str = "eager", **metrics: float) -> list[dict]:
    key = {"suite": "inference", "model": "vgg7_64", "mode": mode, "variant": variant, "shape": f"{size}x3x32x32"}
    values = {"step": seconds, "p95": 2 * seconds, "throughput": size / seconds, "operations": 8.0, "accuracy": 0.9}
    return [
        key | {"case": "nchw", "backend_used": "cpp", "metric": metric, "median": value, "min": value / 2}
        for metric, value in (values | metrics).items()
    ]


def test_early_exit_counts_at_the_full_models_accuracy(write):
    rows = [
        row
        for size in (1, 256)
        for row in (
            *inferred("stock", 4.0, size, "compile"),
            *inferred("stock", 6.0, size),
            *inferred("prepared", 3.0, size),
            *inferred("early exit", 2.0, size, "drop 0", operations=4.0, accuracy=0.899),
            *inferred("early exit", 1.0, size, "drop 0.01", operations=2.0, accuracy=0.89),
        )
    ]
    results = write("inference_cifar10_vgg7.csv", rows)
    text = "\n".join(targets_section(results))
    assert "| evaluation mode, cifar10_vgg7, batch 1 | best stock | 1 | 1.3 | 1.33 | yes |" in text
    assert "| early exit, drop 0, p50, cifar10_vgg7, batch 1 | best stock | 1.5 | 2.5 | 2.00 | yes |" in text
    assert "| early exit, drop 0, p95, cifar10_vgg7, batch 1 | best stock | 0.95 | 1 | 2.00 | yes |" in text
    assert (
        "| early exit, drop 0, cifar10_vgg7, batch 256 | the gain by operations | 0.8 | 0.95 | 0.75 | **no** |" in text
    )
    lines = list(inference_section(results))
    assert "| 256 | best stock: compile, nchw | 64 | 4000.00 | 8000.00 | 90.00 | 1.00 (1.00) | - | - |" in lines
    assert "| 1 | early exit, drop 0.01 | 1 | 1000.00 | 2000.00 | 89.00 | 4.00 (4.00) | 3.00 | 4.00 |" in lines


def test_only_the_newest_run_of_a_shape_counts(write):
    old = [row | {"timestamp_utc": "2025-01-01T00:00:00+00:00"} for row in (*step("dense", 1.0), *step("split", 1.0))]
    other = [row | {"timestamp_utc": "2025-06-01T00:00:00+00:00"} for row in step("dense", 7.0, batch=50)]
    found = Measurements.read(write("t.csv", [*step("dense", 6.0), *old, *other]) / "t.csv")
    assert {(one.variant, one.batch_size, one["step"].median) for one in found} == {
        ("dense", 100, 6.0),
        ("dense", 50, 7.0),
    }


def test_a_step_table_has_every_form(write):
    rows = [*step("dense", 6.0), *step("split", 5.0), *step("dfs", 2.0)]
    rows += [row | {"metric": phase} for row in rows if row["metric"] == "step" for phase in ("forward", "backward")]
    results = write("train_vgg7_64.csv", rows)
    lines = list(train_section(results / "train_vgg7_64.csv"))
    assert sum(line.startswith("| ") for line in lines) == 4
    assert (
        "| **dfs** (cpp) | nchw | eager | 2000 | 2000 | 2000 (1000) | 3.00 (1.00) | 2.50 | 2.50 | - | 0 | 20 |" in lines
    )
    assert "| no surgery (`dense`) | nchw, eager | 6000 | 3.00 x |" in list(headline(results))


def test_what_was_not_measured_is_named(write):
    text = "\n".join(missing_section(write("ops_fp32.csv", op("dense", "stock", 1.0))))
    assert "ops_fp32" not in text
    assert text.count("\n- `dfs bench ") == len(COMMANDS) - 1


@pytest.mark.parametrize(("ours", "place"), [(70.0, "below"), (75.0, "level with"), (80.0, "above")])
def test_accuracy_says_where_surgery_ends(tmp_path, ours, place):
    for variant, top1 in (("dense", 75.0), ("dfs", ours)):
        text = f"epoch,test_top1_exit1,test_top1_exit2,test_top1_ensemble\n1,1,2,3\n2,90,{top1},50\n"
        (tmp_path / f"cifar10_vgg7_{variant}_metrics.csv").write_text(text)
    lines = list(accuracy_section(tmp_path))
    assert f"After these 2 epochs `dfs` ends {place} `dense` at the last exit, {ours:.2f} against 75.00 %." in lines


@pytest.mark.skipif(not (ROOT / "benchmarks/results").is_dir(), reason="needs a checkout")
def test_generating_changes_nothing():
    for path, text in render(ROOT).items():
        assert path.read_text() == text, f"{path.name}: run `python -m dfs_engine.benchmarks.readme`"


def test_only_the_marked_block_is_replaced():
    text = "before\n<!-- bench:x -->\nold\n<!-- /bench:x -->\nafter"
    assert fill(text, "x", iter(["new"])) == "before\n<!-- bench:x -->\nnew\n<!-- /bench:x -->\nafter"
    with pytest.raises(ValueError, match="document: expected the markers"):
        fill(text, "y", iter([]))
