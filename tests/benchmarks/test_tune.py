"""`dfs bench tune` without a GPU: what it would measure, what it writes, how it goes on. Clock and GPU are made up."""

import json
import re
import time
from dataclasses import replace

import pytest
import torch

import dfs_engine
from dfs_engine import cli
from dfs_engine.benchmarks import gpu_contests, tune
from dfs_engine.benchmarks.gpu_contests import ATEN
from dfs_engine.benchmarks.gpu_ops import precision
from dfs_engine.benchmarks.measure import Stats, environment
from dfs_engine.benchmarks.shapes import BlockShape, ConvShape, LinearShape
from dfs_engine.benchmarks.step_models import StepModel
from dfs_engine.benchmarks.tune import BenchTuneConfig
from dfs_engine.kernels import config as kernels
from dfs_engine.runtime import backend as backends
from dfs_engine.runtime import choice

pytest.importorskip("triton")

GPU = "NVIDIA Made Up 80GB"
SHAPES = (
    ConvShape("vgg7", 2, 8, 6, 5),
    ConvShape("vgg7", 2, 8, 6, 5, 1),
    ConvShape("resnet18", 2, 8, 8, 5, 3, 2, 8),
    LinearShape("vit_tiny", 2, 3, 8, 6),
    BlockShape("vgg7", 2, 8, 4, True),
)


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """A GPU that computes on the CPU, where the dispatcher's kernels stand in for Triton's; no time passes."""
    monkeypatch.setattr(gpu_contests, "DEVICE", "cpu")
    monkeypatch.setattr(BenchTuneConfig, "chosen_shapes", lambda _: (replace(shape, batch=3) for shape in SHAPES))
    monkeypatch.setattr(tune, "environment", lambda _: environment())
    monkeypatch.setattr(kernels, "gpu_name", lambda *_: GPU)
    monkeypatch.setattr(kernels, "TABLES", tmp_path / "tables")
    monkeypatch.setattr(tune, "measure_device", clock())


def clock(aten: float = 2e-3, best: int = -1, slow: str = "no class"):
    """Of the launches, the one at index `best` takes 1 ms and each other one more; `aten` all the same."""

    def measure(calls: dict, rounds: int) -> dict[object, Stats]:
        ways = [way for way in calls if way != ATEN]
        times = {way: 1e-3 * (1 + abs(index - best % len(ways))) for index, way in enumerate(ways)}
        return {way: Stats.of([seconds]) for way, seconds in (times | {ATEN: aten}).items()}

    return measure


def small(**options) -> BenchTuneConfig:
    """Convolutions and linear layers in float32."""
    return BenchTuneConfig(
        **{"ops": "conv2d,linear,norm_linear", "dtypes": "fp32", "beta": "0.5", "progress": False} | options
    )


KEYS = {  # of `small`, at 3 images
    "conv2d_grad_input fp32-ieee 64x4x64 3x3s1x1d1x1", "conv2d_grad_weight fp32-ieee 8x64x64 3x3s1x1d1x1",
    "conv2d_grad_input fp32-ieee 64x4x8 1x1s1x1d1x1", "conv2d_grad_weight fp32-ieee 8x8x64 1x1s1x1d1x1",
    "linear_grad_input fp32-ieee 8x4x8", "linear_grad_weight fp32-ieee 8x8x8", "norm_linear_grad_input fp32-ieee 8x4x8",
}  # fmt: skip


def test_what_it_writes_is_what_auto_and_the_launches_read(machine, monkeypatch):
    report = tune.run(small())
    assert set(report.measured) == KEYS
    assert not report.failed
    assert not report.missing
    written = kernels.table_path(GPU)
    assert report.path == written
    assert json.loads(written.read_text())["torch"] == torch.__version__
    monkeypatch.setattr(kernels, "_tables", kernels.read_tables())
    monkeypatch.setattr(kernels, "precision", lambda _: "ieee")
    for op, sizes, geometry in (
        ("conv2d_grad_input", (75, 4, 54), "3x3s1x1d1x1"),
        ("conv2d_grad_weight", (6, 72, 75), "3x3s1x1d1x1"),
        ("linear_grad_weight", (6, 8, 9), ""),
        ("norm_linear_grad_input", (9, 4, 6), ""),
    ):
        last = kernels.tunable(op, *sizes, torch.float32)[-1]
        assert kernels.candidates(op, *sizes, torch.float32, geometry)[0] == last
        assert kernels.prefers_triton(op, *sizes, torch.float32, geometry)
        assert not kernels.prefers_triton(op, *sizes, torch.float16, geometry)


def test_a_kernel_that_loses_is_in_the_table_and_not_preferred(machine, monkeypatch):
    monkeypatch.setattr(tune, "measure_device", clock(aten=0.5e-3, best=0))
    report = tune.run(small(ops="linear"))
    entry = report.measured["linear_grad_input fp32-ieee 8x4x8"]
    assert (entry["triton_us"], entry["aten_us"]) == (1000, 500)
    monkeypatch.setattr(kernels, "_tables", kernels.read_tables())
    monkeypatch.setattr(kernels, "precision", lambda _: "ieee")
    assert not kernels.prefers_triton("linear_grad_input", 9, 4, 6, torch.float32)


def test_it_goes_on_where_it_stopped(machine, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    measure = clock()

    def slow(calls: dict, rounds: int) -> dict:
        now[0] += 1
        return measure(calls, rounds)

    monkeypatch.setattr(tune, "measure_device", slow)
    first = tune.run(small(max_seconds=2.5))
    assert len(first.measured) == 3
    assert len(first.missing) == len(KEYS) - 3
    assert set(json.loads(first.path.read_text())["entries"]) == set(first.measured)
    second = tune.run(small())
    assert second.finished == first.measured
    assert set(second.measured) == KEYS - set(first.measured)
    assert set(json.loads(first.path.read_text())["entries"]) == KEYS
    assert not tune.run(small()).measured
    assert set(tune.run(small(again=True, ops="linear")).measured) == {key for key in KEYS if key.startswith("linear")}
    assert set(json.loads(first.path.read_text())["entries"]) == KEYS


def test_another_file_begins_with_what_dfs_engine_has(machine, tmp_path):
    shipped = tune.run(small(ops="linear")).measured
    report = tune.run(small(ops="linear,norm_linear", output=str(tmp_path / "mine.json")))
    assert report.finished == shipped
    assert set(json.loads((tmp_path / "mine.json").read_text())["entries"]) == set(report.measured) | set(shipped)


def test_an_interrupted_run_leaves_a_whole_table(machine, monkeypatch):
    report = tune.run(small(ops="linear"))

    def interrupt(*_) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(tune.os, "replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        tune.run(small())
    assert set(json.loads(report.path.read_text())["entries"]) == set(report.measured)


def test_a_launch_that_does_not_fit_is_not_timed(machine, monkeypatch):
    contests = tune.contests

    def narrow(*arguments):
        for contest in contests(*arguments):
            right = contest.calls[gpu_contests.TRITON]

            def call(right=right):
                if any(chosen.block_m > 32 for configs in kernels._forced.values() for chosen in configs):
                    raise kernels.NoConfigFits("too large")
                return right()

            contest.calls[gpu_contests.TRITON] = call
            yield contest

    monkeypatch.setattr(tune, "contests", narrow)
    report = tune.run(small())
    assert {entry["config"][0] for entry in report.measured.values()} == {32}
    monkeypatch.setattr(kernels, "tunable", lambda *_: [kernels.Config(64, 64, 16, 4, 3)])
    report = tune.run(small(again=True))
    assert not report.measured
    assert len(report.failed) == len(KEYS)
    assert "no configuration fits" in report.table()


def test_a_wrong_result_is_no_entry(machine, monkeypatch):
    contests = tune.contests

    def wrong(*arguments):
        for contest in contests(*arguments):
            right = contest.calls[gpu_contests.TRITON]
            if contest.metric == "grad_input":
                contest.calls[gpu_contests.TRITON] = lambda right=right: right() * 1.01
            yield contest

    monkeypatch.setattr(tune, "contests", wrong)
    report = tune.run(small())
    assert set(report.measured) == {key for key in KEYS if "grad_weight" in key}
    assert len(report.failed) == len(KEYS) - len(report.measured)
    assert re.search(r"FAILED: conv2d_grad_input .*beyond", report.table())


def test_the_table_of_another_gpu_is_left_alone(machine, tmp_path):
    path = tmp_path / "other.json"
    path.write_text(json.dumps({"gpu": "NVIDIA Other", "entries": {}}))
    with pytest.raises(RuntimeError, match=r"expected a table of NVIDIA Made Up 80GB, got .*NVIDIA Other"):
        tune.run(small(output=str(path)))


def test_the_listing_needs_no_gpu(capsys):
    assert cli.main(["bench", "tune", "--dry_run", "--models", "vgg16_64", "--shapes", "*/*x224x224*"]) == 0
    printed = capsys.readouterr().out
    lines = printed.splitlines()
    assert any(line.startswith("to do: conv2d_grad_weight fp16 64x512x") for line in lines)
    total = len(lines) - 1
    assert lines[-1].startswith(f"{total} of {total} shape classes would be measured")


def test_a_class_is_measured_once():
    pytest.importorskip("timm")
    tasks = tune.plan(BenchTuneConfig(models="vgg16_64,vit_base_patch16_224"))
    assert len({task.key for task in tasks}) == len(tasks)
    # The shapes of the models, in every dtype.
    assert {task.op for task in tasks} == {"conv2d", "linear", "norm_linear", "norm_act"}
    assert {task.dtype for task in tasks} == {"bf16", "fp16", "tf32", "fp32"}
    assert {task.shape.batch for task in tasks} == {256}
    at_two = tune.plan(BenchTuneConfig(models="vgg7_64", batch_size="32,128", dtypes="bf16"))
    assert {task.shape.batch for task in at_two} == {32, 128}


def test_a_step_asks_for_the_classes_that_are_tuned(monkeypatch):
    """Every question that a step puts to the table is about a class that would be measured for it."""
    model = StepModel("vgg7_64", 6, num_classes=3, options={"width": 32}, image_size=16)
    monkeypatch.setitem(tune.STEP_MODELS, "vgg7_64", model)
    keys = {task.key for task in tune.plan(BenchTuneConfig(models="vgg7_64", dtypes="fp32", beta="0.5"))}
    asked = set()

    def prefers(op, m, n, k, dtype, geometry="", **_):
        if n not in (3, 27):  # of the image, whose gradient nobody wants
            asked.add(kernels.table_key(op, m, n, k, dtype, geometry))
        return True

    def select(op, device, dtype, backend=None, wins=None):
        """As on a GPU `auto` asks whether Triton wins; here aten computes."""
        assert wins is None or op == "partitioned_linear" or wins("triton")
        return "aten"

    monkeypatch.setattr(choice, "prefers_triton", prefers)
    monkeypatch.setattr(backends, "select", select)
    with precision("fp32"):
        step = dfs_engine.create_model("vgg7_64", num_classes=3, width=32)
        step(torch.randn(6, 3, 16, 16).contiguous(memory_format=torch.channels_last))
    assert {key.split()[0] for key in asked} == {
        "conv2d_grad_input", "conv2d_grad_weight", "norm_act", "norm_act_pool",
    }  # fmt: skip
    assert asked <= keys


def test_finished_classes_are_listed(machine):
    tune.run(small(ops="linear"))
    listing = tune.run(small(dry_run=True)).table()
    assert listing.count("finished: linear_grad") == 2
    assert listing.count("to do: ") == len(KEYS) - 2


def test_without_a_gpu_it_says_so(capsys, monkeypatch):
    monkeypatch.setattr(kernels, "gpu_name", lambda *_: None)
    with pytest.raises(SystemExit) as stopped:
        cli.main(["bench", "tune"])
    assert stopped.value.code == 2
    assert "bench tune: expected a CUDA device, got none" in capsys.readouterr().err


@pytest.mark.parametrize(
    "flag",
    ["--ops conv3d", "--models vgg17_64", "--dtypes fp64", "--beta 2", "--batch_size 0", "--rounds 0"],
    ids=lambda flag: flag,
)
def test_wrong_flags_are_named(flag, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["bench", "tune", *flag.split()])
    assert stopped.value.code == 2
    assert flag.split()[0].strip("-") in capsys.readouterr().err
