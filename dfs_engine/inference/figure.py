"""The picture of `dfs eval`: accuracy against mean operations and measured time, with other curves beside it."""

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from dfs_engine.runtime.files import atomic_file

# Columns of a curve: operations, or millions of them, as the papers print them; and accuracies in per cent, or shares.
_OPERATIONS = {"operations": 1.0, "flops": 1e6, "mflops": 1e6}
_ACCURACIES = ("accuracy", "acc", "top1")


class Curve(NamedTuple):
    """Points of accuracy (per cent) at a mean number of operations."""

    name: str
    operations: list[float]
    accuracy: list[float]


def read_curves(path: Path) -> list[Curve]:
    """The curves in a CSV file: of each a column of operations and one of accuracies.

    The columns are called "operations" (the budgeted.csv of another run) or "FLOPs" (millions of them, as the papers'
    files have them), and "accuracy", "acc" or "top1". Of several curves the line above names each, over its first
    column; of one alone the file does.

    Raises:
        FileNotFoundError: no such file. ValueError: no such columns, or no numbers in them.
    """
    if not path.is_file():
        raise FileNotFoundError(f"curve: expected a CSV file, got {path} (nothing there).")
    with path.open(newline="", encoding="utf-8-sig") as file:
        rows = list(csv.reader(file))
    heading = next((index for index, row in enumerate(rows[:2]) if _pairs(row)), None)
    if heading is None:
        raise ValueError(
            f"curve: expected a column {', '.join(_OPERATIONS)} (the latter two in millions) for each column "
            f"{', '.join(_ACCURACIES)}, got {path} that begins with {','.join(rows[0]) if rows else 'nothing'!r}."
        )
    names = rows[heading - 1] if heading else []
    return [_curve(path, rows, heading, names, pair) for pair in _pairs(rows[heading])]


def _pairs(row: list[str]) -> list[tuple[int, int]]:
    """The columns (of costs, of accuracies) of each curve below a line of headings; none if it is no such line."""
    words = [cell.strip().lower() for cell in row]
    costs = [index for index, word in enumerate(words) if word in _OPERATIONS]
    accuracies = [index for index, word in enumerate(words) if word in _ACCURACIES]
    return list(zip(costs, accuracies, strict=True)) if len(costs) == len(accuracies) else []


def _curve(path: Path, rows: list[list[str]], heading: int, names: list[str], columns: tuple[int, int]) -> Curve:
    title = rows[heading][columns[0]].strip()
    name = names[columns[0]].strip() if columns[0] < len(names) else ""
    points = []
    for number, row in enumerate(rows[heading + 1 :], start=heading + 2):
        cells = [row[column].strip() if column < len(row) else "" for column in columns]
        if not all(cells):  # curves of different lengths side by side
            continue
        try:
            points.append((float(cells[0]) * _OPERATIONS[title.lower()], float(cells[1])))
        except ValueError:
            raise ValueError(f"curve: expected numbers, got {', '.join(cells)} in line {number} of {path}.") from None
    if not points:
        raise ValueError(f"curve: expected numbers below {title}, got none in {path}.")
    operations, accuracy = zip(*sorted(points), strict=True)
    scale = 100 if max(accuracy) <= 1 else 1
    return Curve(name or path.stem, list(operations), [scale * each for each in accuracy])


def draw(path: Path, summary: Mapping[str, Any], curves: Sequence[Curve] = ()) -> None:
    """Draws every exit as a point and the budgets as a line, over the costs that `summary` has."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = [("operations", "mean operations of a sample (millions of multiply-adds)", 1e-6)]
    if not summary["operations"]:
        panels = [("blocks", "mean number of blocks that run", 1.0)]
    if summary["seconds"]:
        panels.append(("seconds", f"mean milliseconds of a sample (batches of {summary['time_batch_size']})", 1e3))
    # Not pyplot: it would pick a windowing backend and keep global state.
    figure = Figure(figsize=(7 * len(panels), 4.8), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (cost, label, unit) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        _draw_own(axes, summary, cost, unit)
        if cost == "operations":
            for index, curve in enumerate(curves, start=1):
                millions = [unit * each for each in curve.operations]
                axes.plot(millions, curve.accuracy, "--", color=f"C{index}", label=curve.name)
        axes.set(xlabel=label, ylabel="test top-1 (%)", title=f"{summary['title']}\n{summary['data']}")
        axes.title.set_fontsize(9)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    if summary["seconds"]:
        figure.supxlabel(summary["device"], fontsize=7, color="#666666")
    with atomic_file(path) as partial:
        figure.savefig(partial, dpi=150, format="png")


def _draw_own(axes: Any, summary: Mapping[str, Any], cost: str, unit: float) -> None:
    costs = summary[cost] if cost in summary else range(1, summary["num_exits"] + 1)
    points = [(unit * each, found["top1"]) for each, found in zip(costs, summary["exits"], strict=True)]
    axes.plot(*zip(*points, strict=True), "o", color="C0", label="each exit alone")
    for index, point in enumerate(points, start=1):
        axes.annotate(str(index), point, textcoords="offset points", xytext=(5, -9), fontsize=8)
    if summary["budgeted"]:
        budgets = [(unit * point[cost], point["accuracy"]) for point in summary["budgeted"]]
        axes.plot(
            *zip(*sorted(budgets), strict=True), "-", color="C0", label="budgeted, thresholds from held-out samples"
        )
