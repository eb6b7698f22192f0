"""`dfs conflicts`: in which directions the exits' gradients point, of saved weights, and while a run trains."""

import csv
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dfs_engine.checks import check_choice, check_numbers
from dfs_engine.data import DataSplits, load_data
from dfs_engine.data.config import DataConfig
from dfs_engine.evaluation.conflicts import (
    ConflictSummary,
    PairConflict,
    check_has_conflicts,
    measure_conflicts,
    summarise,
)
from dfs_engine.models import MultiExitModel
from dfs_engine.runtime.files import atomic_file
from dfs_engine.runtime.progress_bar import progress_bar
from dfs_engine.training.batches import EpochBatches, to_device, train_loader, worker_deaths
from dfs_engine.training.config import DEVICES, ModelConfig, TrainConfig
from dfs_engine.training.report import title

FOLDER = "conflicts"
"""In a run's folder: what both the command and a training run write."""
_BATCHES = 8
_TEXTS = ("source", "level", "block", "parameter", "kind")


@dataclass(frozen=True, kw_only=True)
class ConflictsConfig:
    """Whose exits' gradients to compare, and on what."""

    paths: tuple[Path, ...] = ()
    """Run folders or model.safetensors files."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """Without paths: a model that has learned nothing yet."""
    data: DataConfig = field(default_factory=DataConfig)
    """The data. What is not given is as it was in the (first) run, whatever default is named below."""
    batches: int = _BATCHES
    """Training batches to average over."""
    batch_size: int = 100
    """Images or sentences of a batch."""
    channels_last: bool = True
    """Keep images and convolution weights in channels-last memory order."""
    device: str = "auto"
    """auto (an accelerator where there is one) or cpu."""
    num_threads: int | None = None
    """CPU threads. Default: torch's."""
    seed: int = 0
    """Fixes which batches, their augmentation, and the weights of a new model."""
    output: Path | None = None
    """Folder of conflicts.csv and the pictures. Default: conflicts in the (first) run's folder, or here."""
    progress: bool = True
    """Show a progress bar in a terminal."""

    def __post_init__(self) -> None:
        check_choice("device", self.device, DEVICES)
        check_numbers(self, "", {">= 1": ("batches", "batch_size", "num_threads"), ">= 0": ("seed",)})


class Measured(NamedTuple):
    """The conflicts of one set of weights.

    Attributes:
        source: the run folder or file; "new" of a new model. epoch: after which; None: not known.
        title: the model in words.
    """

    source: str
    epoch: int | None
    title: str
    pairs: list[PairConflict]

    @property
    def rows(self) -> list[dict[str, Any]]:
        """Of the CSV file."""
        return [{"source": self.source, "epoch": self.epoch, **asdict(pair)} for pair in self.pairs]


@dataclass(frozen=True, slots=True)
class ConflictsReport:
    """What `run` measured, in the order of the paths, and the files it wrote."""

    data: str
    measured: list[Measured]
    files: list[Path]

    def to_json(self) -> dict[str, Any]:
        """JSON-able; NaN is None."""
        return {
            "data": self.data,
            "weights": [
                {
                    **one._replace(pairs=[])._asdict(),
                    "pairs": [asdict(pair) for pair in one.pairs],
                    "summary": [_json_of(summary) for summary in summarise(one.pairs)],
                }
                for one in self.measured
            ],
            "files": [str(file) for file in self.files],
        }


def _json_of(summary: ConflictSummary) -> dict[str, Any]:
    values = asdict(summary)
    return {name: None if value != value else value for name, value in values.items()}


def summary_table(pairs: Sequence[PairConflict]) -> tuple[list[str], list[list[str]]]:
    """Headings and rows: of each block, and of the network."""
    headings = ["", "shared", "negative %", "mean cosine", "lowest cosine", "of exits", "disjoint"]
    rows = []
    for one in summarise(pairs):
        lowest = ["-", "-"] if one.lowest is None else [f"{one.lowest.cosine:.2f}", _exits(one.lowest)]
        known = ["-", "-"] if one.num_shared == 0 else [f"{100 * one.negative:.0f}", f"{one.cosine:.3f}"]
        rows.append([one.name, str(one.num_shared), *known, *lowest, str(one.num_disjoint)])
    return headings, rows


def _exits(pair: PairConflict) -> str:
    return f"{pair.exit}, {pair.other}"


def training_batches(
    data: DataSplits, batch_size: int, seed: int, count: int, device: torch.device, channels_last: bool
) -> Iterator[tuple[Any, Tensor]]:
    """The first `count` batches of a run with this seed, augmented as there; each time the same."""
    size = min(batch_size, len(data.train))
    loader = train_loader(data.train, EpochBatches(len(data.train), size, seed), num_workers=0, pin_memory=False)
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    with worker_deaths([loader]):
        for _, (input, target) in zip(range(count), loader, strict=False):
            yield to_device(input, device, memory_format), target.to(device)


def run(config: ConflictsConfig) -> ConflictsReport:
    """Measures, and writes the CSV file and the pictures.

    Raises:
        FileNotFoundError, ValueError: weights or data cannot be read, or do not fit each other; one exit alone.
    """
    from dfs_engine.models.weights import read_description
    from dfs_engine.training.build import accelerator_for, input_shape
    from dfs_engine.training.out_of_memory import batch_in_memory

    if config.num_threads is not None:
        torch.set_num_threads(config.num_threads)
    for given in config.paths:
        read_description(given)  # before any of them is measured
    device = accelerator_for(config.device, "fp32").device
    data: DataSplits | None = None
    measured: list[Measured] = []
    with progress_bar(max(len(config.paths), 1) * config.batches, "batch", config.progress) as bar:
        chosen: Sequence[Path | None] = config.paths or (None,)
        for path in chosen:
            if data is None and path is None:
                data = load_data(config.data, input_shape=input_shape(config.model))
            model, source, epoch = _model_of(config, path, data)
            data = data or load_data(config.data, input_shape=model.input_shape)
            _check_fits(model, data, path)
            bar.set_description(source)
            model.to(device)
            if config.channels_last:
                model.to(memory_format=torch.channels_last)
            batches = training_batches(
                data, config.batch_size, config.seed, config.batches, device, config.channels_last
            )
            with batch_in_memory("batch_size", config.batch_size):
                pairs = measure_conflicts(model, batches, bar.update)
            measured.append(Measured(source, epoch, title(model.get_config()), pairs))
    assert data is not None
    folder = config.output or _default_folder(config.paths)
    return ConflictsReport(data.description, measured, _write(folder, measured, data.description))


def _write(folder: Path, measured: Sequence[Measured], data: str) -> list[Path]:
    """The CSV file, two pictures of each of the weights, and one of all where they are of one model."""
    from dfs_engine.training.conflicts_plot import plot_blocks, plot_layers, plot_over_training

    folder.mkdir(parents=True, exist_ok=True)
    rows = [row for one in measured for row in one.rows]
    files = [folder / "conflicts.csv"]
    write_rows(files[0], rows)
    for number, one in enumerate(measured, start=1):
        when = "epoch unknown" if one.epoch is None else f"epoch {one.epoch}"
        number_of = f"_{number}" if len(measured) > 1 else ""
        for what, plot in {"blocks": plot_blocks, "layers": plot_layers}.items():
            files.append(folder / f"conflicts_{what}{number_of}.png")
            plot(files[-1], one.pairs, title=f"{one.title}, {when}\n{data}")
    if len(measured) > 1 and len({one.title for one in measured}) == 1:
        files.append(folder / "conflicts_over_training.png")
        plot_over_training(files[-1], rows, title=measured[0].title)
    return files


def _default_folder(paths: Sequence[Path]) -> Path:
    if not paths:
        return Path(FOLDER)
    first = paths[0].expanduser()
    return (first if first.is_dir() else first.parent) / FOLDER


def _model_of(
    config: ConflictsConfig, path: Path | None, data: DataSplits | None
) -> tuple[MultiExitModel, str, int | None]:
    from dfs_engine.models.weights import load_model, read_description
    from dfs_engine.training.build import build_model

    if path is None:
        assert data is not None
        torch.manual_seed(config.seed)
        model, source, epoch = build_model(config.model, data.num_classes), "new", 0
    else:
        model, description = load_model(path), read_description(path)
        source, epoch = str(path), description["epoch"]
    check_has_conflicts(model)
    return model, source, epoch


def _check_fits(model: MultiExitModel, data: DataSplits, path: Path | None) -> None:
    if data.num_classes != model.num_classes:
        raise ValueError(
            f"data: expected {model.num_classes} classes as in {path}, got {data.num_classes} in {data.description}. "
            "Give the --data flags of the run."
        )


def write_rows(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Writes `Measured.rows`, replacing what was there."""
    with atomic_file(path) as partial, partial.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=["source", "epoch", *(item.name for item in fields(PairConflict))])
        writer.writeheader()
        writer.writerows(rows)


def read_rows(path: Path) -> list[dict[str, Any]]:
    """What `write_rows` wrote; empty where there is no file.

    Raises:
        ValueError: another kind of file.
    """
    if not path.is_file():
        return []
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    try:
        return [{name: _value(name, text) for name, text in row.items()} for row in rows]
    except (TypeError, ValueError):
        raise ValueError(f"conflicts: expected a file that `dfs train` wrote, got {path}. Move it away.") from None


def _value(name: str, text: str) -> Any:
    if name in _TEXTS:
        return text
    if name in ("epoch", "exit", "other"):
        return int(text) if text else None
    return float(text)


def record_epoch(config: TrainConfig, model: MultiExitModel, data: DataSplits, run_dir: Path, epoch: int) -> None:
    """Measures the weights of a run after an epoch, and adds that to its conflicts/over_training.csv.

    Changes nothing of the run: neither weights nor statistics nor random numbers. What the file has of this epoch and
    later ones, of a run that was resumed since, is replaced.
    """
    from dfs_engine.training.conflicts_plot import plot_over_training
    from dfs_engine.training.out_of_memory import batch_in_memory

    size = config.micro_batch_size or config.batch_size
    device = next(model.parameters()).device
    batches = training_batches(data, size, config.seed, _BATCHES, device, config.channels_last)
    with batch_in_memory("batch_size", size, " or leave out --conflicts_every"):
        pairs = measure_conflicts(model, batches)
    measured = Measured(run_dir.name, epoch, title(model.get_config()), pairs)
    folder = run_dir / FOLDER
    folder.mkdir(exist_ok=True)
    path = folder / "over_training.csv"
    rows = [row for row in read_rows(path) if row["epoch"] < epoch] + measured.rows
    write_rows(path, rows)
    plot_over_training(path.with_suffix(".png"), rows, title=measured.title)
