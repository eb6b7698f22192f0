"""Expectations beside measurements: what is read back, and what is said of it."""

import re
from pathlib import Path
from types import SimpleNamespace

import pytest

from dfs_engine import validate
from dfs_engine.benchmarks import gpu_check, gpu_expected, gpu_stages, tune
from dfs_engine.benchmarks.measure import append_csv, environment

DOCS = Path(__file__).parents[2] / "docs" / "gpu.md"


def pair(path, model: str, mode: str, backend: str, speedup: float, variant: str = "dfs") -> None:
    row = {"model": model, "mode": mode, "variant": variant, "backend_used": backend, "dtype": "bf16"}
    append_csv(
        path, environment(), [row | {"metric": "speedup", "median": speedup}, row | {"metric": "step", "median": 9}]
    )


def line(table: str, start: str) -> str:
    (found,) = [line for line in table.splitlines() if line.startswith(f"| {start}")]
    return found


def test_every_pair_is_told_with_its_expectation_and_losses(tmp_path):
    pair(tmp_path / "steps.csv", "vgg16_64", "compile", "aten", 0.9)
    pair(tmp_path / "steps.csv", "vgg16_64", "compile", "aten", 1.16)  # the last one counts
    pair(tmp_path / "steps.csv", "vgg16_64", "compile", "triton", 0.97)
    pair(tmp_path / "steps.csv", "vgg16_64", "eager", "triton", 1.8)
    pair(tmp_path / "steps.csv", "vgg16_64", "eager", "stock", 0.8, "detach")
    pair(tmp_path / "graphs.csv", "bert", "eager, captured", "aten", 1.1)
    table = gpu_expected.table(tmp_path)
    assert line(table, "vgg16_64 step, compile, dfs by aten").endswith("| 1.15 | 1.160 | as expected |")
    assert line(table, "vgg16_64 step, compile, dfs by triton").endswith("| 1.20 | 0.970 | less, a loss |")
    assert line(table, "vgg16_64 step, eager, dfs by triton").endswith("| 1.56 | 1.800 | more |")
    assert line(table, "vgg16_64 step, eager, detach").endswith("| - | 0.800 | a loss |")
    assert line(table, "bert step, eager, captured, dfs by aten").endswith("| - | 1.100 |  |")
    assert line(table, "resnet50 step").endswith("| 1.01 | not measured |  |")


def test_ops_are_told_over_all_shapes(tmp_path):
    for shape, aten in (("a", 0.7), ("b", 0.8), ("c", 1.1)):
        row = {"op": "conv2d", "metric": "grad_input", "shape": shape, "mode": "eager", "variant": "dfs"}
        rows = [row | {"backend_used": "triton", "median": 1.0}, row | {"backend_used": "aten", "median": aten}]
        append_csv(tmp_path / "ops.csv", environment(), rows)
    found = line(gpu_expected.table(tmp_path), "conv2d grad_input by triton against dfs aten eager")
    assert found.endswith("| 0.60 to 0.85 | 0.80 (0.70 to 1.10) | as expected, a loss on 2 of 3 |")


def test_a_torn_line_is_left_out(tmp_path):
    pair(tmp_path / "steps.csv", "resnet50", "compile", "aten", 1.01)
    with (tmp_path / "steps.csv").open("a") as file:
        file.write("2026-01-01,abc,,train,,resnet50")
    assert line(gpu_expected.table(tmp_path), "resnet50 step").endswith("| 1.01 | 1.010 | as expected |")


needs_docs = pytest.mark.skipif(not DOCS.exists(), reason="needs a checkout")


@needs_docs
def test_the_documentation_has_the_same_expectations():
    text = DOCS.read_text()
    for row in gpu_expected.table().splitlines()[2:]:
        what, expected = row.split(" | ")[:2]
        assert f"{what} | {expected} |" in text, row


@needs_docs
def test_the_commands_of_the_documentation_are_accepted(monkeypatch, capsys):
    commands = re.findall(r"python benchmarks/gpu_check.py ([^`#\n]*)", DOCS.read_text())
    assert len(commands) == 5
    monkeypatch.setattr(gpu_check, "listing", lambda stages, seconds: f"{len(stages)} stages in {seconds}")
    for command in commands:
        assert gpu_check.main([*command.split(), "--dry-run"]) == 0
        assert " stages in " in capsys.readouterr().out


@needs_docs
def test_the_stages_of_the_documentation_are_those_that_there_are():
    rows = re.findall(r"^\| (`[a-z_]+`(?:, `[a-z_]+`)*) \|", DOCS.read_text(), re.MULTILINE)
    assert re.findall(r"[a-z_]+", " ".join(rows)) == list(gpu_stages.STAGES)


@needs_docs
def test_the_python_of_the_documentation_runs(monkeypatch):
    asked = []
    for module in (validate, tune):
        monkeypatch.setattr(module, "run", lambda config: SimpleNamespace(table=lambda: asked.append(config)))
    (block,) = re.findall(r"```python\n(.*?)```", DOCS.read_text(), re.DOTALL)
    exec(block, {})
    assert [type(config) for config in asked] == [validate.ValidateConfig, tune.BenchTuneConfig]
