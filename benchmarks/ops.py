"""`dfs bench ops`: forward and backward of every op on the models' shapes, each formulation in turn."""

from pathlib import Path
from typing import Any

from dfs_engine.benchmarks.machine import copy_bandwidth, matmul_peak
from dfs_engine.benchmarks.measure import Stats, append_csv, cpu_threads, environment, load_average, measure_phases
from dfs_engine.benchmarks.op_cases import OP_NAMES, STOCK_PATHS, OpCase, Operands, TimedOp
from dfs_engine.benchmarks.ops_config import BenchOpsConfig, reason_unmeasured
from dfs_engine.benchmarks.ops_report import OpsReport
from dfs_engine.benchmarks.results import Measurement, Measurements
from dfs_engine.benchmarks.shapes import LinearShape, Shape
from dfs_engine.runtime import backend as backends
from dfs_engine.runtime.progress_bar import progress_bar
from dfs_engine.validate.tolerances import DTYPES, Comparison, Tolerance, compare

# Sums over all pixels are rounded in another order than stock's, whose own error varies by several times with layout
# and formulation. A wrong slice is off by far more.
_NOISE_MARGIN = 16
_QUICK_ROUNDS = 5


def run(config: BenchOpsConfig) -> OpsReport:
    """Times everything that `config` asks for.

    Raises:
        RuntimeError: a case's results are wrong; nothing of that shape was timed then.
    """
    with cpu_threads(config.num_threads):
        return _run(config)


def _run(config: BenchOpsConfig) -> OpsReport:
    shapes, dtypes = config.chosen_shapes, config.chosen_dtypes
    report = OpsReport(config=config, stamp=environment())
    for path in config.paths:
        reasons = (reason_unmeasured(path, shape.op, dtype) for shape in shapes for dtype in dtypes)
        report.notes += [f"{path} was not measured: {reason}." for reason in dict.fromkeys(reasons) if reason]
    report.bandwidth = copy_bandwidth()
    report.peaks = {dtype: matmul_peak(DTYPES[dtype]) for dtype in dtypes}
    _append(config, report, report.machine_csv_rows())
    with progress_bar(len(shapes) * len(dtypes), "shape", config.progress) as bar:
        for shape in shapes:
            for dtype in dtypes:
                bar.set_description(f"{shape.op} {shape.family} {shape} {dtype}")
                timed = _time_shape(config, shape, dtype)
                report.rows += timed
                _append(config, report, timed.csv_rows())
                bar.update()
    report.loadavg_end = load_average()
    return report


def _append(config: BenchOpsConfig, report: OpsReport, rows: list[dict[str, Any]]) -> None:
    if config.output:
        append_csv(Path(config.output), report.stamp, rows)


def _time_shape(config: BenchOpsConfig, shape: Shape, dtype: str) -> Measurements:
    """One interleaving: compares, then times."""
    operands = Operands.random(shape, DTYPES[dtype], config.seed)
    timed = [TimedOp(case, operands) for case in config.cases(shape, dtype)]
    check(timed, operands)
    variants = {str(one.case): one.phases for one in timed}
    if config.detail and shape.op != "norm_act":
        variants |= {f"{one.case} detailed": one.detailed() for one in timed}
    rounds = min(config.rounds, _QUICK_ROUNDS) if config.quick else config.rounds
    timings = measure_phases(variants, rounds, config.warmup, max_seconds=config.max_seconds)
    found = Measurements()
    for one in timed:
        details = timings.get(f"{one.case} detailed", {})
        parts = {name: stats for name, stats in details.items() if name.startswith("grad")}
        found.append(measurement(one, dtype, timings[str(one.case)] | parts, _automatic(one.case, operands)))
    return found


def measurement(timed: TimedOp, dtype: str, timings: dict[str, Stats], automatic: str) -> Measurement:
    """All that is told of one case; `automatic` is the backend that `auto` takes there."""
    case, shape = timed.case, timed.shape
    is_stock = case.path in STOCK_PATHS
    counts = {f"flops_{phase}": timed.flops[phase] for phase in timings if shape.flops}
    counts["bytes"] = shape.elements * DTYPES[dtype].itemsize
    counts["automatic"] = int(case.path == automatic)
    return Measurement(
        suite="ops",
        model=shape.family,
        op=shape.op,
        variant=case.path if is_stock else "dfs",
        backend_used="stock" if is_stock else case.path,
        dtype=dtype,
        shape=str(shape),
        mode="eager",
        layout=case.layout,
        beta=case.beta,
        num_live=timed.num_live,
        metrics=timings | {name: Stats.of([count]) for name, count in counts.items()},
    )


def _automatic(case: OpCase, operands: Operands) -> str:
    """The backend that `auto` takes in this layout and slice."""
    TimedOp(case._replace(path="auto"), operands).compute()
    return str(backends.last_used(OP_NAMES[operands.shape.op])).partition(":")[0]


def check(timed: list[TimedOp], operands: Operands) -> None:
    """All cases give what stock PyTorch gives in float64 from the same values, about as nearly as stock in their dtype.

    For a layer the oracle is the stock one, whose gradient's live slice is the sliced gradient; for a block, whose
    input's gradient depends on what its readers train, it is the published formulation.

    Raises:
        RuntimeError: one does not.
    """
    is_block = operands.shape.op == "norm_act"
    formulation = "detach" if is_block else "dense"
    dim = -1 if isinstance(operands.shape, LinearShape) else 1
    sliced = [one for one in timed if one.case.path != "dense"]
    for beta in dict.fromkeys(one.case.beta for one in sliced):
        plain = OpCase(formulation, "nchw", beta if is_block else None)
        expected = TimedOp(plain, operands.double()).results()
        layouts = dict.fromkeys(one.case.layout for one in sliced)
        stock = [TimedOp(plain._replace(layout=layout), operands).results() for layout in layouts]
        # One bound for all results: what stock sums badly in one of them, another formulation of it does in the next.
        tolerance = _tolerance([compare(name, one[name], expected[name]) for one in stock for name in expected])
        for one in sliced:
            if one.case.beta != beta:
                continue
            results = one.results()
            for name, reference in expected.items():
                if name == "grad_input" and not is_block:
                    reference = reference.narrow(dim, 0, one.num_live)
                comparison = compare(name, results[name], reference, tolerance)
                if not comparison.ok:
                    raise RuntimeError(
                        f"bench ops: expected {one.case} of {one.shape.op} on {one.shape} to compute what stock "
                        f"PyTorch computes, got {comparison}. It was not timed; run `dfs validate` to find the op."
                    )


def _tolerance(stock: list[Comparison]) -> Tolerance:
    """The table's, or a multiple of stock's own error where that is larger."""
    table = stock[0].tolerance
    return Tolerance(
        max(table.max_ratio, _NOISE_MARGIN * max(one.max_ratio for one in stock)),
        max(table.rms_ratio, _NOISE_MARGIN * max(one.rms_ratio for one in stock)),
    )
