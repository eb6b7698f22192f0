"""README's table of targets and of losses, from the files that the commands in `COMMANDS` write."""

import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from .readme_data import STOCK, Row, cases, compare, latest, link

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
FAMILIES = tuple(f"train_{name}{suffix}.csv" for name in _STEPS for suffix in ("", "_bf16"))
COMMANDS |= {
    f"train_{name}{suffix}.csv": (
        f"dfs bench train {_STEPS[name][0]} --variants dense,split,dfs --layouts channels_last --dtypes {dtype}"
    )
    for name in _STEPS
    for suffix, dtype in (("", "fp32"), ("_bf16", "bf16"))
}


class Op(NamedTuple):
    """All measurements of one op on one shape in one layout, by one path, with one beta (None: unsplit)."""

    op: str
    shape: str
    path: str
    layout: str
    beta: float | None
    metrics: dict[str, Row]

    def value(self, metric: str, statistic: str = "median") -> float:
        return float(self.metrics[metric][statistic])

    @property
    def is_automatic(self) -> bool:
        return "automatic" in self.metrics and self.value("automatic") == 1


def ops(path: Path) -> list[Op]:
    """The newest measurement of each case in a file of `dfs bench ops`."""
    groups: dict[tuple[str, ...], dict[str, Row]] = {}
    for row in latest(path):
        if row["op"] == "machine":
            continue
        variant = row["backend_used"] if row["variant"] == "dfs" else row["variant"]
        key = (row["op"], f"{row['model']} {row['shape']}", variant, row["case"])
        groups.setdefault(key, {})[row["metric"]] = row
    found = []
    for (op, shape, variant, case), metrics in groups.items():
        beta, _, layout = case.rpartition("/")
        found.append(Op(op, shape, variant, layout, float(beta.removeprefix("beta=")) if beta else None, metrics))
    return found


def _fastest(found: list[Op], metric: str) -> Op | None:
    return min(found, key=lambda one: one.value(metric), default=None)


def op_ratios(found: list[Op], op: str, metric: str) -> dict[str, float]:
    """By shape: time of dense over that of the automatic choice, each in its best layout; medians."""
    ratios = {}
    for shape in dict.fromkeys(one.shape for one in found if one.op == op):
        same = [one for one in found if one.op == op and one.shape == shape]
        dense = _fastest([one for one in same if one.path == "dense"], metric)
        own = _fastest([one for one in same if one.is_automatic], metric)
        if dense and own:
            ratios[shape] = dense.value(metric) / own.value(metric)
    return ratios


def losses(found: list[Op], rivals: tuple[str, ...]) -> Iterator[str]:
    """Where the automatic choice's forward + backward is slower beyond noise (p20 above p80), in the same layout."""
    for own in found:
        for rival in found:
            same = (own.op, own.shape, own.layout) == (rival.op, rival.shape, rival.layout)
            same = same and rival.beta in (None, own.beta) and own.is_automatic and rival.path in rivals
            if same and rival.path != own.path and own.value("step", "p20") > rival.value("step", "p80"):
                ours, theirs = own.value("step") * 1e3, rival.value("step") * 1e3
                where = f"{own.op} {own.shape} {own.layout} ({own.path})"
                yield f"{where}: {ours:.2f} ms against {rival.path}'s {theirs:.2f}"


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
    every = cases(latest(path), dtype)
    found = compare([case for case in every if case.batch == 100] or every, rivals)
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
    found = ops(path)
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
    found = [one for one in ops(path) if one.is_automatic and one.beta is not None]
    curves = {
        shape: [one.value("backward") for one in sorted(found, key=lambda one: one.beta or 0) if one.shape == shape]
        for shape in dict.fromkeys(one.shape for one in found)
    }
    if not curves:
        return
    falls = [shape for shape, times in curves.items() if times == sorted(times)]
    spans = [times[0] / times[-1] for times in curves.values()]
    text = (
        f"on {len(falls)} of {len(curves)} shapes; time at 0.1 over that at 0.9: "
        f"{min(spans):.2f} to {max(spans):.2f}, median {statistics.median(spans):.2f}"
    )
    is_met = len(falls) == len(curves)
    yield Line("backward latency, beta .9 to .1", "itself", "falls monotonically", "", text, is_met, path.name)


def _memory_line(results: Path) -> Iterator[Line]:
    path = results / "train_vgg7_64.csv"
    if not path.exists():
        return
    found = cases(latest(path), "fp32")
    own = next((case for case in found if case.variant == "dfs"), None)
    dense = [case.value("peak_memory") for case in found if case.variant == "dense" and case.mode.startswith("eager")]
    if own and dense:
        ratio = own.value("peak_memory") / min(dense)
        yield Line("peak memory of the step", "`dense` eager", "0.8", "0.6", f"{ratio:.2f}", ratio <= 0.8, path.name)


def _batch_line(results: Path) -> Iterator[Line]:
    path = results / "train_batch.csv"
    if not path.exists():
        return
    # Of each batch size the fastest form, which comes first.
    found = {case.batch: case for case in reversed(cases(latest(path), "fp32")) if case.variant == "dfs"}
    per_image = {batch: case.value("step") / batch for batch, case in sorted(found.items())}
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
    yield "| what | against | at least | aim | measured: ratio of medians (of minima) | reached | file |"
    yield "|---|---|---|---|---|---|---|"
    for line in lines:
        cells = (*line[:5], "yes" if line.is_met else "**no**", link(results / line.file))
        yield f"| {' | '.join(cells)} |"
    yield ""
    for file in dict.fromkeys(line.file for line in lines):
        yield f"- `{COMMANDS[file]} --output {results / file}`"


def losses_section(results: Path) -> Iterator[str]:
    """Every benchmarked op on which the automatic choice is slower than stock or than `aten`."""
    path = results / "ops_fp32.csv"
    if not path.exists():
        return
    found = ops(path)
    shapes = len({(one.op, one.shape, one.layout) for one in found})
    for rivals, name in ((("dense", "detach"), "stock"), (("aten",), "`aten`")):
        lost = list(losses(found, rivals))
        yield (
            f"Slower than {name} beyond noise (p20 above p80) in the same layout, forward + backward, of {shapes} "
            f"combinations of shape and layout in {link(path)}: {'none.' if not lost else ''}"
        )
        yield ""
        yield from (f"- {text}" for text in lost)
        yield ""


def ops_section(results: Path) -> Iterator[str]:
    """What wins where: each op and shape in its best layout."""
    path = results / "ops_fp32.csv"
    if not path.exists():
        return
    found = ops(path)
    yield "| op | shape | `auto` takes | backward vs `dense` | forward + backward vs `dense` | vs `detach` |"
    yield "|---|---|---|---|---|---|"
    for op in ("conv2d", "conv_block", "linear"):
        for shape in dict.fromkeys(one.shape for one in found if one.op == op):
            same = [one for one in found if one.op == op and one.shape == shape]
            own = _fastest([one for one in same if one.is_automatic], "step")
            if own is None:
                continue
            ratios = []
            for rival, metric in (("dense", "backward"), ("dense", "step"), ("detach", "step")):
                best = _fastest([one for one in same if one.path == rival], metric)
                mine = _fastest([one for one in same if one.is_automatic], metric)
                ratios.append(f"{best.value(metric) / mine.value(metric):.2f}" if best and mine else "-")
            yield f"| {op} | {shape} | {own.path} | {' | '.join(ratios)} |"
