"""What trained networks say at each exit, and how fast they run: from `dfs eval` and `dfs bench inference`."""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from dfs_engine.benchmarks.markdown import link, table
from dfs_engine.benchmarks.measure import TOTAL, read_csv
from dfs_engine.benchmarks.results import Measurement, Measurements

# What a class may be worse by on the test samples and still count as the full model's accuracy.
_SAME_ACCURACY = 0.002


class Network(NamedTuple):
    """A trained network: its folder in benchmarks/results/eval/, the file `inference_<name>.csv`, and its training."""

    name: str
    what: str
    training: str

    def file(self, results: Path) -> Path:
        return results / f"inference_{self.name}.csv"

    def folder(self, results: Path) -> Path:
        return results / "eval" / self.name

    @property
    def commands(self) -> list[str]:
        """Training, evaluation, timing; in a checkout, on a machine with the data."""
        run = f"runs/{self.name}"
        return [
            f"dfs train {self.training} --data.val_fraction 0.1 --data.root DIR --run_dir {run}",
            f"dfs eval {run} --output benchmarks/results/eval/{self.name}",
            f"dfs bench inference --run_dir {run} --output benchmarks/results/inference_{self.name}.csv",
        ]


NETWORKS = (
    Network("cifar10_vgg7", "VGG7-64 on CIFAR-10", "--config cifar10_vgg7_short --epochs 15"),
    Network("cifar10_resnet18", "ResNet18 on CIFAR-10", "--config cifar10_resnet18_short --epochs 7"),
    Network("cifar10_msdnet_small", "A small MSDNet on CIFAR-10", "--config cifar10_msdnet_small"),
    Network(
        "sst2_bert",
        "BERT (6 layers, pretrained MiniLM) on all of SST-2's training sentences",
        "--config sst2_bert_dfs --epochs 2 --optim.lr 2e-4 --data.max_train null",
    ),
)


def inference_section(results: Path) -> Iterator[str]:
    """Of each network what its exits say, its picture, and its times; nothing of those that were not trained."""
    for network in NETWORKS:
        if network.folder(results).is_dir():
            yield from _exits(results, network)
        if network.file(results).exists():
            yield from _times(results, network)
        if network.folder(results).is_dir():
            yield from (f"- `{command}`" for command in network.commands)
            yield ""


def _exits(results: Path, network: Network) -> Iterator[str]:
    folder, document = network.folder(results), results.parent
    yield f"**{network.what}** (real data), `dfs`, one run; test samples in per cent, temperatures from held-out ones:"
    yield ""
    rows = [row for row in read_csv(folder / "exits.csv") if row["data"] == "test" and row["exit"] != "ensemble"]
    header = ("exit", "million operations", "top-1", "ECE", "temperature", "ECE at it")
    yield from table(
        header,
        (
            (
                row["exit"],
                f"{float(row['operations']) / 1e6:.1f}",
                f"{float(row['top1']):.2f}",
                *(f"{float(row[name]):.2f}" for name in ("ece", "temperature", "ece_at_temperature")),
            )
            for row in rows
        ),
    )
    yield ""
    files = ", ".join(link(folder / name, document) for name in ("exits.csv", "budgeted.csv", "per_sample.safetensors"))
    yield f"Accuracy of the 40 budgets against mean operations and time; {files}:"
    yield ""
    picture = (folder / "accuracy.png").relative_to(document).as_posix()
    yield f"![{network.what}: accuracy against operations]({picture})"
    yield ""


def _times(results: Path, network: Network) -> Iterator[str]:
    path = network.file(results)
    found = Measurements.read(path)
    conditions = found[0].conditions.removesuffix("; synthetic data")
    yield f"Samples in real order of drawing, {conditions}; {link(path, results.parent)}."
    yield ""
    rows = []
    for size in found.distinct("batch_size"):
        same = found.of(batch_size=size)
        stock, prepared = same.of(variant="stock").fastest(), same.of(variant="prepared").fastest()
        for one in (stock, *same.of(variant="model"), prepared, *same.of(variant="early exit")):
            if one is not None:
                rows.append(_time_cells(one, stock, prepared))
    header = (
        *("batch", "form", "samples a second", "p50 ms", "p95 ms", "accuracy %"),
        *("vs best stock, medians (minima)", "vs the prepared model", "by operations"),
    )
    yield from table(header, rows)
    yield ""


def _time_cells(one: Measurement, stock: Measurement | None, prepared: Measurement | None) -> tuple[object, ...]:
    name = {"stock": f"best stock: {one.mode}, {one.layout or 'tokens'}", "model": "as trained"}.get(
        one.variant, f"{one.variant}{f', {one.mode}' if one.variant == 'early exit' else ''}"
    )
    gains = ["-", "-", "-"]
    if stock:
        gains[0] = f"{stock[TOTAL].median / one[TOTAL].median:.2f} ({stock[TOTAL].min / one[TOTAL].min:.2f})"
    if prepared and one.variant == "early exit":
        gains[1] = f"{prepared[TOTAL].median / one[TOTAL].median:.2f}"
        gains[2] = f"{prepared['operations'].median / one['operations'].median:.2f}"
    return (
        one.batch_size, name, f"{one['throughput'].median:.0f}", f"{one[TOTAL].median * 1e3:.2f}",
        f"{one['p95'].median * 1e3:.2f}", f"{100 * one['accuracy'].median:.2f}" if "accuracy" in one else "-", *gains,
    )  # fmt: skip


class Gains(NamedTuple):
    """Ratios of one network's inference; None where that was not measured."""

    prepared: float | None
    early: float | None
    share_of_operations: float | None
    early_p95: float | None
    drop: str


def gains(results: Path, network: Network, batch_size: int) -> Gains | None:
    """Of the prepared model, and of the fastest early exit that keeps the full model's accuracy on the test samples."""
    found = Measurements.read(network.file(results)).of(batch_size=batch_size)
    stock, prepared = found.of(variant="stock").fastest(), found.of(variant="prepared").fastest()
    if stock is None or prepared is None:
        return None
    same = [
        one
        for one in found.of(variant="early exit")
        if one["accuracy"].median >= prepared["accuracy"].median - _SAME_ACCURACY
    ]
    best = min(same, key=lambda one: one[TOTAL].median, default=None)
    full = stock[TOTAL].median / prepared[TOTAL].median
    if best is None:
        return Gains(full, None, None, None, "")
    gain = prepared[TOTAL].median / best[TOTAL].median
    by_operations = prepared["operations"].median / best["operations"].median
    return Gains(
        prepared=full,
        early=stock[TOTAL].median / best[TOTAL].median,
        share_of_operations=gain / by_operations,
        early_p95=stock["p95"].median / best["p95"].median,
        drop=best.mode,
    )
