"""Accuracy of every exit in the recorded training runs, each variant beside the others."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from dfs_engine.benchmarks.markdown import link, table
from dfs_engine.benchmarks.measure import read_csv

_ENSEMBLE = "test_top1_ensemble"


class TrainedRuns(NamedTuple):
    """Recorded runs of one recipe, `<name>_<variant>_metrics.csv` in benchmarks/results/."""

    name: str
    what: str
    recipe: str
    note: str = ""


_CIFAR10 = "CIFAR-10 (real, 50,000 training and 10,000 test images)"
_PAUSED = "The seconds in these files count pauses, too, in which the machine measured something else."
VGG7 = TrainedRuns("cifar10_vgg7", f"VGG7-64 on {_CIFAR10}", "cifar10_vgg7_short")
_TRAINED = (
    VGG7,
    TrainedRuns("cifar10_resnet18", f"ResNet18 on {_CIFAR10}", "cifar10_resnet18_short", _PAUSED),
    TrainedRuns(
        "cifar10_msdnet",
        f"MSDNet on {_CIFAR10}",
        "cifar10_msdnet_short",
        f"`dfs` with `--precision bf16`, on another machine. {_PAUSED}",
    ),
    TrainedRuns(
        "sst2_bert",
        "BERT (6 layers, pretrained MiniLM) on SST-2 (real; of 67,349 training sentences 8,000 in each epoch, drawn "
        "anew; 872 validation sentences)",
        "sst2_bert_dfs",
        "Exits at 50.92 answer with the more frequent class: the first token of this pretrained model's shallow layers "
        "says little about a sentence, with surgery and without.",
    ),
)


def accuracy_section(results: Path) -> Iterator[str]:
    """A table for each recipe, and how `dfs` ends beside `dense`."""
    for runs in _TRAINED:
        rows = last_rows(results, runs)
        if not rows:
            continue
        first = next(iter(rows.values()))
        exits = exits_of(first)
        parts = (
            f"{runs.what}, {first['epoch']} epochs, seed 0, one run each, test top-1 in per cent after the last epoch.",
            runs.note,
            f"`dfs train --config {runs.recipe} --model.variant VARIANT --data.root DIR`",
        )
        yield " ".join(filter(None, parts))
        yield ""
        yield from table(
            ("variant", *(f"exit {name.removeprefix('test_top1_exit')}" for name in exits), "ensemble", "file"),
            (
                (
                    variant,
                    *(f"{float(row[name]):.2f}" for name in (*exits, _ENSEMBLE)),
                    link(_file(results, runs, variant), results.parent),
                )
                for variant, row in rows.items()
            ),
        )
        yield ""
        if {"dense", "dfs"} <= rows.keys():
            yield f"After these {first['epoch']} epochs {how_it_ends(rows)}."
            yield ""


def last_rows(results: Path, runs: TrainedRuns) -> dict[str, dict[str, str]]:
    """By variant: the metrics after the last epoch."""
    rows = {}
    for path in sorted(results.glob(f"{runs.name}_*_metrics.csv")):
        rows[path.name.removeprefix(f"{runs.name}_").removesuffix("_metrics.csv")] = read_csv(path)[-1]
    return rows


def exits_of(row: dict[str, str]) -> list[str]:
    """Columns of the exits' accuracy, shallow to deep."""
    return [name for name in row if re.fullmatch(r"test_top1_exit\d+", name)]


def how_it_ends(rows: dict[str, dict[str, str]]) -> str:
    """`dfs` beside `dense` at the last exit, in words."""
    last = exits_of(rows["dense"])[-1]
    ours, dense = (float(rows[variant][last]) for variant in ("dfs", "dense"))
    place = "level with" if round(ours, 2) == round(dense, 2) else "below" if ours < dense else "above"
    return f"`dfs` ends {place} `dense` at the last exit, {ours:.2f} against {dense:.2f} %"


def _file(results: Path, runs: TrainedRuns, variant: str) -> Path:
    return results / f"{runs.name}_{variant}_metrics.csv"
