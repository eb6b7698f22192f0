"""What `dfs eval` says of a network, from its per-sample outputs: one summary, as JSON, CSV and a picture."""

import csv
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dfs_engine.evaluation.calibration import calibration_error
from dfs_engine.inference.budgeted import BudgetedPoint, budgeted_batch
from dfs_engine.inference.figure import Curve, draw
from dfs_engine.inference.per_sample import HELD_OUT, Outputs, Saved, save_per_sample
from dfs_engine.runtime.files import atomic_file, write_text

PER_SAMPLE_FILE = "per_sample.safetensors"


def summarize(saved: Saved, *, thresholds: bool = True) -> dict[str, Any]:
    """JSON-able. Accuracies and calibration errors are per cent.

    Args:
        thresholds: whether to find any: for budgeted batch classification.

    Returns:
        `ExitMetrics.compute` of the test samples; under "further" those of the other sets; what `Saved.description`
        says of the network, each exit's "operations" and "seconds" among it; under "calibration", by set, how far each
        exit's confidence can be believed; under "budgeted" the 40 points of budgeted batch classification, or None and
        why not under "left_out".
    """
    description = dict(saved.description)
    metrics = description.pop("metrics")
    temperatures, errors = description.pop("temperatures"), description.pop("calibrated_errors")
    left_out = description.pop("left_out") if thresholds else "not asked for"
    test, *_ = metrics
    points = None if left_out else budgeted_batch(saved.outputs[HELD_OUT], saved.outputs[test], _costs(description))
    return {
        **metrics[test],
        "further": {name: found for name, found in metrics.items() if name != test},
        **description,
        "calibration": {
            split: _calibration(outputs, temperatures, errors.get(split)) for split, outputs in saved.outputs.items()
        },
        "budgeted": None if points is None else [_point(point, description) for point in points],
        "left_out": left_out,
    }


def _costs(description: Mapping[str, Any]) -> list[float]:
    return description["operations"] or list(range(1, description["num_exits"] + 1))


def _calibration(
    outputs: Outputs, temperatures: Sequence[float] | None, calibrated: Sequence[float] | None
) -> list[dict[str, float | None]]:
    pairs = zip(outputs.confidence, outputs.is_right, strict=True)
    return [
        {
            "ece": 100 * calibration_error(confidence, is_right),
            "temperature": None if temperatures is None else temperatures[index],
            "ece_at_temperature": None if calibrated is None else 100 * calibrated[index],
        }
        for index, (confidence, is_right) in enumerate(pairs)
    ]


def _point(point: BudgetedPoint, description: Mapping[str, Any]) -> dict[str, Any]:
    seconds = description["seconds"]
    return {
        "p": point.p,
        "accuracy": 100 * point.accuracy,
        "operations" if description["operations"] else "blocks": point.cost,
        "seconds": seconds and sum(share * each for share, each in zip(point.exits, seconds, strict=True)),
        "exits": point.exits,
        "thresholds": [each if math.isfinite(each) else None for each in point.thresholds],
    }


def write_report(folder: Path, saved: Saved, summary: dict[str, Any], curves: Sequence[Curve] = ()) -> list[Path]:
    """Writes eval.json, exits.csv, per_sample.safetensors, and where they can be had budgeted.csv and accuracy.png.

    Args:
        curves: of others, drawn beside this one's.
    """
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / name for name in ("eval.json", "exits.csv", PER_SAMPLE_FILE)]
    write_text(files[0], json.dumps(summary, indent=1, allow_nan=False) + "\n")
    _write_rows(files[1], exit_rows(summary))
    save_per_sample(files[2], saved)
    if summary["budgeted"] is not None:
        files.append(folder / "budgeted.csv")
        _write_rows(files[-1], [_flat(point) for point in summary["budgeted"]])
    if "top1" in summary["ensemble"]:
        files.append(folder / "accuracy.png")
        draw(files[-1], summary, curves)
    return files


def exit_rows(summary: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A row for each exit and set of samples: what exits.csv has."""
    rows = []
    for split, metrics in {"test": summary, **summary["further"]}.items():
        calibration = summary["calibration"].get(split, [{}] * summary["num_exits"])
        for index, (values, found) in enumerate(zip(metrics["exits"], calibration, strict=True)):
            cost = {name: summary[name] and summary[name][index] for name in ("operations", "seconds")}
            rows.append({"data": split, "exit": index + 1, **cost, **values, **found})
        rows.append({"data": split, "exit": "ensemble", **metrics["ensemble"]})
    return rows


def _flat(point: Mapping[str, Any]) -> dict[str, Any]:
    """With a column for each exit's share and threshold."""
    lists = {"exits": "share_exit{}", "thresholds": "threshold_exit{}"}
    row = {name: value for name, value in point.items() if name not in lists}
    for name, title in lists.items():
        row |= {title.format(index): value for index, value in enumerate(point[name], start=1)}
    return row


def _write_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    with atomic_file(path) as partial, partial.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(dict.fromkeys(name for row in rows for name in row)))
        writer.writeheader()
        writer.writerows(rows)
