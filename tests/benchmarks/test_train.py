"""`dfs bench train` compares before it times, times every case equally often, and says what FLOPs allow."""

import dataclasses
import json

import pytest
import torch

from dfs_engine.benchmarks import train, train_step
from dfs_engine.benchmarks.results import Measurements
from dfs_engine.benchmarks.train_config import BenchTrainConfig, StepCase
from dfs_engine.benchmarks.train_report import BASELINES
from dfs_engine.ops import _common
from dfs_engine.runtime import backend as backends
from dfs_engine.runtime import memory


@pytest.fixture
def tiny(monkeypatch):
    """The real benchmark on a narrow VGG, so that a step takes milliseconds."""
    create_model = train_step.create_model
    monkeypatch.setattr(train_step, "create_model", lambda name, **options: create_model(name, width=8, **options))

    def run(**options):
        return train.run(
            BenchTrainConfig(
                **{"batch_size": "4", "image_size": 16, "rounds": 2, "warmup": 1, "compile": "off", "progress": False}
                | {"dtypes": "fp32", "allocators": "stock"}
                | options
            )
        )

    return run


def test_every_case_is_timed_equally_often_and_stays_in_the_table(tiny, tmp_path):
    report = tiny(dtypes="fp32,bf16", output=str(tmp_path / "train.csv"))
    cases = {(row.dtype, row.variant, row.layout, row.mode, row.beta) for row in report.rows}
    assert cases == {
        (dtype, variant, layout, "eager", None if variant == "dense" else 0.5)
        for dtype in ("fp32", "bf16")
        for variant in ("dense", "detach", "split", "dfs")
        for layout in ("nchw", "channels_last")
    }
    assert {stats.n for row in report.rows for stats in row.timings.values()} == {2}
    assert all(row["peak_memory"].median > 0 for row in report.rows)
    table = report.table()
    assert "synthetic" in table
    assert len([line for line in table.splitlines() if line.startswith(("| fp32", "| bf16"))]) == len(report.rows)
    assert len((tmp_path / "train.csv").read_text().splitlines()) == 1 + 11 * len(report.rows)
    found = json.loads(json.dumps(report.to_json(), allow_nan=False))
    assert found["data"] == "synthetic"
    assert {(row["compile"], row["allocator"], *row["shape"]) for row in found["rows"]} == {
        ("off", "stock", 4, 3, 16, 16)
    }
    read = [dataclasses.replace(one, stamp={}) for one in Measurements.read(tmp_path / "train.csv")]
    assert read == report.rows


def test_ceilings_follow_from_the_flops(tiny):
    report = tiny(layouts="nchw")
    forward, backward = ({row.variant: row.flops_of(phase) for row in report.rows} for phase in ("forward", "backward"))
    assert set(forward.values()) == {forward["dense"]}
    assert backward["dfs"] == backward["split"] < backward["detach"] == backward["dense"]
    row = next(row for row in report.rows if row.variant == "dfs")
    against_dense = report.ratios(row)[0]
    assert against_dense.ceiling == (forward["dense"] + backward["dense"]) / (forward["dfs"] + backward["dfs"])
    dense = next(row for row in report.rows if row.variant == "dense")
    assert against_dense.median == dense.timings["step"].median / row.timings["step"].median


def test_ratios_without_a_baseline_are_absent(tiny):
    report = tiny(variants="dfs", layouts="nchw", backend="aten")
    assert report.ratios(report.rows[0]) == [None] * 5
    assert "| - | - | - | - | - |" in report.table()
    assert report.rows[0].backend_used == "aten"


@pytest.mark.skipif(not memory.is_available(), reason="needs the C++ extension")
def test_stock_forms_are_those_on_torchs_own_memory(tiny):
    report = tiny(variants="dense,dfs", layouts="nchw", allocators="auto")
    steps = {(row.variant, row.allocator): row for row in report.rows}
    assert [row.mode for row in report.rows] == ["eager", "eager, caching"] * 2
    ours = steps["dfs", "caching"]
    by_name = dict(zip(BASELINES, report.ratios(ours), strict=True))
    for name, allocator in (("best stock", "stock"), ("best stock, same allocator", "caching")):
        rival = steps["dense", allocator]
        assert by_name[name].baseline == f"dense/nchw/{rival.mode}"
        assert by_name[name].median == rival.timings["step"].median / ours.timings["step"].median
    assert not memory.caching_allocator_enable(False)
    assert memory.memory_reserved() == memory.memory_allocated(), "what it cached is given back"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_nothing_is_timed_when_gradients_disagree(monkeypatch, tiny, dtype):
    compute = _common.ATEN["conv2d_grad_weight"]

    def broken(grad_output, *args):
        grad_weight, grad_bias = compute(grad_output, *args)
        if grad_output.dtype == dtype:
            grad_weight[:, -1] = 0
        return grad_weight, grad_bias

    monkeypatch.setitem(_common.ATEN, "conv2d_grad_weight", broken)
    monkeypatch.setattr(train, "time_phases", lambda *args, **kwargs: pytest.fail("was timed"))
    with pytest.raises(
        RuntimeError, match=r"expected dfs/nchw/eager/beta=0.5 in .* of blocks\.\d\.conv\.weight: .*Nothing was timed"
    ):
        tiny(backend="aten")


@pytest.mark.parametrize("in_force", [None, "cpp"])
def test_the_gate_in_float64_is_by_aten(tiny, monkeypatch, in_force):
    """No kernel computes in float64; those that are asked for are compared and timed in the dtypes that they have."""
    if backends.unavailable_reason("cpp") is not None:
        pytest.skip(backends.unavailable_reason("cpp"))
    ran = set()
    select = backends.select

    def record(op, device, dtype, *args, **kwargs):
        chosen = select(op, device, dtype, *args, **kwargs)
        ran.add((dtype, chosen))
        return chosen

    monkeypatch.setattr(backends, "select", record)
    with backends.use_backend(in_force):
        report = tiny(backend="auto" if in_force else "cpp", variants="detach,dfs", layouts="channels_last")
    assert {chosen for dtype, chosen in ran if dtype == torch.float64} == {"aten"}
    assert (torch.float32, "cpp") in ran
    assert {row.backend_used for row in report.rows} == {"stock", "cpp"}
    assert "in float64 dfs by aten" in report.table()
    with backends.use_backend(in_force), pytest.raises(RuntimeError, match="it has no kernel for float64"):
        tiny(backend="auto" if in_force else "cpp", variants="dfs", dtypes="fp64")


def test_sweeps_compare_like_with_like(tiny):
    report = tiny(batch_size="2,4", beta=".3,.7", variants="dense,byot,dfs", layouts="channels_last")
    keys = [(row.batch_size, row.variant, row.beta) for row in report.rows]
    assert keys == [
        (batch, variant, beta)
        for batch in (2, 4)
        for variant, beta in (("dense", None), ("byot", None), ("dfs", 0.3), ("dfs", 0.7))
    ]
    last = report.rows[-1]
    dense, byot = report.rows[4:6]
    ratios = report.ratios(last)
    assert ratios[0].median == dense.timings["step"].median / last.timings["step"].median
    assert ratios[1] is None
    assert ratios[list(BASELINES).index("byot")].median == byot.timings["step"].median / last.timings["step"].median
    cases = {row["case"] for row in report.rows.csv_rows()}
    assert cases == {"channels_last", "beta=0.3/channels_last", "beta=0.7/channels_last"}


@pytest.mark.parametrize("rounds", [2, 7])
def test_batch_sizes_share_the_minutes(tiny, monkeypatch, rounds):
    order, time_phases = [], train.time_phases

    def observed(variants, rounds, warmup, **options):
        order.append((len(order) % 2, rounds, warmup))
        return time_phases(variants, rounds, warmup, **options)

    monkeypatch.setattr(train, "time_phases", observed)
    report = tiny(batch_size="2,4", variants="dfs", layouts="nchw", rounds=rounds)
    assert {stats.n for row in report.rows for stats in row.timings.values()} == {rounds}
    laps = [[entry for entry in order if entry[0] == size] for size in (0, 1)]
    assert len(laps[0]) == min(4, rounds)
    assert [entry[1:] for entry in laps[0]] == [entry[1:] for entry in laps[1]]
    assert [warmup for *_, warmup in laps[0]] == [1] * len(laps[0])


def test_breakdown_covers_the_step_by_kind_of_kernel(tiny):
    report = tiny(variants="dense,dfs", layouts="channels_last", breakdown=True, batch_size="16")
    dense, dfs = (row.kernels for row in report.rows)
    common = {"convolution forward", "producer forward", "producer backward", "linear + loss", "optimizer", "other"}
    assert set(dense) == common | {"convolution grad_input + grad_weight"}
    assert set(dfs) - {"convolution grad_input + grad_weight"} == common | {
        "convolution grad_input",
        "convolution grad_weight",
    }
    assert all(seconds > 0 for kernels in (dense, dfs) for seconds in kernels.values())
    assert "| convolution grad_weight |" in report.table()
    assert {row["op"] for row in report.rows.csv_rows() if row["metric"] == "breakdown"} == set(dense) | set(dfs)


def test_the_number_of_threads_is_restored(tiny):
    before = torch.get_num_threads()
    report = tiny(variants="dense", layouts="nchw", num_threads=before + 1)
    assert report.stamp.num_threads == before + 1
    assert torch.get_num_threads() == before


def test_the_caching_allocator_is_refused_where_it_is_not(monkeypatch):
    monkeypatch.setattr(memory, "is_available", lambda: False)
    assert {case.allocator for case in BenchTrainConfig().cases} == {"stock"}
    with pytest.raises(ValueError, match="allocators: expected stock with device cpu, got caching"):
        BenchTrainConfig(allocators="caching")


def test_a_step_moves_the_weights_and_results_do_not():
    config = BenchTrainConfig(image_size=16)
    step = train_step.StepBuilder(config, 2).build(StepCase("dfs", "nchw", "off", 0.5), "fp32")
    weight = step.parameters["blocks.0.conv.weight"]
    before = weight.detach().clone()
    step.results()
    assert torch.equal(weight, before)
    step.run()
    assert not torch.equal(weight, before)


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("model", "vgg7", "Did you mean 'vgg7_64'"),
        ("variants", "dense,dsf", "Did you mean 'dfs'"),
        ("layouts", "nhwc", "expected one of nchw, channels_last"),
        ("compile", "yes", "expected one of off, on"),
        ("allocators", "jemalloc", "expected one of stock, caching"),
        ("dtypes", "float", "expected one of fp64, fp32, bf16, fp16"),
        ("backend", "cp", "Did you mean 'cpp'"),
        ("beta", "0.5,1.5", "beta: expected comma-separated numbers in"),
        ("beta", "", "beta: expected comma-separated numbers in"),
        ("rounds", 0, "rounds: expected at least 1, got 0"),
        ("batch_size", "25,-1", "batch_size: expected comma-separated integers of at least 1"),
        ("batch_size", "many", "batch_size: expected comma-separated integers"),
    ],
)
def test_bad_options(option, value, message):
    with pytest.raises(ValueError, match=message):
        BenchTrainConfig(**{option: value})


@pytest.mark.slow
def test_compiled_cases_are_compared_and_timed(tiny):
    report = tiny(compile="on", layouts="nchw", variants="detach,dfs")
    assert [row.mode for row in report.rows] == ["compile", "compile"]


@pytest.mark.parametrize("is_kink", [True, False])
def test_a_kink_on_some_images_is_no_defect_and_one_on_all_is(monkeypatch, tiny, is_kink):
    seen = []

    def breaches(builder, dtype, truth, steps):
        seen.append(builder.inputs.clone())
        assert all(torch.equal(step.inputs.float(), builder.inputs) for step in steps.values())
        return dict.fromkeys(steps, "too far") if len(seen) == 1 or not is_kink else {}

    monkeypatch.setattr(train_step.StepBuilder, "_breaches", breaches)
    if is_kink:
        tiny(variants="dfs")
    else:
        with pytest.raises(RuntimeError, match="too far"):
            tiny(variants="dfs")
    assert len(seen) == (2 if is_kink else 3)
    assert not torch.equal(seen[0], seen[1])


@pytest.mark.parametrize("dropout", [True, False])
def test_dropout_is_timed_and_compared_without(monkeypatch, dropout):
    """Each draw is another loss; without, a step that hardly learns repeats its own."""
    losses, update = {}, train_step.Step.update

    def note(step):
        losses.setdefault(step.backend_used, []).append(step.loss.item())
        update(step)

    monkeypatch.setattr(train_step.Step, "update", note)
    sizes = {"model": "msdnet_cifar", "options": {"channels": 4, "growth": 4}, "image_size": 16, "batch_size": "4"}
    cases = {"variants": "dense,dfs", "layouts": "nchw", "compile": "off", "allocators": "stock", "dtypes": "fp32"}
    report = train.run(BenchTrainConfig(**sizes, **cases, rounds=3, warmup=1, progress=False, dropout=dropout))
    assert {row.suite for row in report.rows} == {"train_dropout" if dropout else "train"}
    assert ("own rates" in report.table()) is dropout
    assert len(losses) == 2
    for seen in losses.values():
        assert len(seen) >= 4
        assert (max(seen) - min(seen) > 0.3) is dropout


def test_stock_transformers_are_timed_with_either_attention(monkeypatch):
    pytest.importorskip("transformers")
    fused = torch.nn.functional.scaled_dot_product_attention
    calls = []

    def count(*args, **kwargs):
        calls.append(1)
        return fused(*args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", count)
    sizes = {"num_hidden_layers": 2, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 16}
    config = BenchTrainConfig(
        model="bert", options={"config": sizes}, batch_size="2", variants="dense,dfs", layouts="nchw", compile="off",
        attentions="fused,plain", allocators="stock", dtypes="fp32", rounds=1, warmup=1, progress=False,
    )  # fmt: skip
    report = train.run(config)
    assert [(row.variant, row.mode, row.attention) for row in report.rows] == [
        ("dense", "eager", "fused"), ("dense", "eager, plain attention", "plain"), ("dfs", "eager", "fused"),
    ]  # fmt: skip
    builder = train_step.StepBuilder(config, 2)
    for attention, expected in (("fused", 2), ("plain", 0)):
        step = builder.build(StepCase("dense", "nchw", "off", attention=attention), "fp32")
        calls.clear()
        step.run()
        assert len(calls) == expected
    assert all(row["attainable"].median > 0 for row in report.rows)
    assert "Best speeds in turns with the steps, fp32, batch 2: products" in report.table()


def test_a_model_without_attention_has_no_plain_one(tiny):
    with pytest.raises(
        ValueError, match="attentions: expected fused, the default, with vgg7_64, which has no attention"
    ):
        tiny(attentions="plain", variants="dense", layouts="nchw")
