"""`dfs predict`: classes of images and texts of one's own, each from the first exit that is sure enough of it."""

import csv
import json
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dfs_engine.checks import check_choice, check_numbers
from dfs_engine.data.unlabelled import Unlabelled, load_unlabelled
from dfs_engine.inference.early_exit import EarlyExit
from dfs_engine.inference.per_sample import HELD_OUT, OutputCollector
from dfs_engine.inference.policies import Entropy, MaxProbability, Patience, Policy, PolicyLike
from dfs_engine.inference.prediction import Prediction
from dfs_engine.inference.saved_run import SavedRun, SavedRunConfig
from dfs_engine.inference.thresholds import OperatingPoint, find_thresholds
from dfs_engine.models.multi_exit import run_model
from dfs_engine.runtime.files import atomic_file
from dfs_engine.runtime.progress_bar import progress_bar

logger = logging.getLogger(__name__)

_POLICIES: dict[str, type[Policy]] = {"max_probability": MaxProbability, "entropy": Entropy, "patience": Patience}
_FORMATS = (".csv", ".jsonl")


@dataclass(frozen=True, kw_only=True)
class PredictConfig(SavedRunConfig):
    """What to classify with which saved weights, and when a sample may leave."""

    input: Path
    """An image, a folder of images, or texts: a .txt file with one in each line, or a .csv, .tsv, .jsonl or .parquet
    file with the run's text columns."""
    policy: str = "max_probability"
    """Who leaves at an exit: max_probability (its class has a probability of threshold or more), entropy (of threshold
    or less, in nats) or patience (the same class from threshold exits in a row)."""
    threshold: float | tuple[float, ...] | None = None
    """Of the policy: a number, or a list of one for each exit but the last. Default: nobody leaves before the last
    exit, unless accuracy or budget is given."""
    accuracy: float | None = None
    """Find the thresholds of the lowest cost that keep this share of the run's held-out samples right, for example
    0.93. Needs a run with data.val_fraction, and its data."""
    budget: float | None = None
    """Find the most accurate thresholds by which the run's held-out samples take, in the mean, this share of the
    operations of the whole network, for example 0.5. Needs a run with data.val_fraction, and its data."""
    output: Path | None = None
    """File for the predictions, .csv or .jsonl, instead of the terminal."""
    skip_broken: bool = False
    """Leave out images that cannot be decoded, and say how many. Else they are errors."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("policy", self.policy, _POLICIES)
        given = [name for name in ("threshold", "accuracy", "budget") if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"{given[0]}: expected one of threshold, accuracy and budget, got {' and '.join(given)}.")
        check_numbers(self, "", {"[0, 1]": ("accuracy",), "(0, 1]": ("budget",)})
        if self.threshold is not None:
            _with_threshold(self.policy, self.threshold)
        if self.output is not None and self.output.suffix not in _FORMATS:
            raise ValueError(f"output: expected a file that ends in {' or '.join(_FORMATS)}, got {self.output}.")


def _with_threshold(name: str, threshold: float | tuple[float, ...]) -> Policy:
    """The policy of that name.

    Raises:
        ValueError, TypeError: it takes no such threshold.
    """
    policy: Any = _POLICIES[name]
    if name == "patience":
        if isinstance(threshold, tuple) or not float(threshold).is_integer():
            raise ValueError(
                f"threshold: expected a whole number of exits with policy=patience, got {threshold}. Give 2, or more."
            )
        return policy(int(threshold))
    return policy(threshold)


def run(config: PredictConfig) -> dict[str, Any]:
    """Classifies what `config.input` is, and writes `config.output` if there is one.

    Returns:
        JSON-able: under "predictions", for each sample in order, its "input" (path or text), "class" (of a network that
        predicts numbers "value"), "exit" (from 1) and "confidence" (the probability of the class); under "exits" how
        many took each; the "policy", what it reached "held_out" if it was found, and "num_skipped".

    Raises:
        FileNotFoundError, ValueError: the weights, the input, or the data that thresholds are to come from cannot be
            read, or do not fit each other. OSError: the output cannot be written.
    """
    output = None if config.output is None else config.output.expanduser()
    if output is not None and not os.access(output.absolute().parent, os.W_OK | os.X_OK):
        raise PermissionError(f"output: expected a file in a folder that can be written, got {output}.")
    saved = SavedRun(config)
    found = load_unlabelled(
        config.input, saved.data_config, input_shape=saved.model.input_shape, skip_broken=config.skip_broken
    )
    policy, point = _policy(config, saved)
    rows = _predict(config, saved, found, EarlyExit(saved.model, policy))
    if output is not None:
        _write(output, rows)
    counts = torch.tensor([row["exit"] - 1 for row in rows]).bincount(minlength=saved.model.num_exits)
    return {
        "policy": repr(policy) if isinstance(policy, Policy) else None,
        "held_out": None if point is None else {"accuracy": point.accuracy, "cost": point.cost},
        "exits": counts.tolist(),
        "num_skipped": found.num_skipped,
        "output": output and str(output),
        "predictions": rows,
    }


def _policy(config: PredictConfig, saved: SavedRun) -> tuple[PolicyLike, OperatingPoint | None]:
    """With what it reaches on held-out samples, if that is how it was found."""
    if config.threshold is not None:
        return _with_threshold(config.policy, config.threshold), None
    if config.accuracy is None and config.budget is None:
        logger.info("policy: all run to the last exit; --threshold, --accuracy or --budget lets samples leave earlier")
        return _never_leaves, None
    point = find_policy(saved, _POLICIES[config.policy], accuracy=config.accuracy, budget=config.budget)
    logger.info(
        "policy: %r, with %.2f %% right of the held-out samples, at a mean cost of %.6g",
        point.policy,
        100 * point.accuracy,
        point.cost,
    )
    return point.policy, point


def _never_leaves(logits: torch.Tensor, exit_index: int, state: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """A policy that serves networks that predict numbers too."""
    return torch.zeros(len(logits), dtype=torch.bool, device=logits.device), logits[:, 0]


def find_policy(
    saved: SavedRun, family: type[Policy], *, accuracy: float | None = None, budget: float | None = None
) -> OperatingPoint:
    """`find_thresholds` on the samples that the run kept out of training.

    Args:
        accuracy: share of them that is to be right. budget: share of the whole network's operations. One of the two.

    Raises:
        ValueError: the run kept none out, or the target is out of reach.
    """
    data = saved.load_data()
    name = "accuracy" if budget is None else "budget"
    if data.val is None or saved.model.num_classes < 2:
        raise ValueError(
            f"{name}: expected a run that classifies and kept samples out of training, from which thresholds can come, "
            f"got {saved.config.path}, which did not. Train with --data.val_fraction 0.1, or give --threshold."
        )
    collector = OutputCollector(HELD_OUT, keep_logits=True)
    with torch.no_grad(), progress_bar(len(data.val), "sample", saved.config.progress) as bar:
        bar.set_description("finding thresholds")
        for input, target in saved.batches(data.val):
            with saved.accelerator.autocast():
                collector(run_model(saved.model, input), target)
            bar.update(len(target))
    costs = saved.operations(data) or range(1, saved.model.num_exits + 1)
    target_cost = None if budget is None else budget * costs[-1]
    labels = collector.outputs.labels
    return find_thresholds(
        collector.logits, labels, family, target_accuracy=accuracy, target_cost=target_cost, costs=costs
    )


def _predict(config: PredictConfig, saved: SavedRun, found: Unlabelled, early: EarlyExit) -> list[dict[str, Any]]:
    names = saved.description.get("class_names") or [str(index) for index in range(saved.model.num_classes)]
    rows: list[dict[str, Any]] = []
    with progress_bar(len(found.names), "sample", config.progress) as bar:
        bar.set_description("predicting")
        for input, positions in saved.batches(found.samples):
            with saved.accelerator.autocast():
                made = early(**input) if isinstance(input, Mapping) else early(input)
            inputs = [found.names[position] for position in positions.tolist()]
            rows += _rows(inputs, made, names, is_number=saved.model.num_classes == 1)
            bar.update(len(inputs))
    return rows


def _rows(inputs: list[str], made: Prediction, names: list[str], *, is_number: bool) -> list[dict[str, Any]]:
    exits = (made.exits + 1).tolist()
    if is_number:
        values = made.logits[:, 0].float().tolist()
        return [{"input": i, "value": v, "exit": e} for i, v, e in zip(inputs, values, exits, strict=True)]
    confidence = made.logits.float().softmax(-1).amax(-1).tolist()
    return [
        {"input": input, "class": names[index], "exit": exit, "confidence": each}
        for input, index, exit, each in zip(inputs, made.classes.tolist(), exits, confidence, strict=True)
    ]


def _write(path: Path, rows: list[dict[str, Any]]) -> None:
    with atomic_file(path) as partial, partial.open("w", newline="", encoding="utf-8") as file:
        if path.suffix == ".csv":
            writer = csv.DictWriter(file, fieldnames=list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
        else:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
