"""Writes the measured tables of README.md from benchmarks/results/: `python -m dfs_engine.benchmarks.readme`.

Each table stands between two markers, `<!-- bench:NAME -->` and `<!-- /bench:NAME -->`; nothing else is touched.
"""

import csv
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from .readme_data import Case, best_of, cases, compare, conditions, latest, link
from .readme_targets import COMMANDS, FAMILIES, losses_section, ops_section, targets_section

RESULTS = Path("benchmarks/results")
README = Path("README.md")


def train_table(found: list[Case]) -> Iterator[str]:
    """Every case, its ratios to the best `dense` and the best stock one, and the ceiling that FLOPs allow."""
    dense, best = best_of(found, ("dense",)), best_of(found)
    if dense is None or best is None:
        raise ValueError("README: expected dense on stock memory among the training steps of a table.")
    yield (
        "| variant | layout | mode | forward ms | backward ms | step ms, median (min) "
        "| vs best `dense` (FLOP ceiling) | vs best stock | the same on one allocator | peak MB | n |"
    )
    yield "|---|---|---|---|---|---|---|---|---|---|---|"
    for case in found:
        name = f"**dfs** ({case.backend})" if case.variant == "dfs" else case.variant
        same = best_of(found, allocator=case.allocator) or best
        milliseconds = [f"{case.value(phase) * 1e3:.0f}" for phase in ("forward", "backward", "step")]
        cells = [
            *(name, case.layout, case.mode, *milliseconds[:2]),
            f"{milliseconds[2]} ({case.value('step', 'min') * 1e3:.0f})",
            f"{dense.value('step') / case.value('step'):.2f} ({dense.flops / case.flops:.2f})",
            f"{best.value('step') / case.value('step'):.2f}",
            f"{same.value('step') / case.value('step'):.2f}",
            *(f"{case.value('peak_memory') / 1e6:.0f}", case.metrics["step"]["n"]),
        ]
        yield f"| {' | '.join(cells)} |"


def families_section() -> Iterator[str]:
    """One line per family and dtype: every formulation in its best form."""
    paths = [path for path in map(RESULTS.joinpath, FAMILIES) if path.exists()]
    if not paths:
        return
    yield "The other families (caching: on the memory that `dfs train` keeps from step to step):"
    yield ""
    yield (
        "| model, batch | dtype | `dense` | `dense`, caching | `split` or `detach` | **dfs** | **dfs**, caching "
        "| dfs vs best stock, medians (minima) | the same on one allocator | FLOP ceiling | n | file |"
    )
    yield "|---" * 12 + "|"
    for path in paths:
        row = latest(path)[0]
        found = cases(latest(path), row["dtype"])
        ratio = compare(found)
        if ratio is None:
            raise ValueError(f"README: expected dfs, and stock forms on both allocators, in {path}.")
        forms = (
            *((("dense",), "stock"), (("dense",), "caching"), (("split", "detach"), "stock")),
            *((("dfs",), "stock"), (("dfs",), "caching")),
        )
        times = [f"{form.value('step') * 1e3:.0f}" if (form := best_of(found, *key)) else "-" for key in forms]
        cells = [
            *(f"{row['model']}, {ratio.ours.batch}", row["dtype"], *times),
            *(f"{ratio.median:.2f} ({ratio.min:.2f})", f"{ratio.one_allocator:.2f}", f"{ratio.flops:.2f}"),
            *(ratio.ours.metrics["step"]["n"], link(path)),
        ]
        yield f"| {' | '.join(cells)} |"
    yield ""
    yield "Milliseconds a step, medians, every formulation in its best mode. Each file's conditions:"
    yield ""
    for path in paths:
        yield f"- {conditions(latest(path)[0], path)}"


def train_section(path: Path) -> Iterator[str]:
    rows = latest(path)
    shape = rows[0]["shape"]
    for dtype in dict.fromkeys(row["dtype"] for row in rows):
        of_dtype = [row for row in rows if row["dtype"] == dtype]
        yield f"Training step, {rows[0]['model']}, input {shape}, {dtype}, beta 0.5. {conditions(of_dtype[0], path)}"
        yield ""
        yield from train_table(cases(rows, dtype))
        yield ""
        # A run of its own, where the long one was disturbed at its end.
        source = path.with_name(f"{path.stem}_breakdown.csv")
        source = source if source.exists() else path
        profiled = cases(latest(source), dtype)
        breakdown = next((case for case in profiled if case.kernels and case.variant == "dfs"), None)
        if breakdown:
            total = sum(breakdown.kernels.values())
            parts = ", ".join(f"{kind} {seconds / total:.0%}" for kind, seconds in breakdown.kernels.items())
            command = f" `{COMMANDS[source.name]} --output {source}`" if source is not path else ""
            yield f"One `dfs` step by kernel (profiler, CPU time): {parts}. {link(source)}{command}."
            yield ""


class TrainedRuns(NamedTuple):
    """Recorded runs of one recipe, `<name>_<variant>_metrics.csv` in benchmarks/results/."""

    name: str
    what: str
    recipe: str
    note: str


_CIFAR10 = "CIFAR-10 (real, 50,000 training and 10,000 test images)"
_PAUSED = "The seconds in these files count pauses, too, in which the machine measured something else."
_TRAINED = (
    TrainedRuns(
        "cifar10_vgg7",
        f"VGG7-64 on {_CIFAR10}",
        "cifar10_vgg7_short",
        "Few epochs show that it learns, not what it reaches.",
    ),
    TrainedRuns("cifar10_resnet18", f"ResNet18 on {_CIFAR10}", "cifar10_resnet18_short", _PAUSED),
    TrainedRuns(
        "cifar10_msdnet",
        f"MSDNet on {_CIFAR10}",
        "cifar10_msdnet_short",
        f"`dfs` with `--precision bf16`, on another machine. {_PAUSED}",
    ),
    TrainedRuns("cifar10_vit_tiny", f"A small ViT on {_CIFAR10}", "cifar10_vit_tiny_short", _PAUSED),
    TrainedRuns(
        "sst2_bert",
        "BERT (6 layers, pretrained MiniLM) on SST-2 (real; of 67,349 training sentences 8,000 in each epoch, drawn "
        "anew; 872 validation sentences)",
        "sst2_bert_dfs",
        "Exits at 50.92 answer with the more frequent class: the first token of this pretrained model's shallow layers "
        "says little about a sentence, with surgery and without.",
    ),
)


def accuracy_section() -> Iterator[str]:
    """Accuracy of every exit in the recorded runs, each variant beside the others."""
    for runs in _TRAINED:
        yield from _accuracy_table(runs)


def _accuracy_table(runs: TrainedRuns) -> Iterator[str]:
    paths = sorted(RESULTS.glob(f"{runs.name}_*_metrics.csv"))
    if not paths:
        return
    rows = {}
    for path in paths:
        with path.open(newline="") as file:
            *_, rows[path] = csv.DictReader(file)
    last = rows[paths[0]]
    exits = [name for name in last if re.fullmatch(r"test_top1_exit\d+", name)]
    yield (
        f"{runs.what}, {last['epoch']} epochs, seed 0, one run each, test top-1 in per cent after the last epoch. "
        f"{runs.note} `dfs train --config {runs.recipe} --model.variant VARIANT --data.root DIR`"
    ).replace("  ", " ")
    yield ""
    header = [f"exit {name.removeprefix('test_top1_exit')}" for name in exits]
    yield f"| variant | {' | '.join(header)} | ensemble | file |"
    yield "|---" * (len(header) + 3) + "|"
    for path, row in rows.items():
        values = [f"{float(row[name]):.2f}" for name in [*exits, "test_top1_ensemble"]]
        variant = path.name.removeprefix(f"{runs.name}_").removesuffix("_metrics.csv")
        yield f"| {variant} | {' | '.join(values)} | {link(path)} |"
    yield ""


def headline_section(path: Path) -> Iterator[str]:
    rows = latest(path)
    found = cases(rows, "fp32")
    ours = next(case for case in found if case.variant == "dfs")
    yield "| one training step | best form | ms, median | dfs_engine is faster by |"
    yield "|---|---|---|---|"
    yield f"| **dfs_engine** | {ours.layout}, {ours.mode} | **{ours.value('step') * 1e3:.0f}** | |"
    names = {
        "dense": "no surgery (`dense`)",
        "detach": "published formulation (`detach`)",
        "split": "two calls a layer (`split`)",
    }
    for variant, name in names.items():
        best = best_of(found, (variant,))
        if best:
            ratio = best.value("step") / ours.value("step")
            yield f"| {name} | {best.layout}, {best.mode} | {best.value('step') * 1e3:.0f} | {ratio:.2f} x |"
    first = next(row for row in rows if row["dtype"] == "fp32")
    yield ""
    rounds = ours.metrics["step"]["n"]
    yield f"VGG7-64, 6 exits, 32 px, batch 100, fp32, beta 0.5, n = {rounds}. {conditions(first, path)}"


def fill(text: str, name: str, lines: Iterator[str]) -> str:
    """`text` with the block `name` replaced."""
    start, end = f"<!-- bench:{name} -->", f"<!-- /bench:{name} -->"
    before, found, rest = text.partition(start)
    _, closed, after = rest.partition(end)
    if not found or not closed:
        raise ValueError(f"README: expected the markers {start} and {end}.")
    return f"{before}{start}\n{chr(10).join(lines).rstrip()}\n{end}{after}"


def main() -> None:
    train = RESULTS / "train_vgg7_64.csv"
    text = README.read_text()
    text = fill(text, "headline", headline_section(train))
    text = fill(text, "targets", targets_section(RESULTS))
    tables = [RESULTS / f"train_{name}.csv" for name in ("vgg7_64", "vgg7_64_bf16", "vgg16_64")]
    text = fill(text, "train", (line for path in tables if path.exists() for line in train_section(path)))
    text = fill(text, "families", families_section())
    text = fill(text, "ops", ops_section(RESULTS))
    text = fill(text, "losses", losses_section(RESULTS))
    text = fill(text, "accuracy", accuracy_section())
    README.write_text(text)


if __name__ == "__main__":
    main()
