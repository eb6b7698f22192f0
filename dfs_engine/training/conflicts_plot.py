"""Pictures of conflicts: a heat map of each block, one of all layers, and how they go while a run trains."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dfs_engine.evaluation.conflicts import PairConflict
from dfs_engine.runtime.files import atomic_file

_COLOURS = "RdBu"
_DISJOINT = "0.6"
_COLUMNS = 4
_LEGEND = "grey: no element in common"


def plot_blocks(path: Path, pairs: Sequence[PairConflict], *, title: str) -> None:
    """Exits x exits of each block, and of all that the exits share."""
    groups: dict[str, list[PairConflict]] = {}
    for pair in pairs:
        if pair.level != "parameter":
            groups.setdefault(pair.block or "all that the exits share", []).append(pair)
    groups = dict(sorted(groups.items(), key=lambda item: item[1][0].level == "network"))  # which comes last
    num_exits = max(pair.other for pair in pairs)
    num_columns = min(_COLUMNS, len(groups))
    num_rows = -(-len(groups) // num_columns)
    figure = _figure(3 * num_columns + 1, 3 * num_rows + 0.6)
    image = None
    axes = list(figure.subplots(num_rows, num_columns, squeeze=False).flat)
    for axis, (name, found) in zip(axes, groups.items(), strict=False):
        image = _draw_pairs(axis, found, num_exits)
        axis.set_title(name, fontsize=9)
    for axis in axes[len(groups) :]:
        axis.set_axis_off()
    figure.colorbar(image, ax=axes, label=f"mean cosine ({_LEGEND})", shrink=0.8)
    _save(figure, path, title)


def _draw_pairs(axis: Any, pairs: Sequence[PairConflict], num_exits: int) -> Any:
    cosines, disjoint = (np.full((num_exits, num_exits), np.nan) for _ in range(2))
    for pair in pairs:
        for place in ((pair.exit - 1, pair.other - 1), (pair.other - 1, pair.exit - 1)):
            (disjoint if pair.kind == "disjoint" else cosines)[place] = pair.cosine
    image = _draw(axis, cosines, disjoint)
    ticks = range(num_exits)
    axis.set_xticks(ticks, [str(tick + 1) for tick in ticks], fontsize=7)
    axis.set_yticks(ticks, [str(tick + 1) for tick in ticks], fontsize=7)
    axis.set_xlabel("exit", fontsize=8)
    axis.set_ylabel("exit", fontsize=8)
    if num_exits <= 8:
        for (row, column), value in np.ndenumerate(cosines):
            if not np.isnan(value):
                colour = "white" if abs(value) > 0.6 else "black"
                axis.text(column, row, f"{value:.2f}", ha="center", va="center", fontsize=6, color=colour)
    return image


def plot_layers(path: Path, pairs: Sequence[PairConflict], *, title: str) -> None:
    """Parameters x pairs of exits."""
    parameters = [pair for pair in pairs if pair.level == "parameter"]
    names = list(dict.fromkeys(pair.parameter for pair in parameters))
    columns = sorted({(pair.exit, pair.other) for pair in parameters})
    cosines, disjoint = (np.full((len(names), len(columns)), np.nan) for _ in range(2))
    rows = {name: index for index, name in enumerate(names)}
    for pair in parameters:
        place = rows[pair.parameter], columns.index((pair.exit, pair.other))
        (disjoint if pair.kind == "disjoint" else cosines)[place] = pair.cosine
    figure = _figure(min(5 + 0.3 * len(columns), 30), min(2.5 + 0.16 * len(names), 40))
    axis = figure.subplots()
    image = _draw(axis, cosines, disjoint)
    step = -(-len(names) // 250)  # more lines than that nobody reads
    axis.set_yticks(range(0, len(names), step), names[::step], fontsize=6)
    axis.set_xticks(range(len(columns)), [f"{exit}, {other}" for exit, other in columns], fontsize=6, rotation=90)
    axis.set_xlabel("pair of exits")
    figure.colorbar(image, ax=axis, label=f"mean cosine ({_LEGEND})", shrink=0.6)
    _save(figure, path, title)


def _draw(axis: Any, cosines: np.ndarray, disjoint: np.ndarray) -> Any:
    from matplotlib.colors import ListedColormap

    axis.imshow(disjoint, cmap=ListedColormap([_DISJOINT]), aspect="auto", interpolation="nearest")
    return axis.imshow(cosines, cmap=_COLOURS, vmin=-1, vmax=1, aspect="auto", interpolation="nearest")


def plot_over_training(path: Path, rows: Sequence[dict[str, Any]], *, title: str) -> None:
    """Share of negative cosines and mean cosine of the pairs that share elements, by block and epoch.

    Args:
        rows: as of the CSV file. Weights whose epochs are not known or not distinct count as one after the other.
    """
    from matplotlib.ticker import MaxNLocator

    points = list(dict.fromkeys((row["source"], row["epoch"]) for row in rows))
    epochs = [epoch for _, epoch in points]
    by_epoch = None not in epochs and len(set(epochs)) == len(epochs)
    places = epochs if by_epoch else list(range(1, len(points) + 1))
    shared = [row for row in rows if row["level"] == "parameter" and row["kind"] == "shared"]
    groups = [*dict.fromkeys(row["block"] for row in shared), None]
    figure = _figure(11, 4.5)
    for axis, (name, label, factor) in zip(
        figure.subplots(1, 2), (("negative", "negative cosines (%)", 100), ("cosine", "mean cosine", 1)), strict=True
    ):
        for index, group in enumerate(groups):
            means = []
            for point in points:
                values = [
                    row[name]
                    for row in shared
                    if (row["source"], row["epoch"]) == point and group in (None, row["block"])
                ]
                means.append(factor * sum(values) / len(values) if values else np.nan)
            _draw_line(axis, places, means, group, index, len(groups) - 1)
        axis.set_xlabel("epoch" if by_epoch else "weights, in the order given")
        axis.set_ylabel(label)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axis.grid(alpha=0.3)
    if len(groups) <= 20:
        axis.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False, fontsize=8)
    _save(figure, path, f"{title}\npairs of exits that share elements of a weight")


def _draw_line(axis: Any, places: Sequence[Any], means: list[float], group: str | None, index: int, count: int) -> None:
    from matplotlib import colormaps

    if group is None:
        axis.plot(places, means, marker="o", markersize=3, color="black", linestyle="--", label="network")
    else:
        colour = colormaps["viridis"](0.9 * index / max(1, count - 1))
        axis.plot(places, means, marker="o", markersize=3, color=colour, label=group)


def _figure(width: float, height: float) -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # Not pyplot: it would pick a windowing backend and keep global state.
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _save(figure: Any, path: Path, title: str) -> None:
    figure.suptitle(title, fontsize=10)
    with atomic_file(path) as partial:
        figure.savefig(partial, dpi=120, format="png")
