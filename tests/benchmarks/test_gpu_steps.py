"""The steps that are timed on a GPU, on the CPU: every family in every mode, and which shapes their layers have."""

import dataclasses

import pytest
import torch

from dfs_engine.benchmarks import gpu_contests, gpu_graphs, gpu_steps, step_models, train_step
from dfs_engine.benchmarks.gpu_steps import Pair
from dfs_engine.benchmarks.measure import append_csv, environment
from dfs_engine.benchmarks.results import Measurements
from dfs_engine.benchmarks.shapes import BlockShape, ConvShape, LinearShape
from dfs_engine.benchmarks.step_models import STEP_MODELS, StepModel
from dfs_engine.benchmarks.train_config import StepCase
from dfs_engine.runtime import backend as backends

# The families of `STEP_MODELS`, small.
TINY = {
    "vgg16_64": StepModel("vgg16_64", 2, 3, {"width": 4}, image_size=32),
    "resnet50": StepModel("resnet50", 2, 3, {"width": 4, "stem": "imagenet"}, image_size=64),
    "vit_base_patch16_224": StepModel(
        "vit_base_patch16_224", 2, 3, {"img_size": 32, "depth": 8, "embed_dim": 24, "num_heads": 2}, "timm"
    ),
    "msdnet_imagenet": StepModel(
        "msdnet_imagenet", 2, 3, {"channels": 8, "growth": 4, "num_exits": 2, "base": 2, "step": 1}, image_size=64
    ),
    "bert": StepModel(
        "bert", 2, 2,
        {"config": {"num_hidden_layers": 3, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 16,
                    "vocab_size": 30, "max_position_embeddings": 8}},
        "transformers",
    ),
}  # fmt: skip
MODES = ("off", "on", "reduce-overhead", "captured")


@pytest.fixture
def machine(monkeypatch):
    """A GPU that is the CPU: nothing is compiled, a graph is the call that was recorded."""
    compiled = []
    monkeypatch.setattr(gpu_contests, "DEVICE", "cpu")
    monkeypatch.setattr(torch, "compile", lambda model, **options: compiled.append(options["mode"]) or model)
    monkeypatch.setattr(gpu_graphs, "record", lambda call: call() or call)
    for name, value in {"_ROUNDS": 1, "_WARMUP": 0, "_GATE_BATCH": 2}.items():
        monkeypatch.setattr(gpu_steps, name, value)
    return compiled


def test_every_family_has_a_tiny_one():
    assert TINY.keys() == STEP_MODELS.keys()
    for name, tiny in TINY.items():
        assert tiny.package == STEP_MODELS[name].package


@pytest.mark.parametrize("name", TINY)
def test_a_family_runs_in_every_mode(name, machine, tmp_path):
    model = TINY[name]
    if model.missing():
        pytest.skip(model.missing())
    said = []
    plan = [(model, Pair(mode)) for mode in MODES]
    results = list(gpu_steps.run(plan, "fp32", lambda: 1e6, said.append))
    assert not said
    modes = [StepCase("dfs", "channels_last", mode).mode for mode in MODES]
    assert [result.other.mode for result in results] == modes
    assert machine == [None, None, "reduce-overhead", "reduce-overhead"]
    for result in results:
        assert (result.dense.variant, result.dense.beta, result.dense.mode) == ("dense", None, result.other.mode)
        assert result.other["peak_memory"].median > 0
        assert result.other["speedup"].n == 1
        append_csv(tmp_path / "steps.csv", environment(), Measurements(result).csv_rows())


def test_the_speedup_is_that_of_rounds(machine, monkeypatch):
    """Not of medians: the two steps of a round met the same machine."""
    times = {"dense": {"step": [2.0, 4.0, 8.0]}, "other": {"step": [1.0, 1.0, 4.0]}}
    monkeypatch.setattr(gpu_steps, "time_phases", lambda *_, **__: times)
    (result,) = gpu_steps.run([(TINY["vgg16_64"], Pair("off"))], "fp32", lambda: 1e6, print)
    speedup = result.other["speedup"]
    assert (speedup.median, speedup.min, speedup.n) == (2.0, 2.0, 3)
    assert "2.000 x (2.000 to 4.000, n = 3" in str(result)
    (row,) = [row for row in Measurements(result).csv_rows() if row["metric"] == "speedup"]
    assert (row["variant"], row["unit"], row["median"]) == ("dfs", "x", 2.0)


def test_the_dense_step_of_a_mode_is_built_once(machine, monkeypatch):
    built = []
    build = train_step.StepBuilder.build
    monkeypatch.setattr(
        train_step.StepBuilder, "build", lambda *args, **kw: built.append(args[1].variant) or build(*args, **kw)
    )
    monkeypatch.setattr(gpu_steps._Bench, "_check", lambda *_: None)
    plan = [(TINY["vgg16_64"], pair) for pair in (Pair("off"), Pair("off", "detach"), Pair("on"))]
    assert len(list(gpu_steps.run(plan, "fp32", lambda: 1e6, print))) == 3
    assert built == ["dense", "dfs", "detach", "dense", "dfs"]


def test_a_pair_that_fails_does_not_keep_the_next_from_being_timed(machine, monkeypatch):
    class DoesNotFit(torch.OutOfMemoryError):
        pass

    bench_time, broken = gpu_steps._Bench.time, {"on": RuntimeError("wrong"), "captured": DoesNotFit("too large")}

    def fail(bench, pair, left):
        if pair.mode in broken:
            raise broken[pair.mode]
        return bench_time(bench, pair, left)

    monkeypatch.setattr(gpu_steps._Bench, "time", fail)
    said, found = [], []
    plan = [(TINY["vgg16_64"], Pair(mode)) for mode in ("on", "captured", "off")]
    with pytest.raises(RuntimeError, match=r"1 failed, see above: vgg16_64 fp32 dfs/channels_last/compile"):
        found.extend(gpu_steps.run(plan, "fp32", lambda: 1e6, said.append))
    assert [text for text in said if "wrong" in text or "does not fit" in text] == said
    assert len(said) == 2


def test_a_wrong_step_is_not_timed(machine, monkeypatch):
    if backends.unavailable_reason("cpp") is not None:
        pytest.skip(backends.unavailable_reason("cpp"))
    results = train_step.Step.results

    def wrong(step):
        found = results(step)
        return {name: value * 1.1 if step.backend_used == "cpp" else value for name, value in found.items()}

    monkeypatch.setattr(train_step.Step, "results", wrong)
    said = []
    with pytest.raises(RuntimeError, match="1 failed"):
        list(gpu_steps.run([(TINY["vgg16_64"], Pair("off", backend="cpp"))], "fp32", lambda: 1e6, said.append))
    assert "Nothing was timed" in said[0]


def test_what_there_is_no_time_for_is_said(machine):
    said = []
    plan = gpu_steps.plan(list(TINY.values()))
    assert not list(gpu_steps.run(plan, "fp32", lambda: 10.0, said.append))
    assert len(said) == len(plan)
    assert all("no time is left" in text or "is not installed" in text for text in said)


def test_the_first_model_comes_first_and_what_compiles_late():
    plan = gpu_steps.plan(list(STEP_MODELS.values()))
    assert len({(model.name, pair) for model, pair in plan}) == len(plan)
    modes = [(model.name, pair.mode) for model, pair in plan if pair.variant == "dfs"]
    first = [mode for name, mode in modes if name == "vgg16_64"]
    others = [mode for name, mode in modes if name != "vgg16_64"]
    assert modes[: len(first)] == [("vgg16_64", mode) for mode in first]
    for found in (first, others):
        assert found == sorted(found)  # "off" before "on"
    assert {pair.variant for _, pair in plan} == {"dfs", "detach", "split"}


def test_shapes_are_those_that_the_model_calls():
    shapes = step_models.StepModel("vgg7_64", 7, options={"width": 16}).shapes()
    assert {str(shape) for shape in shapes if isinstance(shape, ConvShape)} == {
        "7x16x32x32->16,k3s1", "7x16x16x16->32,k3s1", "7x32x16x16->32,k3s1", "7x32x8x8->64,k3s1", "7x64x8x8->64,k3s1",
    }  # fmt: skip
    assert {str(shape) for shape in shapes if isinstance(shape, BlockShape)} == {
        "7x16x32x32", "7x16x32x32,pool", "7x32x16x16", "7x32x16x16,pool", "7x64x8x8", "7x64x8x8,pool",
    }  # fmt: skip
    resnet = STEP_MODELS["resnet50"].shapes()
    assert {"256x64x56x56->64,k3s1", "256x256x56x56->512,k1s2", "256x256x56x56->256,k3s2g256"} <= set(map(str, resnet))
    assert all(shape.channels > 3 for shape in [*shapes, *resnet])  # the image's own convolution needs no grad_input
    costs = [step_models._cost(shape) for shape in resnet]
    assert costs == sorted(costs, reverse=True)


def test_batches_are_scaled(monkeypatch):
    monkeypatch.setattr(step_models, "STEP_MODELS", dict(STEP_MODELS))
    step_models.scale_batches(1 / 128)
    batches = {name: model.batch for name, model in step_models.STEP_MODELS.items()}
    assert batches == dict.fromkeys(STEP_MODELS, 2) | {"bert": 1}


def test_shapes_of_tokens_include_stacked_projections():
    pytest.importorskip("transformers")
    model = dataclasses.replace(TINY["bert"], batch=5)
    found = {str(shape) for shape in model.shapes() if isinstance(shape, LinearShape)}
    assert {"5x8x16->16", "5x8x16->48"} <= found
