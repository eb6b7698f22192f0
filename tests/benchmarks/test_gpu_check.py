"""What of the GPU script can be tested without a GPU: arguments, time, files, and that its calls compute one thing."""

import csv
import importlib.util
import itertools
import os
import shutil
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

import pytest
import torch

from dfs_engine import backend as backends
from dfs_engine.benchmarks import gpu_check, gpu_ops, gpu_problems, gpu_steps, tune
from dfs_engine.benchmarks.gpu_problems import ATEN, COMPILED, DENSE, TRITON
from dfs_engine.benchmarks.measure import CSV_COLUMNS, Stats, append_csv, environment
from dfs_engine.benchmarks.shapes import BlockShape, ConvShape, LinearShape

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu_check.py"
SHAPES = [
    ConvShape("a", 2, 6, 5, 7, 3, 2), ConvShape("a", 2, 6, 6, 5, 3, 1, 6), LinearShape("b", 2, 3, 7, 5),
    LinearShape("vit_tiny", 2, 3, 17, 5),
]  # fmt: skip


def test_without_a_gpu_it_says_so_at_once(tmp_path):
    """As a script in a checkout, from another folder."""
    variables = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    variables.pop("PYTHONPATH", None)
    command = [sys.executable, str(SCRIPT), "--quick", "--output", str(tmp_path / "out")]
    done = subprocess.run(command, cwd=tmp_path, env=variables, capture_output=True, text=True)
    assert done.returncode == 1
    assert "no CUDA device" in done.stderr
    assert not (tmp_path / "out").exists()


def test_unknown_stages_are_named(capsys):
    with pytest.raises(SystemExit):
        gpu_check.main(["--stages", "ops,dance"])
    assert "dance" in capsys.readouterr().err


def test_a_stage_that_fails_or_takes_too_long_does_not_stop_the_run(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_check, "_LEAST", 0.0)
    run = gpu_check.Run(tmp_path, False, 2.0)

    def fail(_):
        raise RuntimeError("wrong result")

    run.stage("tests", fail)
    assert run.failed
    run.stage("ops", lambda _: time.sleep(60))
    summary = (tmp_path / "summary.txt").read_text()
    assert "wrong result" in summary
    assert "stopped" in summary
    time.sleep(max(run.budget._end - time.monotonic(), 0))
    run.stage("train", lambda _: pytest.fail("it must not start"))
    assert "skipped" in (tmp_path / "summary.txt").read_text()


def test_commands_leave_a_log_and_are_stopped(tmp_path):
    run = gpu_check.Run(tmp_path, False, 40.0)
    print_one = [sys.executable, "-c", "import os; print(os.environ['ONE'])"]
    assert run.command("a.log", print_one, 60, ONE="1") == (0, "1\n")
    assert (tmp_path / "a.log").read_text() == "1\n"
    status, _ = run.command("b.log", [sys.executable, "-c", "import time; time.sleep(60)"], 0.1)
    assert status is None


@pytest.fixture
def run(tmp_path) -> gpu_check.Run:
    run = gpu_check.Run(tmp_path, False, 60.0)
    run.budget.begin(1.0)
    return run


def test_without_pytest_only_its_stage_is_left_out(run, monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "pytest" else find_spec(name))
    run.stage("tests", gpu_check.tests)
    assert "skipped: pytest is missing" in run.lines[-2]
    assert not run.failed


def test_a_test_file_that_needs_more_packages_is_left_out(run, monkeypatch):
    tests = run.output / "tests"
    tests.mkdir()
    (tests / "test_a.py").write_text("import pytest\n@pytest.mark.gpu\ndef test_one(): pass\n")
    (tests / "test_b.py").write_text("import no_such_package\n# pytest.mark.gpu\n")
    (tests / "test_c.py").write_text("def test_three(): pass\n")
    monkeypatch.setattr(gpu_check, "ROOT", run.output)
    assert gpu_check._marked_files(run) == [tests / "test_a.py"]
    (line,) = run.lines
    assert line == "tests/test_b.py is left out: ModuleNotFoundError: No module named 'no_such_package'"


@pytest.mark.parametrize("missing", ["setuptools", "compiler", "headers"])
def test_without_the_means_to_build_it_says_which(missing, run, monkeypatch, tmp_path):
    if missing == "setuptools":
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    elif missing == "compiler":
        monkeypatch.setattr(shutil, "which", lambda name: None)
    else:
        monkeypatch.setattr(sysconfig, "get_paths", lambda: {"include": str(tmp_path)})
        monkeypatch.setattr(shutil, "which", lambda name: name)
    run.stage("build", gpu_check.build)
    assert f"skipped: {'there is no C++ ' * (missing == 'compiler')}" in run.lines[-2]
    assert missing in run.lines[-2]
    assert not run.failed


def test_without_compute_sanitizer_it_says_so(run, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    run.stage("sanitizer", gpu_check.sanitizer)
    assert "skipped: compute-sanitizer is not on this machine" in run.lines
    assert not run.failed


@pytest.mark.parametrize("status", [0, 9])
def test_what_compute_sanitizer_finds_is_told(status, run, monkeypatch, tmp_path):
    tool = tmp_path / "compute-sanitizer"
    tool.write_text(f"#!/bin/sh\necho \"one pass: 9 results, $*\"\necho '== ERROR SUMMARY: 3 errors'\nexit {status}\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    run.stage("sanitizer", gpu_check.sanitizer)
    assert run.failed is bool(status)
    said = "\n".join(run.lines)
    assert "ERROR SUMMARY: 3 errors" in said
    assert "--tool memcheck" in said
    assert "--one-pass" in said


def test_where_triton_cannot_launch_nothing_else_is_tried(run):
    """Here it cannot: there is no GPU."""
    assert not gpu_check.launches_work(run)
    assert run.failed
    assert "install gcc" in run.lines[-1]


def test_the_tuning_stage_writes_this_gpus_table(run, monkeypatch):
    monkeypatch.setattr(gpu_check.kernels, "gpu_name", lambda: "NVIDIA Made Up")
    asked = []
    report = tune.TuneReport(tune.BenchTuneConfig(), run.output / "a.json", [], {}, {}, ["a class: too slow"])
    monkeypatch.setattr(tune, "run", lambda config: asked.append(config) or report)
    run.stage("tune", gpu_check.tune_launches)
    (config,) = asked
    assert config.output == str(run.output / "nvidia-made-up.json")
    assert config.max_seconds < 60
    assert run.failed
    assert "FAILED: a class: too slow" in "\n".join(run.lines)


WITHOUT = """
import pathlib, sys
from importlib.machinery import PathFinder
class Missing:
    names = {"torchvision", "timm", "transformers", "accelerate", "jsonargparse", "safetensors", "sklearn", "pyarrow",
             "PIL", "matplotlib", "tensorboard", "tqdm", "rich", "yaml", "pytest", "pandas"}
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.split(".")[0] in cls.names else PathFinder.find_spec(name, path, target)
sys.meta_path = [Missing if finder is PathFinder else finder for finder in sys.meta_path]
"""


def run_without_packages(code: str, *flags: str, **variables: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", WITHOUT + code, *flags]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""} | variables
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=SCRIPT.parents[1])


def test_all_benchmarks_and_the_script_import_with_torch_numpy_and_triton_alone():
    code = """
import importlib
for path in sorted(pathlib.Path("benchmarks").glob("[a-z]*.py")):
    importlib.import_module(f"dfs_engine.benchmarks.{path.stem}")
sys.exit(importlib.import_module("dfs_engine.benchmarks.gpu_check").main(["--quick"]))
"""
    done = run_without_packages(code)
    assert done.returncode == 1
    assert done.stderr.strip() == gpu_check._NO_GPU


def test_tuning_runs_with_torch_numpy_and_triton_alone():
    code = """
from dfs_engine.benchmarks import tune
print(tune.run(tune.BenchTuneConfig(dry_run=True, shapes="vit_tiny/*")).table())
"""
    done = run_without_packages(code)
    assert done.returncode == 0, done.stderr
    assert "norm_linear_grad_input bf16" in done.stdout


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_way_computes_the_same(shape, monkeypatch):
    """The dispatcher's CPU kernels stand in for Triton's."""
    monkeypatch.setattr(gpu_problems, "DEVICE", "cpu")
    problems = list(gpu_problems.problems(shape, torch.float32))
    normed = [("norm_linear", "grad_input")] * (shape.family == "vit_tiny")
    named = [(problem.op, problem.metric) for problem in problems]
    assert named == [(shape.op, "grad_input"), (shape.op, "grad_weight"), *normed]
    assert set(gpu_problems.launches(shape)) == (set(named) if getattr(shape, "groups", 1) == 1 else set())
    for problem in problems:
        problem.check()
        assert problem.flops[TRITON] <= shape.flops


def test_a_wrong_result_is_refused(monkeypatch):
    monkeypatch.setattr(gpu_problems, "DEVICE", "cpu")
    problem = next(gpu_problems.problems(SHAPES[0], torch.float32))
    correct = problem.calls[TRITON]
    problem.calls[TRITON] = lambda: correct() * 1.01
    with pytest.raises(RuntimeError, match="triton"):
        problem.check()


def rows() -> list[gpu_ops.GpuRow]:
    timings = {way: Stats.of([seconds]) for way, seconds in ((DENSE, 4e-3), (ATEN, 2e-3), (TRITON, 1e-3))}
    conv = gpu_ops.GpuRow("conv2d", "grad_input", SHAPES[0], "bf16", 3, timings, flops=dict.fromkeys(timings, 10**9))
    block = BlockShape("vgg7", 2, 8, 4, True)
    step = gpu_ops.GpuRow("conv_block", "step", block, "bf16", 4, timings | {COMPILED: Stats.of([3e-3])})
    alone = {TRITON: Stats.of([1e-3])}
    return [conv, step, gpu_ops.GpuRow("conv_block", "forward", block, "bf16", 4, alone, num_bytes=1000)]


def test_rows_go_into_the_results_format(tmp_path):
    for row in rows():
        append_csv(tmp_path / "ops.csv", environment(), row.csv_rows())
    with (tmp_path / "ops.csv").open() as file:
        written = list(csv.DictReader(file))
    assert tuple(written[0]) == CSV_COLUMNS
    found = {(row["op"], row["metric"], row["variant"], row["backend_used"], row["mode"]): row for row in written}
    assert float(found["conv2d", "grad_input", "dfs", "triton", "eager"]["median"]) == 1e-3
    assert float(found["conv_block", "step", "dense", "stock", "compile"]["median"]) == 3e-3
    assert float(found["conv_block", "bytes_forward", "dfs", "triton", "eager"]["median"]) == 1000
    assert found["conv2d", "grad_input", "dense", "stock", "eager"]["case"] == "channels_last"


def test_table_tells_ratios_and_bandwidth(monkeypatch):
    monkeypatch.setattr(gpu_ops, "copy_seconds", lambda num_bytes: 0.5e-3)
    table = gpu_ops.table(rows())
    assert "| 4.00 | - | 2.00 |" in table
    assert "50%" in table
    assert "conv_block forward + backward against dense stock compile: at least 3.00" in table


def test_precision_is_put_back():
    owners = torch.backends.cuda.matmul, torch.backends.cudnn.conv
    before = [owner.fp32_precision for owner in owners]
    for name, (dtype, allowed) in gpu_ops.PRECISIONS.items():
        with gpu_ops.precision(name) as given:
            assert given == dtype
            assert {owner.fp32_precision for owner in owners} == {"tf32" if allowed else "ieee"}
    assert [owner.fp32_precision for owner in owners] == before


def test_steps_of_a_model(monkeypatch, tmp_path):
    """On the CPU, whose kernels stand in for Triton's; there is no time to compile."""
    if backends.unavailable_reason("cpp") is not None:
        pytest.skip(backends.unavailable_reason("cpp"))
    monkeypatch.setattr(gpu_problems, "DEVICE", "cpu")
    for name, value in {"FUSED": "cpp", "_RUNS": [("vgg7_64", 2, "fp32")], "_GATE_BATCH": 2, "_ROUNDS": 1}.items():
        monkeypatch.setattr(gpu_steps, name, value)
    said = []
    (report,) = gpu_steps.run(environment(), False, lambda: 40.0, said.append)
    assert len(said) == sum(case.compile == "on" for case, _ in gpu_steps.cases(False))
    append_csv(tmp_path / "train.csv", report.stamp, report.csv_rows(report.rows))
    with (tmp_path / "train.csv").open() as file:
        found = {(row["variant"], row["backend_used"], row["case"]) for row in csv.DictReader(file)}
    assert {("dfs", "cpp", "beta=0.5/channels_last"), ("dense", "stock", "nchw")} <= found
    assert "x as fast as the best dense" in gpu_steps.targets(report)


def test_cases_are_distinct_and_the_quick_ones_some_of_them():
    every, quick = gpu_steps.cases(False), gpu_steps.cases(True)
    assert len(set(every)) == len(every)
    assert set(quick) < set(every)
    wanted = itertools.product(("dense", "detach", "split"), ("nchw", "channels_last"))
    assert {(case.variant, case.layout) for case, _ in every if case.variant != "dfs"} == set(wanted)
    assert {backend for case, backend in every if case.variant == "dfs"} == {"aten", "triton"}
