"""What the engine set out to reach beside what it reaches, and the commands that write each file of results."""

import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from dfs_engine.benchmarks.markdown import link, table
from dfs_engine.benchmarks.measure import TOTAL
from dfs_engine.benchmarks.results import LIMIT, Measurement, Measurements, compare_steps
from dfs_engine.benchmarks.results_inference import NETWORKS, gains
from dfs_engine.benchmarks.train_config import STOCK_VARIANTS

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
    "gradients_vgg7_64.csv": "dfs bench gradients --batch-size 32",
    "gradients_msdnet.csv": (
        "dfs bench gradients --model msdnet_cifar --exit-gradients own,whole --batch-size 8 --layouts channels_last "
        "--allocators stock"
    ),
    "ops_fp32.csv": "dfs bench ops",
    "ops_beta.csv": (
        "dfs bench ops --ops conv2d,linear --shapes 'vgg7/*,msdnet/*,vit_tiny/*,bert/*' --backends dense,aten,cpp "
        "--layouts channels_last --beta .1,.3,.5,.7,.9 --max_seconds 10"
    ),
}

# The families' steps in both dtypes, and one as people train it, with dropout: what is run.
_BERT = (
    "--model bert --batch-size 16 --options '{config: {num_hidden_layers: 6, hidden_size: 384, "
    "intermediate_size: 1536, num_attention_heads: 12}}' --attentions fused,plain"
)
_STEPS = {
    "resnet18": "--model resnet18 --batch-size 64",
    "msdnet": "--model msdnet_cifar --batch-size 64",
    "vit_tiny": "--model vit_tiny_patch16_224 --batch-size 8 --attentions fused,plain",
    "bert": _BERT,
    "bert_dropout": f"{_BERT} --dropout true",
}
DTYPES = ("fp32", "bf16")


def step_file(name: str, dtype: str) -> str:
    """Where a family's steps are."""
    return f"train_{name}.csv" if dtype == "fp32" else f"train_{name}_{dtype}.csv"


COMMANDS |= {
    step_file(name, dtype): (
        f"dfs bench train {flags} --variants dense,split,dfs --layouts channels_last --dtypes {dtype}"
    )
    for name, flags in _STEPS.items()
    for dtype in DTYPES
}

# Where a call's own cost counts, not its arithmetic. Normalised over fewer images than these, gradients are not to be
# compared: of one image nothing is left at an exit, of two that of ResNet18's first layer is mostly rounding.
_SMALL = {"vgg7_64": "2,4,8", "resnet18": "4,8", "msdnet_cifar": "2,4,8"}
COMMANDS |= {
    f"train_small_{model}.csv": (
        f"dfs bench train --model {model} --batch-size {sizes} --variants dense,dfs --dtypes fp32 --compile off "
        "--layouts channels_last"
    )
    for model, sizes in _SMALL.items()
}

COMMANDS |= {
    f"inference_{network.name}.csv": f"dfs bench inference --run_dir runs/{network.name}" for network in NETWORKS
}

_FUSED = "best stock, its default attention"


class StepTarget(NamedTuple):
    """How much faster a step of dfs is to be than the fastest of its rivals, both in one file of results."""

    file: str
    what: str
    least: float
    aim: float
    rivals: tuple[str, ...] = STOCK_VARIANTS
    against: str = "best stock"
    dtype: str = "fp32"
    attentions: tuple[str, ...] = ("fused", "plain")


def _family(name: str, dtype: str, what: str, *ratios: tuple[str, float, float]) -> Iterator[StepTarget]:
    for against, least, aim in ratios:
        attentions = ("fused",) if against == _FUSED else ("fused", "plain")
        text = f"{what}, {dtype}"
        yield StepTarget(step_file(name, dtype), text, least, aim, against=against, dtype=dtype, attentions=attentions)


_VIT, _TEXT = "ViT-Ti step, 224 px, batch 8", "BERT (6 layers, 384) step, 16 x 128 tokens"
_STEP_TARGETS = (
    StepTarget("train_vgg7_64.csv", "VGG7-64 step, batch 100, fp32", 2.3, 2.5),
    StepTarget("train_vgg7_64.csv", "same", 1.2, 1.5, ("split", "detach"), "best `split` or `detach`"),
    StepTarget("train_vgg7_64_bf16.csv", "VGG7-64 step, batch 100, bf16 autocast", 1.7, 2.0, dtype="bf16"),
    StepTarget("train_batch.csv", "VGG7-64 step, batch 100, fp32", 1.5, 2.0, ("byot",), "BYOT on `dense`"),
    StepTarget("train_vgg16_64.csv", "VGG16-64, 224 px, batch 8, fp32", 1.25, 1.5),
    *_family("resnet18", "fp32", "ResNet18 step, batch 64", ("best stock", 1.6, 1.75)),
    *_family("resnet18", "bf16", "ResNet18 step, batch 64", ("best stock", 1.65, 1.8)),
    *_family("msdnet", "fp32", "MSDNet (CIFAR) step, batch 64", ("best stock", 1.1, 1.2)),
    *_family("msdnet", "bf16", "MSDNet (CIFAR) step, batch 64", ("best stock", 1.15, 1.4)),
    *_family("vit_tiny", "fp32", _VIT, ("best stock", 1.06, 1.1)),
    *_family("vit_tiny", "bf16", _VIT, (_FUSED, 1.25, 1.5), ("best stock", 1.05, 1.2)),
    *_family("bert", "fp32", _TEXT, ("best stock", 1.22, 1.3)),
    *_family("bert", "bf16", _TEXT, (_FUSED, 1.5, 1.8), ("best stock", 1.2, 1.4)),
    *_family("bert_dropout", "fp32", f"{_TEXT}, dropout 0.1", ("best stock", 1.45, 1.6)),
    *_family("bert_dropout", "bf16", f"{_TEXT}, dropout 0.1", (_FUSED, 1.8, 2.2), ("best stock", 1.6, 1.9)),
)
# Smaller differences are noise: of two runs of one step either may be the faster one by so much.
_NOISE = 0.03
# The least share of its attainable limit that a family's step is to reach, and the aim.
_LIMIT_LEAST, _LIMIT_AIM = 0.75, 0.85


class Line(NamedTuple):
    """One row of the table."""

    what: str
    against: str
    least: str
    aim: str
    measured: str
    is_met: bool
    file: str


def _step_line(results: Path, target: StepTarget) -> Iterator[Line]:
    every = Measurements.read(results / target.file).of(dtype=target.dtype, attention=target.attentions)
    found = compare_steps(every.of(batch_size=100) or every, target.rivals)
    if found is None:
        return
    text = f"{found.median:.2f} ({found.min:.2f}); FLOPs alone {found.flops:.2f}"
    if found.ours.allocator != "stock":
        text += f"; both on the caching allocator {found.one_allocator:.2f}"
    limits = f"{target.least:g}", f"{target.aim:g}"
    yield Line(target.what, target.against, *limits, text, found.median >= target.least, target.file)


def _dropout(one: Measurement) -> str:
    return ", dropout" if one.suite == "train_dropout" else ""


def _limit_lines(results: Path) -> Iterator[Line]:
    """How far each family's step is from what the machine could do at best."""
    for file in dict.fromkeys(target.file for target in _STEP_TARGETS):
        every = Measurements.read(results / file)
        for size in every.distinct("batch_size")[:1]:
            ours = every.of(batch_size=size, variant="dfs").fastest()
            if ours is None or LIMIT not in ours:
                continue
            reached = ours[LIMIT].median / ours[TOTAL].median
            what = f"{ours.model}, batch {ours.batch_size}, {ours.dtype}{_dropout(ours)}"
            limits = f"{_LIMIT_LEAST:g}", f"{_LIMIT_AIM:g}"
            text = f"{reached:.2f}; limit {ours[LIMIT].median * 1e3:.0f} ms"
            yield Line(what, "its attainable limit", *limits, text, reached >= _LIMIT_LEAST, file)


def _op_ratios(found: Measurements, op: str, metric: str) -> list[float]:
    """Of each shape: time of dense over that of the automatic choice, each in its best layout; medians, sorted."""
    ratios = []
    for model, shape in dict.fromkeys((one.model, one.shape) for one in found.of(op=op)):
        same = found.of(op=op, model=model, shape=shape)
        dense, own = same.of(path="dense").fastest(metric), same.of(is_automatic=True).fastest(metric)
        if dense and own:
            ratios.append(dense[metric].median / own[metric].median)
    return sorted(ratios)


def _op_lines(results: Path) -> Iterator[Line]:
    file = "ops_fp32.csv"
    found = Measurements.read(results / file)
    for op, metric, what, against, least, aim in (
        ("conv2d", "backward", "backward per conv, beta 0.5", "`dense` backward", 1.25, "1.33"),
        ("linear", "step", "partitioned linear, forward + backward, fp32", "stock `F.linear`", 1.8, "2.5"),
    ):
        ratios = _op_ratios(found, op, metric)
        if not ratios:
            continue
        enough = sum(ratio >= least for ratio in ratios)
        text = (
            f"{ratios[0]:.2f} to {ratios[-1]:.2f}, median {statistics.median(ratios):.2f}; "
            f"{enough} of {len(ratios)} shapes reach {least:g}"
        )
        yield Line(what, against, f"{least:g}", aim, text, enough == len(ratios), file)


def _beta_line(results: Path) -> Iterator[Line]:
    file = "ops_beta.csv"
    found = [one for one in Measurements.read(results / file).of(is_automatic=True) if one.beta is not None]
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
    yield Line("backward latency, beta .9 to .1", "itself", "falls monotonically", "", text, is_met, file)


def _memory_lines(results: Path) -> Iterator[Line]:
    """Of VGG7 against the eager step without surgery; of every family against the fastest stock step."""
    file = "train_vgg7_64.csv"
    found = Measurements.read(results / file).of(dtype="fp32")
    own = found.of(variant="dfs").fastest()
    dense = [one["peak_memory"].median for one in found.of(variant="dense") if one.mode.startswith("eager")]
    if own and dense:
        ratio = own["peak_memory"].median / min(dense)
        yield Line("peak memory of the step", "`dense` eager", "0.8", "0.6", f"{ratio:.2f}", ratio <= 0.8, file)
    for file in (step_file(name, dtype) for name in _STEPS for dtype in DTYPES):
        found = Measurements.read(results / file)
        ratio = compare_steps(found) if found else None
        if ratio is not None:
            peak = ratio.ours["peak_memory"].median / ratio.best["peak_memory"].median
            what = f"peak memory, {ratio.ours.model}, {ratio.ours.dtype}{_dropout(ratio.ours)}"
            text = f"{peak:.2f} of {ratio.best['peak_memory'].median / 1e6:.0f} MB"
            yield Line(what, "the fastest stock step", "1.05", "", text, peak <= 1.05, file)


def _batch_line(results: Path) -> Iterator[Line]:
    file = "train_batch.csv"
    found = Measurements.read(results / file).of(variant="dfs", dtype="fp32")
    fastest = {size: found.of(batch_size=size).fastest() for size in found.distinct("batch_size")}
    per_image = {size: one[TOTAL].median / size for size, one in fastest.items() if one}
    if not per_image:
        return
    middle = statistics.median(per_image.values())
    worst = max(abs(value / middle - 1) for value in per_image.values())
    times = ", ".join(f"{batch}: {value * 1e3:.2f}" for batch, value in per_image.items())
    text = f"{worst:.0%} at worst from the median; ms per image at batch {times}"
    yield Line("step time against batch size", "linear", "within 10 %", "", text, worst <= 0.1, file)


def _small_lines(results: Path) -> Iterator[Line]:
    """Whether the automatic choice is never slower than stock, both eager."""
    for file in (f"train_small_{model}.csv" for model in _SMALL):
        found = Measurements.read(results / file)
        ratios = {}
        for size in found.distinct("batch_size"):
            ratio = compare_steps(found.of(batch_size=size), ("dense",))
            if ratio is not None:
                ratios[size] = ratio
        if ratios:
            text = "; ".join(f"batch {size}: {one.median:.2f} ({one.min:.2f})" for size, one in ratios.items())
            is_met = all(one.median >= 1 - _NOISE for one in ratios.values())
            model = found[0].model
            yield Line(f"{model} step, small batches", "`dense`, eager", "1", "", text, is_met, file)


# (network, batch) -> how much faster the prepared full model is to be than the fastest stock form: at least, aim.
_PREPARED = {
    ("cifar10_vgg7", 64): (1.8, 2.5),
    ("cifar10_vgg7", 1): (1.0, 1.3),
    ("cifar10_resnet18", 64): (1.5, 2.0),
}


def _inference_lines(results: Path) -> Iterator[Line]:
    for network in NETWORKS:
        file = network.file(results).name
        for size in (1, 64, 256):
            found = gains(results, network, size)
            if found is None:
                continue
            what, early = f"{network.name}, batch {size}", f"early exit, {found.drop}"
            least, aim = _PREPARED.get((network.name, size), (0.0, 0.0))
            wanted = [("evaluation mode", "best stock", least, aim, found.prepared)] if least else []
            if size == 64:
                wanted.append((early, "best stock", 1.5, 3.0, found.early))
            if size == 256:
                wanted.append((early, "the gain by operations", 0.8, 0.95, found.share_of_operations))
            if size == 1:
                wanted.append((f"{early}, p50", "best stock", 1.5, 2.5, found.early))
                wanted.append((f"{early}, p95", "best stock", 0.95, 1.0, found.early_p95))
            for form, against, lowest, best, ratio in wanted:
                text = "no threshold keeps the accuracy" if ratio is None else f"{ratio:.2f}"
                is_met = ratio is not None and ratio >= lowest
                yield Line(f"{form}, {what}", against, f"{lowest:g}", f"{best:g}", text, is_met, file)


def targets_section(results: Path) -> Iterator[str]:
    """The table; lines whose file is missing are left out."""
    lines = [
        *(line for target in _STEP_TARGETS for line in _step_line(results, target)),
        *_op_lines(results),
        *_beta_line(results),
        *_limit_lines(results),
        *_memory_lines(results),
        *_batch_line(results),
        *_small_lines(results),
        *_inference_lines(results),
    ]
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
