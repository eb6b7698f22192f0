"""`dfs bench tune`: which launch of a Triton kernel is the fastest on this GPU, and whether it beats `aten`.

Written as a table that `kernels.config` reads: what `auto` decides by on CUDA. Runs once, never while training.
"""

import importlib
import json
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from dfs_engine.benchmarks import gpu_contests, markdown
from dfs_engine.benchmarks.gpu_contests import ATEN, TRITON, Calls, Contest, Launch, contests, launches
from dfs_engine.benchmarks.gpu_ops import PRECISIONS, measure_device, precision
from dfs_engine.benchmarks.measure import Environment, environment
from dfs_engine.benchmarks.options import check_least, split_ints
from dfs_engine.benchmarks.shapes import Shape, matching
from dfs_engine.benchmarks.step_models import STEP_MODELS, StepModel
from dfs_engine.checks import split_betas, split_choices
from dfs_engine.kernels import config as kernels
from dfs_engine.kernels.config import Config, Entries, NoConfigFits
from dfs_engine.models import check_model
from dfs_engine.runtime.progress_bar import progress_bar

_OPS = ("conv2d", "linear", "norm_linear", "norm_act")


@dataclass(frozen=True, kw_only=True, slots=True)
class BenchTuneConfig:
    """What `dfs bench tune` measures. Lists are comma-separated.

    Each shape class once, every configuration and aten in turns.

    Attributes:
        ops: Some of conv2d, linear, norm_linear, norm_act.
        models: Whose layers: "all" of those whose steps `benchmarks/gpu_check.py` times, or names of models as
            `dfs train --model.name` has them.
        shapes: Which of their layers: patterns of model/shape, for example "vgg16_64/*x224x224*".
        dtypes: Some of bf16, fp16, tf32 (fp32 with tf32 allowed), fp32.
        beta: Shares of channels with gradient; sizes count as the nearest power of two, so that these stand for all.
        batch_size: Images per batch, as you train with. Default: that of the steps, 256 images or 64 texts.
        rounds: How often every configuration is timed.
        max_seconds: Start no further class after this time; the same command goes on where it stopped. Default: no
            limit.
        again: Measure again what the table has already.
        dry_run: List what would be measured; needs no GPU.
        output: File of the table. Default: where dfs_engine looks for it.
        progress: Show a progress bar.
    """

    ops: str = ",".join(_OPS)
    models: str = "all"
    shapes: str = "*"
    dtypes: str = "bf16,fp16,tf32,fp32"
    beta: str = "0.25,0.5,1"
    batch_size: str = ""
    rounds: int = 10
    max_seconds: float | None = None
    again: bool = False
    dry_run: bool = False
    output: str = ""
    progress: bool = True

    def __post_init__(self) -> None:
        split_choices("ops", self.ops, _OPS)
        split_choices("dtypes", self.dtypes, PRECISIONS)
        split_betas("beta", self.beta)
        if self.batch_size:
            split_ints("batch_size", self.batch_size)
        for name in self._named_models():
            check_model(name, "models")
        check_least(self, {"rounds": 1})

    def chosen_shapes(self) -> Iterator[Shape]:
        """Of every model at every batch size, those that take longest first."""
        for model in self._chosen_models():
            for size in split_ints("batch_size", self.batch_size) if self.batch_size else [model.batch]:
                yield from matching(replace(model, batch=size).shapes(), self.shapes)

    def _chosen_models(self) -> list[StepModel]:
        """Of "all" those whose packages are here; one that is named raises by itself where its package is not."""
        if self.models == "all":
            return [model for model in STEP_MODELS.values() if model.missing() is None]
        return [STEP_MODELS.get(name) or StepModel(name) for name in self._named_models()]

    def _named_models(self) -> list[str]:
        return [] if self.models == "all" else [name.strip() for name in self.models.split(",")]


class Task(NamedTuple):
    """One shape class, and a contest that stands for it."""

    key: str
    launch: Launch
    op: str
    metric: str
    shape: Shape
    beta: float
    dtype: str

    def __str__(self) -> str:
        return f"{self.key} ({self.shape.family} {self.shape}, beta {self.beta:g})"


def plan(config: BenchTuneConfig) -> list[Task]:
    """One task for each shape class that `config` asks for."""
    tasks: dict[str, Task] = {}
    shapes = list(config.chosen_shapes())
    wanted = split_choices("ops", config.ops, _OPS)
    for name in split_choices("dtypes", config.dtypes, PRECISIONS):
        with precision(name) as dtype:
            for beta in split_betas("beta", config.beta):
                for shape in shapes:
                    for (op, metric), launch in launches(shape, beta).items():
                        if op in wanted and min(launch[1:4]) > 0:
                            key = launch.key(dtype)
                            tasks.setdefault(key, Task(key, launch, op, metric, shape, beta, name))
    return list(tasks.values())


@dataclass(slots=True)
class TuneReport:
    """What was measured in this run, and what the table has beside it."""

    config: BenchTuneConfig
    path: Path
    tasks: list[Task]
    finished: Entries
    measured: Entries = field(default_factory=dict)
    failed: list[str] = field(default_factory=list)
    stamp: Environment | None = None

    @property
    def missing(self) -> list[Task]:
        return [task for task in self.tasks if task.key not in self.finished and task.key not in self.measured]

    def table(self) -> str:
        """Markdown."""
        if self.config.dry_run:
            lines = [
                f"{'finished' if task.key in self.finished else 'to do'}: {task}, {len(_configs(task)) or 1} ways"
                for task in self.tasks
            ]
            return "\n".join(
                [*lines, f"{len(self.missing)} of {len(self.tasks)} shape classes would be measured for {self.path}"]
            )
        header = ("shape class", "configuration", "triton us", "aten us", "aten / triton")
        lines = [*markdown.table(header, self._cells())]
        wins = sum(entry["triton_us"] < entry["aten_us"] for entry in self.measured.values())
        lines += [f"FAILED: {text}" for text in self.failed]
        lines.append(
            f"{len(self.measured)} shape classes measured, triton is faster in {wins}; {len(self.finished)} were in "
            f"the table, {len(self.missing)} are missing. {self.path}"
        )
        return "\n".join(lines)

    def _cells(self) -> Iterator[list[str]]:
        for key, entry in self.measured.items():
            triton, aten = entry["triton_us"], entry["aten_us"]
            way = "x".join(map(str, entry["config"] or ["-"]))
            yield [key, way, f"{triton:.1f}", f"{aten:.1f}", f"{aten / triton:.2f}"]

    def to_json(self) -> dict[str, Any]:
        """JSON-able values."""
        return {
            "config": asdict(self.config),
            "environment": None if self.stamp is None else asdict(self.stamp),
            "table": str(self.path),
            "measured": self.measured,
            "missing": [task.key for task in self.missing],
            "failed": self.failed,
        }


def run(config: BenchTuneConfig) -> TuneReport:
    """Measures what the table does not have yet, and writes it after every shape class.

    Raises:
        RuntimeError: no GPU.
    """
    begin, gpu = time.monotonic(), kernels.gpu_name()
    if gpu is None and not config.dry_run:
        raise RuntimeError(
            "bench tune: expected a CUDA device, got none: it measures on the GPU that the table is for. "
            "`--dry_run` lists what it would measure."
        )
    path = Path(config.output) if config.output else kernels.table_path(gpu or "no GPU")
    tasks = plan(config)
    finished = {} if config.again else _finished(path, gpu)
    report = TuneReport(config, path, tasks, {task.key: finished[task.key] for task in tasks if task.key in finished})
    if gpu is None or config.dry_run:
        return report
    report.stamp = stamp = environment(gpu_contests.DEVICE)
    table = {
        "gpu": gpu, "torch": stamp.torch, "triton": stamp.triton, "revision": stamp.git_sha,
        "date": stamp.timestamp_utc, "entries": _read(path, gpu) | finished,
    }  # fmt: skip
    with progress_bar(len(tasks), "class", config.progress) as bar:
        bar.update(len(report.finished))
        for task in report.missing:
            if config.max_seconds is not None and time.monotonic() - begin >= config.max_seconds:
                break
            bar.set_description(task.key)
            try:
                entry = _measure(task, config.rounds)
            # A wrong result or a crash of one kernel is a finding; the others still are worth measuring.
            except Exception as error:
                report.failed.append(f"{task}: {type(error).__name__}: {str(error)[:500]}")
            else:
                report.measured[task.key] = table["entries"][task.key] = entry
                _write(path, table)
            bar.update()
    return report


def _configs(task: Task) -> list[Config]:
    """None for a kernel that has one way to be launched."""
    if task.op == "norm_act":
        return []
    importlib.import_module(f"dfs_engine.kernels.{task.op}")  # which defines them
    with precision(task.dtype) as dtype:
        return kernels.tunable(*task.launch[:4], dtype)


def _measure(task: Task, rounds: int) -> dict[str, Any]:
    """The table's entry: of results that are right, the fastest configuration.

    Raises:
        RuntimeError: a result is wrong, or no configuration fits the GPU.
    """
    with precision(task.dtype) as dtype:
        named = (contest for contest in contests(task.shape, dtype, task.beta))
        contest = next(found for found in named if (found.op, found.metric) == (task.op, task.metric))
        calls: Calls = {ATEN: contest.calls[ATEN]}
        configs = _configs(task)
        if not configs:
            calls[TRITON] = contest.calls[TRITON]
        for chosen in configs:
            call = _forced(task.launch.op, chosen, contest)
            try:
                call()
            except NoConfigFits:
                continue
            calls[chosen] = call
        if len(calls) == 1:
            raise RuntimeError("no configuration fits this GPU")
        replace(contest, calls=calls).check()
        medians = {way: stats.median * 1e6 for way, stats in measure_device(calls, rounds).items()}
    aten_us = medians.pop(ATEN)
    best = min(medians, key=lambda way: medians[way])
    return {
        "config": list(best) if isinstance(best, Config) else None,
        "triton_us": round(medians[best], 3),
        "aten_us": round(aten_us, 3),
    }


def _forced(op: str, chosen: Config, contest: Contest) -> Callable[[], Any]:
    def call() -> Any:
        with kernels.forced(op, chosen):
            return contest.calls[TRITON]()

    return call


def _read(path: Path, gpu: str | None) -> Entries:
    """A table's entries, none where there is no file.

    Raises:
        RuntimeError: it is another GPU's.
    """
    if not path.is_file():
        return {}
    table = json.loads(path.read_text())
    if gpu is not None and table["gpu"] != gpu:
        raise RuntimeError(
            f"output: expected a table of {gpu}, got {path} of {table['gpu']}. Name another file, or move it away."
        )
    return table["entries"]


def _finished(path: Path, gpu: str | None) -> Entries:
    """What is there: in the file, or else in the table that dfs_engine has of this GPU."""
    return _read(path, gpu) or (_read(kernels.table_path(gpu), gpu) if gpu else {})


def _write(path: Path, table: dict[str, Any]) -> None:
    """At once or not at all, so that an interrupted run leaves a table that can be read."""
    path.parent.mkdir(parents=True, exist_ok=True)
    entries = {key: table["entries"][key] for key in sorted(table["entries"])}
    unfinished = path.with_suffix(".tmp")
    unfinished.write_text(json.dumps(table | {"entries": entries}, indent=1) + "\n")
    os.replace(unfinished, path)
