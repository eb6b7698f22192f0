"""What arithmetic expects of a Hopper GPU, beside what was measured: read back from the files of gpu_check.py."""

import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from dfs_engine.benchmarks import markdown
from dfs_engine.benchmarks.gpu_contests import ATEN, COMPILED, DENSE, TRITON, Way
from dfs_engine.benchmarks.measure import read_csv

# A figure this near to the range counts as in it.
_MARGIN = 0.03
# Files with whole steps, and what they are called in the table.
_STEP_FILES = {"steps.csv": "", "steps_tuned.csv": ", with this GPU's table", "graphs.csv": ""}


class ExpectedStep(NamedTuple):
    """How much faster a dfs step in bf16 is than the dense one in the same mode; the CSV's names."""

    model: str
    mode: str
    backend: str
    low: float
    high: float


class ExpectedOp(NamedTuple):
    """How much faster this engine's Triton kernels are than `rival`, over all shapes."""

    op: str
    metric: str
    rival: Way
    low: float
    high: float = float("inf")


# By peak rates, the FLOPs that slices leave, and the bytes that fused blocks do not move. Only VGG16 is bound by
# its convolutions; in the others launches decide, not slices. ViT: 1.02, and 7 % more by the last block for one token.
STEPS = (
    ExpectedStep("vgg16_64", "eager", "triton", 1.56, 1.56),
    ExpectedStep("vgg16_64", "compile", "aten", 1.15, 1.15),
    ExpectedStep("vgg16_64", "compile", "triton", 1.20, 1.20),
    ExpectedStep("resnet50", "compile", "aten", 1.01, 1.01),
    ExpectedStep("vit_base_patch16_224", "compile", "aten", 1.02, 1.09),
    ExpectedStep("msdnet_imagenet", "compile", "aten", 1.02, 1.03),
    ExpectedStep("bert", "compile", "aten", 1.03, 1.03),
)
# Products: on a narrowed tensor cuDNN and cuBLAS are the rivals; bias sums and the fused block are bound by bytes.
OPS = (
    ExpectedOp("conv2d", "grad_input", ATEN, 0.60, 0.85),
    ExpectedOp("conv2d", "grad_weight", ATEN, 0.60, 0.85),
    ExpectedOp("linear", "grad_input", ATEN, 0.60, 0.85),
    ExpectedOp("linear", "grad_weight", ATEN, 1.0),
    ExpectedOp("norm_act", "step", DENSE, 1.0),
    ExpectedOp("norm_act", "step", COMPILED, 1.0),
)


def table(folder: Path | None = None) -> str:
    """Markdown: every expectation and, of a run's folder, every measured pair, losses included."""
    rows = []
    measured = dict(_measured_steps(folder)) if folder else {}
    for step in STEPS:
        key = f"{step.model} step, {step.mode}, dfs by {step.backend} against dense"
        rows.append(_cells(key, step.low, step.high, measured.pop(key, [])))
    rows += [_cells(key, None, None, values) for key, values in measured.items()]
    ratios = _ratios_of_ops(folder / "ops.csv") if folder else {}
    for op in OPS:
        key = f"{op.op} {op.metric} by triton against {' '.join(op.rival)}"
        rows.append(_cells(key, op.low, op.high, ratios.get((op.op, op.metric, op.rival), [])))
    return "\n".join(markdown.table(("faster than stock by", "expected", "measured", ""), rows))


def _cells(what: str, low: float | None, high: float | None, values: list[float]) -> tuple[str, ...]:
    expected = "-" if low is None else _range(low, high)
    if not values:
        return what, expected, "not measured", ""
    middle = statistics.median(values)
    measured = f"{middle:.2f} ({min(values):.2f} to {max(values):.2f})" if len(values) > 1 else f"{middle:.3f}"
    notes = []
    if low is not None and high is not None:
        notes.append("less" if middle < low - _MARGIN else "more" if middle > high + _MARGIN else "as expected")
    if min(values) < 1:
        losses = sum(value < 1 for value in values)
        notes.append("a loss" if len(values) == 1 else f"a loss on {losses} of {len(values)}")
    return what, expected, measured, ", ".join(notes)


def _range(low: float, high: float | None) -> str:
    if high == float("inf"):
        return f"> {low:.2f}"
    return f"{low:.2f}" if low == high else f"{low:.2f} to {high:.2f}"


def _measured_steps(folder: Path) -> Iterator[tuple[str, list[float]]]:
    """Of every pair the last measurement."""
    for name, suffix in _STEP_FILES.items():
        for row in read_csv(folder / name):
            if row["metric"] == "speedup":
                by = f"dfs by {row['backend_used']}" if row["variant"] == "dfs" else row["variant"]
                dtype = "" if row["dtype"] == "bf16" else f" in {row['dtype']}"
                yield f"{row['model']} step{dtype}, {row['mode']}, {by} against dense{suffix}", [float(row["median"])]


def _ratios_of_ops(path: Path) -> dict[tuple[str, str, Way], list[float]]:
    """(op, metric, rival) -> that rival's time over triton's, of each shape, precision and run."""
    timings: dict[tuple[str, ...], dict[Way, float]] = {}
    for row in read_csv(path):
        key = tuple(row[name] for name in ("op", "metric", "timestamp_utc", "model", "shape", "dtype"))
        way = Way(row["variant"], row["backend_used"], row["mode"])
        timings.setdefault(key, {})[way] = float(row["median"])
    ratios: dict[tuple[str, str, Way], list[float]] = {}
    for (op, metric, *_), ways in timings.items():
        for rival, seconds in ways.items():
            if TRITON in ways:
                ratios.setdefault((op, metric, rival), []).append(seconds / ways[TRITON])
    return ratios
