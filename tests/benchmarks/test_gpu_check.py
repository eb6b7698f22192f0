"""What of the GPU script can be tested without a GPU: arguments, time, files, a walk through all of it."""

import csv
import importlib.util
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from dfs_engine.benchmarks import gpu_check, gpu_contests, gpu_expected, gpu_ops, gpu_run, gpu_stages, tune
from dfs_engine.benchmarks.gpu_contests import ATEN, COMPILED, DENSE, TRITON
from dfs_engine.benchmarks.gpu_run import Run
from dfs_engine.benchmarks.measure import CSV_COLUMNS, Stats, append_csv, environment, read_csv
from dfs_engine.benchmarks.results import Measurements
from dfs_engine.benchmarks.shapes import BlockShape, ConvShape, LinearShape
from dfs_engine.benchmarks.step_models import STEP_MODELS
from dfs_engine.ops import _common
from dfs_engine.runtime import backend as backends

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu_check.py"
WALK = Path(__file__).with_name("gpu_walk.py")
SHAPES = [
    ConvShape("a", 2, 6, 5, 7, 3, 2), ConvShape("a", 2, 6, 6, 5, 3, 1, 6), LinearShape("b", 2, 3, 7, 5),
    LinearShape("vit_tiny", 2, 3, 17, 5),
]  # fmt: skip


def test_without_a_gpu_it_says_so_at_once(tmp_path):
    """As a script in a checkout, from another folder."""
    variables = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    variables.pop("PYTHONPATH", None)
    command = [sys.executable, str(SCRIPT), "--output", str(tmp_path / "out")]
    done = subprocess.run(command, cwd=tmp_path, env=variables, capture_output=True, text=True)
    assert done.returncode == 1
    assert "expected a CUDA device" in done.stderr
    assert "--dry-run" in done.stderr
    assert not (tmp_path / "out").exists()


def test_where_a_kernel_loses_the_gpu_the_stage_begins_again_without_kernels(tmp_path, monkeypatch):
    class ReplacedError(Exception):
        pass

    done, started, scaled = [], [], []

    def replace(_, words):
        started.append(words)
        raise ReplacedError

    monkeypatch.setattr(gpu_contests, "DEVICE", "cpu")
    monkeypatch.setattr(gpu_check, "report_environment", lambda run: None)
    monkeypatch.setattr(gpu_check, "launches_work", lambda run: True)
    monkeypatch.setattr(gpu_check, "device_is_lost", lambda: done[-1] == "ops")
    monkeypatch.setattr(gpu_check, "scale_batches", scaled.append)
    monkeypatch.setattr(gpu_check.os, "execv", replace)
    for name, stage in gpu_check.STAGES.items():
        work = lambda run, name=name: done.append(name if not run.stock_only else f"stock {name}")  # noqa: E731
        monkeypatch.setitem(gpu_check.STAGES, name, stage._replace(work=work))
    with pytest.raises(ReplacedError):
        gpu_check.main(["--output", str(tmp_path), "--scale", "0.5", "--seconds", "1e6"])
    assert done == ["tests", "ops"]
    (words,) = started
    python, script, *arguments = words
    assert (python, script) == (sys.executable, str(SCRIPT))
    assert arguments[:2] == ["--stages", "ops,steps,tune,tuned,graphs,profile"]
    assert 9e5 < float(arguments[3]) < 1e6
    monkeypatch.setattr(gpu_check, "device_is_lost", lambda: False)
    assert gpu_check.main(arguments) == 1
    assert done == ["tests", "ops", "stock steps", "stock graphs"]
    assert scaled == [0.5, 0.5]


def test_a_device_is_lost_where_nothing_runs_on_it_any_more(monkeypatch):
    def illegal_access():
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    assert not gpu_run.device_is_lost()
    monkeypatch.setattr(torch.cuda, "synchronize", illegal_access)
    assert gpu_run.device_is_lost()


def test_unknown_stages_are_named(capsys):
    with pytest.raises(SystemExit):
        gpu_check.main(["--stages", "ops,dance"])
    assert "dance" in capsys.readouterr().err


@pytest.fixture
def run(tmp_path) -> Run:
    run = Run(tmp_path, 60.0, environment())
    run.budget.begin(1.0)
    return run


def said(run: Run) -> str:
    return (run.output / "summary.txt").read_text()


def test_a_stage_that_fails_or_takes_too_long_does_not_stop_the_run(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_run, "_LEAST", 0.0)
    run = Run(tmp_path, 2.0, environment())

    def fail(_):
        raise RuntimeError("wrong result")

    run.stage("tests", fail)
    assert run.failed
    run.stage("ops", lambda _: time.sleep(60), 0.5)
    assert run.budget._end - time.monotonic() > 0
    assert "wrong result" in said(run)
    assert "stopped" in said(run)
    time.sleep(max(run.budget._end - time.monotonic(), 0))
    run.stage("steps", lambda _: pytest.fail("it must not start"))
    assert "skipped" in said(run)


def test_a_second_run_adds_to_the_first(tmp_path):
    for text in ("first", "second"):
        Run(tmp_path, 60.0, environment()).say(text)
    assert (tmp_path / "summary.txt").read_text() == "first\nsecond\n"


def test_shares_leave_the_others_theirs():
    shares = gpu_check.shares(["tests", "ops", "steps"])
    left, given = 1.0, []
    for share in shares.values():
        given.append(share * left)
        left -= given[-1]
    assert left == 0
    weights = [gpu_stages.STAGES[name].weight for name in shares]
    assert given == pytest.approx([weight / sum(weights) for weight in weights])


def test_commands_leave_a_log_and_are_stopped(run):
    print_one = [sys.executable, "-c", "import os; print(os.environ['ONE'])"]
    assert run.command("a.log", print_one, 60, run.output, ONE="1") == (0, "1\n")
    assert (run.output / "a.log").read_text() == "1\n"
    status, _ = run.command("b.log", [sys.executable, "-c", "import time; time.sleep(60)"], 0.1, run.output)
    assert status is None


def only(monkeypatch, op: str) -> None:
    """The stage `tests` compares this op alone, on the CPU."""
    monkeypatch.setattr(gpu_contests, "DEVICE", "cpu")
    monkeypatch.setattr(gpu_stages, "FUSED", "reference")
    monkeypatch.setattr(gpu_stages, "PROBLEMS", [op])


def test_without_pytest_the_ops_are_compared_with_float64_all_the_same(run, monkeypatch):
    only(monkeypatch, "partition")
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "pytest" else find_spec(name))
    run.stage("tests", gpu_stages.tests)
    assert "reference PyTorch in float64: all within tolerance" in said(run)
    assert "pytest is missing" in said(run)
    assert not run.failed


def test_a_wrong_op_fails_the_stage(run, monkeypatch):
    only(monkeypatch, "partitioned_linear")
    monkeypatch.setattr(gpu_stages, "_run_pytest", lambda run: None)
    monkeypatch.setitem(
        _common.ATEN, "linear_grad_weight", lambda *args: (torch.full((1, 1), float("nan")), torch.zeros(1))
    )
    run.stage("tests", gpu_stages.tests)
    assert run.failed
    assert "partitioned_linear is wrong" in said(run)


def test_a_test_file_that_needs_more_packages_is_left_out(run, monkeypatch):
    tests = run.output / "tests"
    tests.mkdir()
    (tests / "test_a.py").write_text("import pytest\n@pytest.mark.gpu\ndef test_one(): pass\n")
    (tests / "test_b.py").write_text("import no_such_package\n# pytest.mark.gpu\n")
    (tests / "test_c.py").write_text("def test_three(): pass\n")
    monkeypatch.setattr(gpu_stages, "ROOT", run.output)
    assert gpu_stages._marked_files(run) == [tests / "test_a.py"]
    line = "tests/test_b.py is left out: ModuleNotFoundError: No module named 'no_such_package'\n"
    assert said(run) == line


def test_without_compute_sanitizer_it_says_so(run, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    run.stage("sanitizer", gpu_stages.sanitizer)
    assert "skipped: compute-sanitizer is not on this machine" in said(run)
    assert not run.failed


@pytest.mark.parametrize("status", [0, 9])
def test_what_compute_sanitizer_finds_is_told(status, run, monkeypatch, tmp_path):
    tool = tmp_path / "compute-sanitizer"
    tool.write_text(f"#!/bin/sh\necho \"one pass: 9 results, $*\"\necho '== ERROR SUMMARY: 3 errors'\nexit {status}\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    run.stage("sanitizer", gpu_stages.sanitizer)
    assert run.failed is bool(status)
    for text in ("ERROR SUMMARY: 3 errors", "--tool memcheck", "gpu_check.py --one-pass"):
        assert text in said(run)


def test_where_triton_cannot_launch_it_says_how_it_could(run):
    """Here it cannot: there is no GPU."""
    assert not gpu_stages.launches_work(run)
    assert run.failed
    assert "install gcc" in said(run)


def test_the_tuning_stage_writes_this_gpus_table(run, monkeypatch):
    monkeypatch.setattr(gpu_stages.kernels, "gpu_name", lambda: "NVIDIA Made Up")
    asked = []
    report = tune.TuneReport(tune.BenchTuneConfig(), run.output / "a.json", [], {}, {}, ["a class: too slow"])
    monkeypatch.setattr(tune, "run", lambda config: asked.append(config) or report)
    run.stage("tune", gpu_stages.tune_launches)
    (config,) = asked
    assert config.output == str(run.output / "nvidia-made-up.json")
    assert config.max_seconds < 60
    assert run.failed
    assert "FAILED: a class: too slow" in said(run)


def walk(*arguments: object, **variables: str) -> subprocess.Popen:
    """gpu_check.py on a CPU, with torch, triton and numpy alone."""
    command = [sys.executable, str(WALK), *map(str, arguments)]
    quiet = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, env=os.environ | quiet | variables, stdout=subprocess.PIPE, text=True)


@pytest.mark.parametrize("interpreted", ["0", pytest.param("1", marks=pytest.mark.slow)])
def test_the_whole_script_walks_through(interpreted, tmp_path):
    """With the packages that such a machine has: torch, triton, numpy."""
    pytest.importorskip("triton")
    if interpreted == "0" and backends.unavailable_reason("cpp") is not None:
        pytest.skip(backends.unavailable_reason("cpp"))
    process = walk("--output", tmp_path, "--seconds", 3000, TRITON_INTERPRET=interpreted)
    printed, _ = process.communicate()
    assert process.returncode == 0, printed[-3000:]
    assert (tmp_path / "summary.txt").read_text() == printed
    for name, stage in gpu_stages.STAGES.items():
        assert (f"\n-- {name}: " in printed) == (name not in gpu_check.ON_REQUEST), stage
    assert "bert fp32 dfs/channels_last/eager/beta=0.5 by aten: left out, the package transformers is not" in printed
    backend = "triton" if interpreted == "1" else "cpp"
    for file, mode in (
        ("steps", "eager"),
        ("steps", "compile"),
        ("graphs", "eager, captured"),
        ("graphs", "compile, redu"),
    ):
        found = {(row["mode"], row["backend_used"], row["metric"]) for row in read(tmp_path / f"{file}.csv")}
        for metric in ("step", "speedup", "peak_memory"):
            assert any(key[0].startswith(mode) and key[1:] == (backend, metric) for key in found), (file, mode, metric)
    assert {row["backend_used"] for row in read(tmp_path / "steps_tuned.csv")} >= {"stock", "auto"}
    assert json.loads((tmp_path / "nvidia-made-up.json").read_text())["entries"]
    for variant in ("dfs", "dense"):
        assert "backward" in (tmp_path / f"profile_vgg7_64_{variant}.txt").read_text()
        assert (tmp_path / f"profile_vgg7_64_{variant}.json.gz").stat().st_size > 0


def read(path: Path) -> list[dict[str, str]]:
    return read_csv(path)


def speedups(path: Path) -> int:
    return sum(row["metric"] == "speedup" for row in read(path))


def test_a_run_that_is_killed_keeps_what_it_had_measured(tmp_path):
    if backends.unavailable_reason("cpp") is not None:
        pytest.skip(backends.unavailable_reason("cpp"))
    path = tmp_path / "steps.csv"
    process = walk("--output", tmp_path, "--stages", "steps", "--seconds", 3000)
    measured = 0
    for line in process.stdout:
        measured += " ms, dense " in line
        if measured == 2:
            time.sleep(random.uniform(0, 1))
            break
    process.kill()
    measured += sum(" ms, dense " in line for line in process.stdout)  # what it said before the kill
    assert process.wait() == -signal.SIGKILL
    assert measured >= 2
    assert measured <= speedups(path) <= measured + 1
    assert (tmp_path / "summary.txt").read_text().count(" ms, dense ") in (measured, measured + 1)
    with path.open("a") as file:
        file.write("2026-01-01T00:00:00+00:00,abc")  # as if it had been killed in the middle of a line
    before = speedups(path)
    append_csv(path, environment(), [{"metric": "speedup", "median": 1.5, "mode": "eager"}])
    assert speedups(path) == before + 1
    assert gpu_expected.table(tmp_path).count("vgg7_64 step in fp32") >= 2


def test_the_listing_needs_no_gpu(capsys, monkeypatch):
    for name in STEP_MODELS.keys() - {"vgg16_64"}:
        monkeypatch.delitem(STEP_MODELS, name)
    gpu_stages.step_shapes.cache_clear()
    assert gpu_check.main(["--dry-run", "--stages", "tests,ops,steps,tune", "--seconds", "100"]) == 0
    printed = capsys.readouterr().out
    stages = re.findall(r"^(\w+): (\d+) s, of", printed, re.MULTILINE)
    assert [name for name, _ in stages] == ["tests", "ops", "steps", "tune"]
    assert sum(int(seconds) for _, seconds in stages) == pytest.approx(100, abs=2)
    for line in (
        "partitioned_conv2d in bf16",
        "conv2d vgg16_64 256x64x224x224->64,k3s1 in bf16",
        "vgg16_64, batch 256, bf16: dfs/channels_last/compile/beta=0.5 by triton beside dense",
        "3x3s1x1d1x1 (vgg16_64 256x64x224x224->64,k3s1, beta 0.5)",
    ):
        assert line in printed


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_way_computes_the_same(shape, monkeypatch):
    """The dispatcher's CPU kernels stand in for Triton's."""
    monkeypatch.setattr(gpu_contests, "DEVICE", "cpu")
    contests = list(gpu_contests.contests(shape, torch.float32))
    normed = [("norm_linear", "grad_input")] * (shape.family == "vit_tiny")
    named = [(contest.op, contest.metric) for contest in contests]
    assert named == [(shape.op, "grad_input"), (shape.op, "grad_weight"), *normed]
    assert set(gpu_contests.launches(shape)) == (set(named) if getattr(shape, "groups", 1) == 1 else set())
    for contest in contests:
        contest.check()
        assert contest.flops[TRITON] <= shape.flops


def test_a_wrong_result_is_refused(monkeypatch):
    monkeypatch.setattr(gpu_contests, "DEVICE", "cpu")
    contest = next(gpu_contests.contests(SHAPES[0], torch.float32))
    correct = contest.calls[TRITON]
    contest.calls[TRITON] = lambda: correct() * 1.01
    with pytest.raises(RuntimeError, match="triton"):
        contest.check()


def rows() -> list[Measurements]:
    def row(op: str, metric: str, shape, seconds: dict, **options) -> Measurements:
        contest = gpu_contests.Contest(op, metric, 3, {}, **options)
        timings = {way: Stats.of([value]) for way, value in seconds.items()}
        return gpu_ops.measurements(contest, shape, "bf16", timings)

    seconds = {DENSE: 4e-3, ATEN: 2e-3, TRITON: 1e-3}
    block = BlockShape("vgg7", 2, 8, 4, True)
    return [
        row("conv2d", "grad_input", SHAPES[0], seconds, flops=dict.fromkeys(seconds, 10**9)),
        row("norm_act", "step", block, seconds | {COMPILED: 3e-3}),
        row("norm_act", "forward", block, {TRITON: 1e-3}, num_bytes=1000),
    ]


def test_rows_go_into_the_results_format(tmp_path):
    for row in rows():
        append_csv(tmp_path / "ops.csv", environment(), row.csv_rows())
    with (tmp_path / "ops.csv").open() as file:
        written = list(csv.DictReader(file))
    assert tuple(written[0]) == CSV_COLUMNS
    found = {(row["op"], row["metric"], row["variant"], row["backend_used"], row["mode"]): row for row in written}
    assert float(found["conv2d", "grad_input", "dfs", "triton", "eager"]["median"]) == 1e-3
    assert float(found["norm_act", "step", "dense", "stock", "compile"]["median"]) == 3e-3
    assert float(found["norm_act", "bytes_forward", "dfs", "triton", "eager"]["median"]) == 1000
    assert found["conv2d", "grad_input", "dense", "stock", "eager"]["case"] == "channels_last"


def test_table_tells_ratios_and_bandwidth(monkeypatch):
    monkeypatch.setattr(gpu_ops, "copy_seconds", lambda num_bytes: 0.5e-3)
    table = gpu_ops.table(rows())
    assert "| 4.00 | - | 2.00 |" in table
    assert "50%" in table
    assert "norm_act forward + backward against dense stock compile: at least 3.00" in table


def test_precision_is_put_back():
    owners = torch.backends.cuda.matmul, torch.backends.cudnn.conv
    before = [owner.fp32_precision for owner in owners]
    for name, (dtype, allowed) in gpu_ops.PRECISIONS.items():
        with gpu_ops.precision(name) as given:
            assert given == dtype
            assert {owner.fp32_precision for owner in owners} == {"tf32" if allowed else "ieee"}
    assert [owner.fp32_precision for owner in owners] == before
