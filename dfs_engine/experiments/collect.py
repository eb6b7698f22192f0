"""The runs in the folders of comparisons, once they are known to belong together."""

import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from dfs_engine.experiments.record import (
    BUDGET_FILE,
    CONFIG_FILE,
    METRICS_FILE,
    Run,
    read_csv,
    read_runs,
    read_yaml,
)
from dfs_engine.runtime.files import write_text
from dfs_engine.training.config import TrainConfig
from dfs_engine.training.resume import FREE_DATA, changed_options
from dfs_engine.training.run_folder import ENVIRONMENT_FILE

PLAN_FILE = "comparison.yaml"
STEP_TIME_FILE = "step_time.csv"
# Where a run is computed, and from where it reads.
_FREE = {*FREE_DATA, "device", "num_threads", "eval_batch_size"}


class Plan(NamedTuple):
    """What a comparison is to hold: comparison.yaml."""

    rows: dict[str, list[int]]
    """The seeds of each row, in the table's order."""
    lr_factors: list[float]
    """Between which the learning rate is chosen; none where it is not searched for."""

    @classmethod
    def read(cls, folder: Path) -> "Plan":
        """Empty where there is none."""
        saved = read_yaml(folder / PLAN_FILE)
        return cls(dict(saved.get("rows") or {}), list(saved.get("lr_factors") or []))

    def write(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / PLAN_FILE, yaml.safe_dump(self._asdict(), sort_keys=False))

    def with_more(self, other: "Plan") -> "Plan":
        """Both plans' rows and seeds, this one's first."""
        rows = {
            name: sorted({*self.rows.get(name, []), *other.rows.get(name, [])})
            for name in dict.fromkeys([*self.rows, *other.rows])
        }
        return Plan(rows, self.lr_factors or other.lr_factors)


class Collected(NamedTuple):
    """What was found."""

    plan: Plan
    runs: list[Run]
    """In the plan's order."""
    step_times: dict[str, dict[str, float]]
    """By row: the line of step_time.csv, if the steps were timed."""

    def of_row(self, row: str) -> list[Run]:
        return [run for run in self.runs if run.record.row == row]


def collect(folders: Sequence[Path]) -> Collected:
    """The runs of one comparison, which may lie in several folders.

    Raises:
        FileNotFoundError: a folder without runs. ValueError: runs of different recipes, a run twice, or a damaged file.
    """
    plan = Plan({}, [])
    runs: dict[Any, Any] = {}
    step_times: dict[Any, Any] = {}
    for folder in folders:
        found = read_runs(folder) if folder.is_dir() else []
        if not found:
            raise FileNotFoundError(
                f"collect: expected a folder that `dfs compare` wrote, got {folder} without a run. Give its --output."
            )
        plan = plan.with_more(Plan.read(folder))
        for run in found:
            name, known = run.record.name, runs.get(run.record.name)
            if known is not None and known.record.has_ended and run.record.has_ended:
                if known.epochs != run.epochs:
                    raise ValueError(
                        f"collect: expected {name} once, got it in {known.folder} and in {run.folder} with other "
                        "results. Leave one of them out."
                    )
            elif known is None or run.record.has_ended:
                runs[name] = run
        step_times = step_times or {str(line["row"]): line for line in read_csv(folder / STEP_TIME_FILE, text=("row",))}
    check_one_recipe(runs.values())
    names = list(dict.fromkeys([*plan.rows, *(run.record.row for run in runs.values())]))
    ordered = sorted(runs.values(), key=lambda run: (names.index(run.record.row), run.record.seed, run.record.name))
    for run in ordered:  # of a folder without a plan
        seeds = plan.rows.setdefault(run.record.row, [])
        plan.rows[run.record.row] = sorted({*seeds, run.record.seed})
    return Collected(plan, ordered, step_times)


def check_unchanged(run: Run, wanted: TrainConfig) -> None:
    """Raises ValueError, naming the options, if a run that is there is not the one that is wanted under its name."""
    if not run.config:
        return
    changed = _differences(run.config, wanted.to_dict())
    for name in ("mean", "std"):  # a run keeps the numbers, where a recipe may have a preset, or the data's own
        if f"data.{name}" in changed and _normalizes_alike(run.config, wanted, name):
            del changed[f"data.{name}"]
    if changed:
        said = ", ".join(f"{name} was {before!r} and is {now!r} now" for name, (before, now) in changed.items())
        raise ValueError(
            f"output: expected the runs of this comparison, got {run.folder} with another recipe or other flags: "
            f"{said}. Give another --output, call the row otherwise, or remove that folder."
        )


def _normalizes_alike(config: dict[str, Any], wanted: TrainConfig, name: str) -> bool:
    if wanted.data.mean is None:
        return True
    found: Any = config["data"].get(name)
    numbers = wanted.data.normalization(default=None)  # type: ignore[arg-type]  # not taken where there is a mean
    return found is not None and list(found) == list(getattr(numbers, name))


def check_one_recipe(runs: Iterable[Run]) -> None:
    """That runs differ by their rows' flags and their seeds alone.

    Raises:
        ValueError: naming two folders, and in what they differ.
    """
    begun = [run for run in runs if run.config]
    for run in begun:
        first = next((other for other in begun if other.record.row == run.record.row), run)
        for other in (begun[0], first):
            allowed = {"seed"}
            if other.record.row != run.record.row:
                allowed |= {*other.record.flags, *run.record.flags}
            if run.record.lr_factor is not None or other.record.lr_factor is not None:
                allowed |= {"optim.lr"}
            # An option of the model is a flag of its own.
            allowed |= {"model.options"} if any(flag.startswith("model.options") for flag in allowed) else set()
            differs = {
                name: pair for name, pair in _differences(other.config, run.config).items() if name not in allowed
            }
            if differs:
                said = ", ".join(f"{name} ({before!r} and {now!r})" for name, (before, now) in differs.items())
                raise ValueError(
                    f"collect: expected runs under one recipe, got {other.folder} and {run.folder}, which differ in "
                    f"{said}. Remove the one that is out of date, or collect them apart."
                )


def _differences(before: dict[str, Any], now: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    return {name: pair for name, pair in changed_options(before, now).items() if name not in _FREE}


def copy_records(collected: Collected, output: Path) -> None:
    """What tables and pictures are made from, without weights and without what tells of the machine's folders."""
    collected.plan.write(output)
    for run in collected.runs:
        target = output / run.record.name
        if target.resolve() == run.folder.resolve():
            continue
        run.record.write(target)
        if run.config:
            data = {**run.config["data"], "root": None}
            _write_yaml(target / CONFIG_FILE, {**run.config, "data": data, "run_dir": None})
        if run.environment:
            told = {name: value for name, value in run.environment.items() if name != "process"}
            _write_yaml(target / ENVIRONMENT_FILE, told)
        for name in (METRICS_FILE, BUDGET_FILE):
            if (run.folder / name).is_file():
                shutil.copyfile(run.folder / name, target / name)


def _write_yaml(path: Path, values: dict[str, Any]) -> None:
    write_text(path, yaml.safe_dump(values, sort_keys=False))


def exits_of(epoch: dict[str, float]) -> int:
    """How many exits a line of metrics.csv tells of."""
    return sum(name.startswith("train_loss_exit") for name in epoch)


def metric_of(epoch: dict[str, float]) -> str:
    """What is measured first: top1, or a metric of GLUE."""
    return next(name for name in epoch if name.startswith("test_")).removeprefix("test_").removesuffix("_exit1")


def val_score(run: Run) -> float:
    """By which a learning rate is chosen: the mean over the exits on the validation samples after the last epoch."""
    if run.record.status != "finished":
        return float("-inf")
    last = run.epochs[-1]
    metric, num_exits = metric_of(last), exits_of(last)
    return sum(last[f"val_{metric}_exit{index}"] for index in range(1, num_exits + 1)) / num_exits


def chosen_factor(runs: Sequence[Run], plan: Plan) -> float | None:
    """The factor of the learning rate that a row's runs speak for; None while one of them has not ended, or all failed.

    Of the runs of the row's first seed, which all the factors have.
    """
    if not runs:
        return None
    seed = min(run.record.seed for run in runs)
    candidates = {run.record.lr_factor: run for run in runs if run.record.seed == seed and run.record.has_ended}
    factors = plan.lr_factors or sorted(factor for factor in candidates if factor is not None)
    if not factors or not set(factors) <= candidates.keys():
        return None
    best = max(factors, key=lambda factor: val_score(candidates[factor]))
    return best if candidates[best].record.status == "finished" else None
