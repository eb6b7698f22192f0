"""What a run leaves behind for people: metrics as CSV, a plot, TensorBoard events, and what it ran on."""

import contextlib
import csv
import os
import platform
import subprocess
import threading
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from dfs_engine.evaluation.metrics import TITLES
from dfs_engine.models.weights import describe_model
from dfs_engine.runtime.doctor import version_of
from dfs_engine.runtime.files import atomic_file, write_text
from dfs_engine.runtime.machine import cpu_and_instructions

Row = dict[str, float]


def title(model: dict[str, Any]) -> str:
    """A model as logs and plots name it, by its `get_config`; a dense one has no use for beta."""
    surgery = "" if model["variant"] == "dense" else f", beta {model['beta']:g}"
    return f"{describe_model(model)} ({model['variant']}{surgery})"


def counted(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def metrics_row(results: dict[str, dict[str, Any]], train_losses: Sequence[float]) -> Row:
    """One epoch's columns from the `ExitMetrics.compute` of each of `DataSplits.measured` and the training losses."""
    row = {f"train_loss_exit{index}": loss for index, loss in enumerate(train_losses, start=1)}
    for split, result in results.items():
        named = [(f"exit{index}", values) for index, values in enumerate(result["exits"], start=1)]
        for name, values in [*named, ("ensemble", result["ensemble"])]:
            row |= {f"{split}_{metric}_{name}": value for metric, value in values.items()}
    return row


def write_csv(path: Path, rows: Sequence[Row]) -> None:
    """Writes one line per row, replacing what was there."""
    with atomic_file(path) as partial, partial.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[-1]))
        writer.writeheader()
        writer.writerows(rows)


def plot_metric(path: Path, rows: Sequence[Row], metric: str, *, title: str) -> None:
    """Draws each exit's and the ensemble's `metric` on the test data (see `ExitMetrics`) against the epoch."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    columns = [name for name in rows[0] if name.startswith(f"test_{metric}_")]
    # Not pyplot: it would pick a windowing backend and keep global state.
    figure = Figure(figsize=(8, 5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot(xlabel="epoch", ylabel=f"test {TITLES[metric]} (%)", title=title)
    epochs = [row["epoch"] for row in rows]
    num_exits = len(columns) - 1
    for index, column in enumerate(columns):
        is_ensemble = index == num_exits
        label = "ensemble" if is_ensemble else f"exit {index + 1}"
        style: dict[str, Any] = (
            {"color": "black", "linestyle": "--"} if is_ensemble else {"color": _shade(index, num_exits)}
        )
        values = [row[column] for row in rows]
        axes.plot(epochs, values, marker="o", markersize=3, label=f"{label}: {values[-1]:.2f} %", **style)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.set_xlim(epochs[0] - 0.5, epochs[-1] + 0.5)
    # Per cent: the margin around the curves ends a little beyond 100 and, but for correlations below it, 0.
    lowest, highest = axes.get_ylim()
    axes.set_ylim(max(lowest, min(0.0, min(row[name] for row in rows for name in columns)) - 1), min(highest, 101))
    axes.grid(alpha=0.3)
    axes.legend(title="last epoch", loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    with atomic_file(path) as partial:
        figure.savefig(partial, dpi=120, format="png")


def _shade(index: int, num_exits: int) -> Any:
    from matplotlib import colormaps

    return colormaps["viridis"](0.9 * index / max(1, num_exits - 1))


@contextlib.contextmanager
def event_writer(folder: Path | None, step: int) -> Iterator[Any]:
    """TensorBoard's writer of a run that has done `step` steps; None without a folder."""
    if folder is None:
        yield None
        return
    from torch.utils.tensorboard import SummaryWriter

    # Its thread prints what fails there, a full disk say, and raises it here with the next event too: once is enough.
    hook = threading.excepthook
    threading.excepthook = lambda args: None if isinstance(args.exc_value, OSError) else hook(args)
    try:
        # purge_step: what an interrupted run wrote after its last checkpoint is written again.
        with SummaryWriter(folder, purge_step=step + 1) as writer:
            yield writer
    finally:
        threading.excepthook = hook


@contextlib.contextmanager
def wandb_run(run_dir: Path | None, config: dict[str, Any]) -> Iterator[Any]:
    """accelerate's tracker of Weights & Biases; None without a folder. A resumed run goes on as the same one there."""
    if run_dir is None:
        yield None
        return
    from accelerate.tracking import WandBTracker

    folder = run_dir / "wandb"
    folder.mkdir(exist_ok=True)
    identity = folder / "id.txt"
    if not identity.is_file():
        write_text(identity, uuid.uuid4().hex[:8])
    names = {"name": run_dir.name, "id": identity.read_text(), "resume": "allow"}
    tracker = WandBTracker("dfs_engine", dir=str(run_dir), config=config, **names)
    tracker.start()
    try:
        yield tracker
    finally:
        tracker.finish()


def environment(device: torch.device, num_processes: int) -> dict[str, Any]:
    """Versions and machine of this run, for its folder."""
    packages = ("dfs_engine", "torch", "torchvision", "timm", "transformers", "accelerate", "numpy")
    return {
        "python": platform.python_version(),
        "versions": {package: version_of(package) or "not installed" for package in packages},
        "git_sha": _git_sha(),
        "platform": platform.platform(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_and_instructions(),
        "num_processes": num_processes,
        "num_threads": torch.get_num_threads(),
        "num_cpus": os.cpu_count(),
    }


def _git_sha() -> str | None:
    """Commit of the checkout that this package runs from; None for an installed wheel."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
