"""Writes the measured parts of README.md and benchmarks/RESULTS.md: `python -m dfs_engine.benchmarks.readme`.

Run it at the root of a checkout. A part stands between two markers, `<!-- bench:NAME -->` and `<!-- /bench:NAME -->`;
nothing else is touched.
"""

from collections.abc import Iterator
from pathlib import Path

from dfs_engine.benchmarks.gradients import gradients_section
from dfs_engine.benchmarks.markdown import fill, link, table
from dfs_engine.benchmarks.measure import TOTAL
from dfs_engine.benchmarks.results import Measurements, compare_file
from dfs_engine.benchmarks.results_accuracy import VGG7, accuracy_section, how_it_ends, last_rows
from dfs_engine.benchmarks.results_inference import inference_section
from dfs_engine.benchmarks.results_tables import (
    families_section,
    losses_section,
    milliseconds,
    ops_section,
    train_section,
)
from dfs_engine.benchmarks.results_targets import DTYPES, missing_section, step_file, targets_section

# README's name of a family, the file of its steps.
_FAMILIES = {
    "VGG16-64, 224 px, batch 8": "vgg16_64",
    "ResNet18, 32 px, batch 64": "resnet18",
    "MSDNet (CIFAR), batch 64": "msdnet",
    "ViT-Ti, 224 px, batch 8": "vit_tiny",
    "BERT, 6 layers of 384, 16 x 128 tokens": "bert",
}


def headline(results: Path) -> Iterator[str]:
    """VGG7's step beside every stock form of it."""
    path = results / "train_vgg7_64.csv"
    found = Measurements.read(path).of(dtype="fp32")
    ours = found.of(variant="dfs").fastest()
    if ours is None:
        raise ValueError(f"results: expected a step of dfs in {path}.")
    rows = [("**dfs_engine**", f"{ours.layout}, {ours.mode}", f"**{milliseconds(ours)}**", "")]
    names = {
        "dense": "no surgery (`dense`)",
        "detach": "published formulation (`detach`)",
        "split": "two calls a layer (`split`)",
    }
    for variant, name in names.items():
        best = found.of(variant=variant, allocator="stock").fastest()
        if best:
            ratio = f"{best[TOTAL].median / ours[TOTAL].median:.2f} x"
            rows.append((name, f"{best.layout}, {best.mode}", milliseconds(best), ratio))
    yield from table(("one training step", "best form", "ms, median", "dfs_engine is faster by"), rows)
    yield ""
    yield (
        f"VGG7-64, 6 exits, 32 px, batch 100, fp32, beta 0.5, n = {ours[TOTAL].n}. {ours.conditions}; "
        f"{link(path, path.parents[2])}."
    )


def families(results: Path) -> Iterator[str]:
    """A line for each of the five families: the best stock step and ours."""
    rows, machines = [], dict[str, list[str]]()
    for name, file in _FAMILIES.items():
        ratio = compare_file(results / f"train_{file}.csv")
        best = f"{milliseconds(ratio.best)} (`{ratio.best.variant}`)"
        ratios = f"{ratio.median:.2f} ({ratio.min:.2f})", f"{ratio.one_allocator:.2f}", f"{ratio.flops:.2f}"
        rows.append((name, best, milliseconds(ratio.ours), *ratios))
        stamp = ratio.ours.stamp
        machine = f"{stamp['device_name']}, {stamp['num_threads']} threads"
        machines.setdefault(machine, []).append(name.split(" ")[0].rstrip(","))
    ratios = "times faster (by minima)", "same allocator", "FLOPs alone"
    yield from table(("one training step, fp32", "best stock, ms", "dfs_engine, ms", *ratios), rows)
    yield ""
    texts = (f"{machine} ({', '.join(names)})" for machine, names in machines.items())
    yield f"Machines: {'; '.join(texts)}."


def accuracy(results: Path) -> Iterator[str]:
    """How VGG7 ends."""
    rows = last_rows(results, VGG7)
    yield f"{VGG7.what}, after {rows['dfs']['epoch']} epochs, one run each: {how_it_ends(rows)}."


def readme_blocks(results: Path) -> dict[str, Iterator[str]]:
    """The parts of README."""
    return {"headline": headline(results), "families": families(results), "accuracy": accuracy(results)}


def results_blocks(results: Path) -> dict[str, Iterator[str]]:
    """The parts of RESULTS.md."""
    steps = [results / f"train_{name}.csv" for name in ("vgg7_64", "vgg7_64_bf16", "vgg16_64")]
    families = [*list(_FAMILIES.values())[1:], "bert_dropout"]
    others = [results / step_file(name, dtype) for name in families for dtype in DTYPES]
    return {
        "targets": targets_section(results),
        "missing": missing_section(results),
        "train": (line for path in steps for line in train_section(path)),
        "families": families_section(others),
        "gradients": (
            line for name in ("vgg7_64", "msdnet") for line in gradients_section(results / f"gradients_{name}.csv")
        ),
        "ops": ops_section(results / "ops_fp32.csv"),
        "losses": losses_section(results / "ops_fp32.csv"),
        "accuracy": accuracy_section(results),
        "inference": inference_section(results),
    }


def render(root: Path) -> dict[Path, str]:
    """The documents of a checkout as they should be, by their paths."""
    results = root / "benchmarks/results"
    blocks = {
        root / "README.md": readme_blocks(results),
        root / "benchmarks/RESULTS.md": results_blocks(results),
    }
    texts = {}
    for path, parts in blocks.items():
        text = path.read_text()
        for name, lines in parts.items():
            text = fill(text, name, lines)
        texts[path] = text
    return texts


def main() -> None:
    for path, text in render(Path()).items():
        path.write_text(text)


if __name__ == "__main__":
    main()
