"""What the engine set out to reach beside what it reaches, and the commands that write each file of results."""

import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from dfs_engine.benchmarks.markdown import link, table
from dfs_engine.benchmarks.measure import TOTAL
from dfs_engine.benchmarks.results import STOCK, Measurements, compare_steps

# What regenerates each file; on a quiet machine, one after another.
COMMANDS = {
    "train_vgg7_64.csv": "dfs bench train --dtypes fp32",
    "train_vgg7_64_bf16.csv": "dfs bench train --dtypes bf16",
    "train_vgg16_64.csv": "dfs bench train --model vgg16_64 --batch-size 8 --dtypes fp32 --layouts channels_last",
    "train_batch.csv": (
        "dfs bench train --variants dense,byot,dfs --batch-size 25,50,100,200,400 --dtypes fp32 --compile off "
        "--layouts channels_last"
    ),
    "train_vgg7_64_breakdown.csv": (
        "dfs bench train --variants dense,dfs --dtypes fp32 --compile off --layouts channels_last --breakdown true"
    ),
    "ops_fp32.csv": "dfs bench ops",
    "ops_beta.csv": (
        "dfs bench ops --ops conv2d,linear --shapes 'vgg7/*,msdnet/*,vit_tiny/*,bert/*' --backends dense,aten,cpp "
        "--layouts channels_last --beta .1,.3,.5,.7,.9 --max_seconds 10"
    ),
}

# The families' steps in both dtypes: what is run, what it is called, at least, aim.
_STEPS = {
    "resnet18": ("--model resnet18 --batch-size 64", "ResNet18 step, batch 64", 1.25, 1.5),
    "msdnet": ("--model msdnet_cifar --batch-size 64", "MSDNet (CIFAR) step, batch 64", 1.3, 1.8),
    "vit_tiny": ("--model vit_tiny_patch16_224 --batch-size 8", "ViT-Ti step, 224 px, batch 8", 1.5, 2.0),
    "bert": (
        "--model bert --batch-size 16 --options '{config: {num_hidden_layers: 6, hidden_size: 384, "
        "intermediate_size: 1536, num_attention_heads: 12}}'",
        "BERT (6 layers, 384) step, 16 x 128 tokens",
        1.5,
        2.0,
    ),
}
COMMANDS |= {
    f"train_{name}{suffix}.csv": (
        f"dfs bench train {_STEPS[name][0]} --variants dense,split,dfs --layouts channels_last --dtypes {dtype}"
    )
    for name in _STEPS
    for suffix, dtype in (("", "fp32"), ("_bf16", "bf16"))
}


def op_ratios(found: Measurements, op: str, metric: str) -> dict[str, float]:
    """By shape: time of dense over that of the automatic choice, each in its best layout; medians."""
    ratios = {}
    for shape in dict.fromkeys((one.model, one.shape) for one in found.of(op=op)):
        same = found.of(op=op, model=shape[0], shape=shape[1])
        dense = same.of(path="dense").fastest(metric)
        own = same.of(is_automatic=True).fastest(metric)
        if dense and own:
            ratios[" ".join(shape)] = dense[metric].median / own[metric].median
    return ratios


class Line(NamedTuple):
    """One row of the table."""

    what: str
    against: str
    least: str
    aim: str
    measured: str
    is_met: bool
    file: str


def _step(results: Path, file: str, what: str, against: str, rivals: tuple[str, ...], least: float, aim: float,
          dtype: str = "fp32") -> Iterator[Line]:  # fmt: skip
    path = results / file
    if not path.exists():
        return
    every = Measurements.read(path).of(suite="train", dtype=dtype)
    found = compare_steps(every.of(batch_size=100) or every, rivals)
    if found is None:
        return
    text = f"{found.median:.2f} ({found.min:.2f}); FLOPs alone {found.flops:.2f}"
    if found.ours.allocator != "stock":
        text += f"; both on the caching allocator {found.one_allocator:.2f}"
    yield Line(what, against, f"{least:g}", f"{aim:g}", text, found.median >= least, file)


def _op_lines(results: Path) -> Iterator[Line]:
    path = results / "ops_fp32.csv"
    if not path.exists():
        return
    found = Measurements.read(path)
    for op, metric, what, against, least, aim in (
        ("conv2d", "backward", "backward per conv, beta 0.5", "`dense` backward", 1.25, "1.33"),
        ("linear", "step", "partitioned linear, forward + backward, fp32", "stock `F.linear`", 1.8, "2.5"),
    ):
        ratios = op_ratios(found, op, metric)
        if not ratios:
            continue
        values = sorted(ratios.values())
        enough = sum(value >= least for value in values)
        text = (
            f"{values[0]:.2f} to {values[-1]:.2f}, median {statistics.median(values):.2f}; "
            f"{enough} of {len(values)} shapes reach {least:g}"
        )
        yield Line(what, against, f"{least:g}", aim, text, enough == len(values), path.name)


def _beta_line(results: Path) -> Iterator[Line]:
    path = results / "ops_beta.csv"
    if not path.exists():
        return
    found = [one for one in Measurements.read(path).of(is_automatic=True) if one.beta is not None]
    curves: dict[tuple[str, ...], list[float]] = {}
    for one in sorted(found, key=lambda one: one.beta or 0):
        curves.setdefault((one.op, one.model, one.shape), []).append(one["backward"].median)
    if not curves:
        return
    num_falling = sum(times == sorted(times) for times in curves.values())
    spans = [times[0] / times[-1] for times in curves.values()]
    text = (
        f"on {num_falling} of {len(curves)} shapes; time at 0.1 over that at 0.9: "
        f"{min(spans):.2f} to {max(spans):.2f}, median {statistics.median(spans):.2f}"
    )
    is_met = num_falling == len(curves)
    yield Line("backward latency, beta .9 to .1", "itself", "falls monotonically", "", text, is_met, path.name)


def _memory_line(results: Path) -> Iterator[Line]:
    path = results / "train_vgg7_64.csv"
    if not path.exists():
        return
    found = Measurements.read(path).of(dtype="fp32")
    own = found.of(variant="dfs").fastest()
    dense = [one["peak_memory"].median for one in found.of(variant="dense") if one.mode.startswith("eager")]
    if own and dense:
        ratio = own["peak_memory"].median / min(dense)
        yield Line("peak memory of the step", "`dense` eager", "0.8", "0.6", f"{ratio:.2f}", ratio <= 0.8, path.name)


def _batch_line(results: Path) -> Iterator[Line]:
    path = results / "train_batch.csv"
    if not path.exists():
        return
    found = Measurements.read(path).of(variant="dfs", dtype="fp32")
    fastest = {size: found.of(batch_size=size).fastest() for size in found.distinct("batch_size")}
    per_image = {size: one[TOTAL].median / size for size, one in fastest.items() if one}
    middle = statistics.median(per_image.values())
    worst = max(abs(value / middle - 1) for value in per_image.values())
    times = ", ".join(f"{batch}: {value * 1e3:.2f}" for batch, value in per_image.items())
    text = f"{worst:.0%} at worst from the median; ms per image at batch {times}"
    yield Line("step time against batch size", "linear", "within 10 %", "", text, worst <= 0.1, path.name)


def targets_section(results: Path) -> Iterator[str]:
    """The table; lines whose file is missing are left out."""
    lines = [
        *_step(results, "train_vgg7_64.csv", "VGG7-64 step, batch 100, fp32", "best `dense`", ("dense",), 1.3, 1.6),
        *_step(results, "train_vgg7_64.csv", "same", "best `split` or `detach`", ("split", "detach"), 1.2, 1.5),
        *_step(
            results, "train_vgg7_64_bf16.csv", "VGG7-64 step, batch 100, bf16 autocast", "best stock", STOCK, 1.3, 1.6,
            dtype="bf16",
        ),
        *_step(results, "train_batch.csv", "VGG7-64 step, batch 100, fp32", "BYOT on `dense`", ("byot",), 1.5, 2.0),
        *_step(results, "train_vgg16_64.csv", "VGG16-64, 224 px, batch 8, fp32", "best stock", STOCK, 1.25, 1.5),
        *(
            line
            for name, (_, what, least, aim) in _STEPS.items()
            for line in _step(results, f"train_{name}.csv", f"{what}, fp32", "best stock", STOCK, least, aim)
        ),
        *_op_lines(results),
        *_beta_line(results),
        *_memory_line(results),
        *_batch_line(results),
    ]  # fmt: skip
    yield from table(
        ("what", "against", "at least", "aim", "measured: ratio of medians (of minima)", "reached", "file"),
        ((*line[:5], "yes" if line.is_met else "**no**", link(results / line.file, results.parent)) for line in lines),
    )
    yield ""
    for file in dict.fromkeys(line.file for line in lines):
        yield f"- `{command(file)}`"


def command(file: str) -> str:
    """What writes a file of results, from the root of a checkout."""
    return f"{COMMANDS[file]} --output benchmarks/results/{file}"


def missing_section(results: Path) -> Iterator[str]:
    """What has a command, but no result yet."""
    missing = [file for file in COMMANDS if not (results / file).exists()]
    yield "Not measured yet:" if missing else "Every file that has a command is there."
    yield ""
    for file in missing:
        yield f"- `{command(file)}`"
