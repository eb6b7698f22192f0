"""Writes the measured tables of README.md from benchmarks/results/: `python -m dfs_engine.benchmarks.readme`.

Each table stands between two markers, `<!-- bench:NAME -->` and `<!-- /bench:NAME -->`; nothing else is touched.
"""

import csv
import re
from collections.abc import Iterator
from pathlib import Path

from .readme_data import Case, best_of, cases, conditions, latest, link
from .readme_targets import losses_section, ops_section, targets_section

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
            yield f"One `dfs` step by kernel (profiler, CPU time): {parts}. {link(source)}."
            yield ""


def accuracy_section() -> Iterator[str]:
    """Per-exit accuracy of the recorded CIFAR-10 runs."""
    runs = sorted(RESULTS.glob("cifar10_vgg7_*_metrics.csv"))
    header: list[str] = []
    for path in runs:
        with path.open(newline="") as file:
            rows = list(csv.DictReader(file))
        last = rows[-1]
        exits = [name for name in last if re.fullmatch(r"test_top1_exit\d+", name)]
        if not header:
            header = [f"exit {name.removeprefix('test_top1_exit')}" for name in exits] + ["ensemble"]
            yield (
                "VGG7-64 on CIFAR-10 (real, 50,000 training and 10,000 test images), "
                f"{last['epoch']} epochs, seed 0, one run each, "
                "test top-1 in per cent after the last epoch. Three epochs show that it learns, not what it reaches. "
                "`dfs train --config configs/cifar10_vgg7_short.yaml --model.variant VARIANT --data.root DIR`"
            )
            yield ""
            yield f"| variant | {' | '.join(header)} | file |"
            yield "|---" * (len(header) + 2) + "|"
        values = [f"{float(last[name]):.2f}" for name in [*exits, "test_top1_ensemble"]]
        variant = path.name.removeprefix("cifar10_vgg7_").removesuffix("_metrics.csv")
        yield f"| {variant} | {' | '.join(values)} | {link(path)} |"


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
    text = fill(text, "ops", ops_section(RESULTS))
    text = fill(text, "losses", losses_section(RESULTS))
    text = fill(text, "accuracy", accuracy_section())
    README.write_text(text)


if __name__ == "__main__":
    main()
