"""What the GPU script runs, run by the kernels: every configuration that tuning tries, and the pass for memcheck."""

import pytest
import torch

from dfs_engine.benchmarks import gpu_contests, tune
from dfs_engine.benchmarks.gpu_contests import ATEN
from dfs_engine.benchmarks.measure import Stats, environment
from dfs_engine.benchmarks.shapes import BlockShape, ConvShape, LinearShape
from dfs_engine.kernels import config as kernels

# Of each, one whose sums have several parts.
SHAPES = (
    ConvShape("vgg7", 3, 17, 9, 19),
    ConvShape("vgg7", 3, 17, 9, 9, 3, 2),
    LinearShape("vit_tiny", 41, 15, 17, 9),
    BlockShape("vgg7", 3, 17, 7, True),
    BlockShape("vgg7", 3, 17, 6, False),
)


@pytest.mark.parametrize("dtype", ["fp16", "fp32", "tf32", "bf16"])
def test_every_configuration_computes_what_aten_does(dtype, device, monkeypatch, tmp_path):
    if dtype == "bf16" and device == "cpu":
        pytest.skip("Triton's interpreter multiplies bfloat16 wrongly, and says nothing")
    timed = set()

    def measure(calls: dict, rounds: int) -> dict[object, Stats]:
        timed.update(calls)
        return {way: Stats.of([1e-3]) for way in calls}

    monkeypatch.setattr(gpu_contests, "DEVICE", device)
    monkeypatch.setattr(tune.BenchTuneConfig, "chosen_shapes", lambda _: SHAPES)
    monkeypatch.setattr(tune, "environment", lambda _: environment())
    monkeypatch.setattr(tune, "measure_device", measure)
    monkeypatch.setattr(kernels, "gpu_name", lambda *_: "GPU")
    options = {"beta": "0.5", "progress": False, "output": str(tmp_path / "table.json")}
    report = tune.run(tune.BenchTuneConfig(dtypes=dtype, **options))
    assert not report.failed
    assert not report.missing
    assert {task.op for task in report.tasks} == {"conv2d", "linear", "norm_linear", "norm_act"}
    wanted = {chosen for task in report.tasks for chosen in tune._configs(task)}
    assert wanted < timed
    assert ATEN in timed
    assert any(chosen.split > 1 for chosen in wanted)


def test_one_pass_launches_every_kernel(device, monkeypatch):
    monkeypatch.setattr(gpu_contests, "DEVICE", device)
    half = torch.float16 if device == "cpu" else torch.bfloat16
    assert gpu_contests.one_pass((torch.float32, half)) > 100
