"""`dfs bench ops` compares before it times, and says where the automatic choice loses."""

import dataclasses
import json

import pytest
import torch

from dfs_engine.benchmarks import machine, ops, ops_config
from dfs_engine.benchmarks.measure import Stats
from dfs_engine.benchmarks.op_cases import OpCase, Operands, TimedOp
from dfs_engine.benchmarks.ops_config import BenchOpsConfig
from dfs_engine.benchmarks.results import Measurement, Measurements, losses
from dfs_engine.benchmarks.shapes import SHAPES, BlockShape, ConvShape, LinearShape
from dfs_engine.ops import _common
from dfs_engine.runtime import backend as backends

TINY = (
    ConvShape("vgg7", 2, 6, 5, 5),
    ConvShape("resnet18", 2, 4, 6, 7, 1, 2),
    ConvShape("resnet18", 2, 4, 4, 6, 3, 2, 4),
    BlockShape("vgg7", 3, 4, 6, True),
    BlockShape("vgg7", 3, 4, 6, False),
    LinearShape("bert", 2, 3, 4, 5),
)


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setattr(ops_config, "SHAPES", TINY)
    monkeypatch.setattr(ops, "matmul_peak", lambda dtype: machine.matmul_peak(dtype, seconds=0.01, size=64))
    monkeypatch.setattr(ops, "copy_bandwidth", lambda: machine.copy_bandwidth(seconds=0.01, size=2**10))

    def run(**options):
        return ops.run(BenchOpsConfig(**{"rounds": 2, "warmup": 1, "progress": False} | options))

    return run


def test_every_case_is_compared_timed_and_kept(tiny, tmp_path):
    report = tiny(beta=".3,.5", dtypes="fp32,bf16", detail=True, output=str(tmp_path / "ops.csv"))
    paths = 3 if backends.unavailable_reason("cpp") is None else 2
    cases = (1 + paths * 2) * 2
    assert len(report.rows) == 2 * (5 * cases + cases // 2)
    assert {stats.n for row in report.rows for stats in row.timings.values()} == {2}
    assert all(("grad_weight" in row) == (row.op != "norm_act") for row in report.rows)
    assert all(peak > 0 for peak in (*report.peaks.values(), report.bandwidth))
    table = report.table()
    assert all(f"{row.path} | {row.layout}" in table for row in report.rows)
    assert "loses to aten" in table
    assert json.loads(json.dumps(report.to_json(), allow_nan=False))["rows"]
    written = report.machine_csv_rows() + report.rows.csv_rows()
    assert len((tmp_path / "ops.csv").read_text().splitlines()) == 1 + len(written)
    read = [one for one in Measurements.read(tmp_path / "ops.csv") if one.op != "machine"]
    assert [dataclasses.replace(one, stamp={}) for one in read] == report.rows
    usable = {name for name in ("aten", "cpp") if backends.unavailable_reason(name) is None}
    assert {row.path for row in report.rows.of(is_automatic=True)} <= usable


def test_a_backend_without_a_kernel_for_the_dtype_is_not_timed(tiny):
    if backends.unavailable_reason("cpp") is not None:
        pytest.skip(backends.unavailable_reason("cpp"))
    report = tiny(dtypes="fp64", backends="dense,aten,cpp", ops="linear")
    assert {row.path for row in report.rows} == {"dense", "aten"}
    (note,) = report.notes
    assert note.startswith("cpp was not measured: linear in fp64: it has no kernel for float64")


@pytest.mark.parametrize(
    ("name", "op", "spoil"),
    [
        ("conv2d_grad_weight", "conv2d", lambda result: (result[0] * 1.001, result[1])),
        ("conv2d_grad_input", "conv2d", lambda result: result.roll(1, 1)),
        ("linear_grad_weight", "linear", lambda result: (result[0], result[1] * 0)),
    ],
)
def test_wrong_gradients_are_not_timed(tiny, monkeypatch, name, op, spoil):
    compute = _common.ATEN[name]
    monkeypatch.setitem(_common.ATEN, name, lambda *args: spoil(compute(*args)))
    monkeypatch.setattr(ops, "measure_phases", lambda *args, **kwargs: pytest.fail("was timed"))
    with pytest.raises(RuntimeError, match=rf"expected aten/.* of {op} on .* It was not timed"):
        tiny(backends="dense,aten", ops=op)


# Not the depthwise one: torch's counter takes its gradients for dense ones.
@pytest.mark.parametrize("shape", [TINY[0], TINY[1], TINY[5]], ids=str)
def test_flops_are_those_that_the_dispatcher_counts(shape):
    from torch.utils.flop_counter import FlopCounterMode

    operands = Operands.random(shape, torch.float32, 0)
    for path in ("dense", "detach", "aten"):
        case = OpCase(path, "nchw" if shape.op == "conv2d" else "-", None if path == "dense" else 0.5)
        timed = TimedOp(case, operands)
        for phase, call in timed.phases.items():
            with FlopCounterMode(display=False) as counter:
                call()
            assert counter.get_total_flops() == timed.flops[phase], (path, phase)


def test_losses_are_those_beyond_noise():
    operands = Operands.random(TINY[0], torch.float32, 0)

    def row(path, layout, p20, p80) -> Measurement:
        stats = Stats(median=(p20 + p80) / 2, min=p20, p20=p20, p80=p80, n=9)
        timed = TimedOp(OpCase(path, layout, None if path == "dense" else 0.5), operands)
        return ops.measurement(timed, "fp32", dict.fromkeys(("forward", "backward", "step"), stats), "cpp")

    rows = [row("cpp", "nchw", 3.0, 4.0), row("dense", "nchw", 1.0, 2.0), row("detach", "nchw", 2.0, 3.5)]
    rows += [row("dense", "channels_last", 0.1, 0.2)]
    found = losses(Measurements(rows), ("dense", "detach", "aten"), ("forward", "backward", "step"))
    assert {(rival.path, phase) for _, rival, phase in found} == {
        ("dense", "forward"),
        ("dense", "backward"),
        ("dense", "step"),
    }


def test_unknown_shapes_are_refused():
    with pytest.raises(ValueError, match=r"shapes: expected patterns .* vgg7, vgg16, resnet18, msdnet, vit_tiny, bert"):
        BenchOpsConfig(shapes="alexnet/*")


def test_quick_takes_one_shape_of_each_family_and_op():
    chosen = BenchOpsConfig(quick=True, dtypes="bf16").chosen_shapes
    assert {(shape.family, shape.op) for shape in chosen} == {(shape.family, shape.op) for shape in SHAPES}
    assert len(chosen) == 8
    assert BenchOpsConfig(shapes="vgg7/*,bert/*", ops="conv2d,linear").chosen_shapes == [
        shape for shape in SHAPES if shape.family in ("vgg7", "bert") and shape.op != "norm_act"
    ]
