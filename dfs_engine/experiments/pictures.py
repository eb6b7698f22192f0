"""A comparison's figures, each a PNG file: accuracy against operations, training time, budgets and beta."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from dfs_engine.evaluation.metrics import TITLES
from dfs_engine.experiments.summary import Summary
from dfs_engine.runtime.files import atomic_file

_MARKERS = "osD^vP*Xh<>dp"
_OUTPUTS_OVER_TIME = {"last exit": -2, "ensemble": -1}  # places in Summary.outputs


def draw_all(summaries: Sequence[Summary], folder: Path) -> list[Path]:
    """Draws every figure that the results suffice for; returns their files."""
    files = []
    for name, num_panels, draw in _figures(summaries):
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        figure = Figure(figsize=(1.5 + 5.5 * num_panels, 4.8), layout="constrained")
        FigureCanvasAgg(figure)  # not pyplot: it would pick a windowing backend and keep global state
        panels = figure.subplots(1, num_panels, squeeze=False)[0]
        draw(panels)
        for axes in panels:
            axes.grid(alpha=0.3)
        handles, labels = panels[-1].get_legend_handles_labels()
        panels[-1].legend(handles, labels, loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False, fontsize=8)
        files.append(folder / f"{name}.png")
        with atomic_file(files[-1]) as partial:
            figure.savefig(partial, dpi=130, format="png")
    return files


def _figures(summaries: Sequence[Summary]) -> Iterator[tuple[str, int, Callable[[Any], None]]]:
    """(name, number of panels, what draws them) of each figure."""
    counted = [summary for summary in summaries if summary.operations]
    if counted:
        yield "accuracy_operations", 1, lambda panels: _operations(panels[0], counted)
    yield "accuracy_time", len(_OUTPUTS_OVER_TIME), lambda panels: _time(panels, summaries)
    budgeted = [summary for summary in summaries if all(run.budget for run in summary.runs)]
    if budgeted:
        yield "accuracy_budget", 1, lambda panels: _budget(panels[0], budgeted)
    swept = swept_by_beta(summaries)
    if swept:
        yield "accuracy_beta", 1, lambda panels: _beta(panels[0], swept, summaries)


def _style(index: int) -> dict[str, Any]:
    """Colour and marker of a row, the same in all figures."""
    from matplotlib import colormaps

    return {"color": colormaps["tab20"](2 * index % 20 + index // 10 % 2), "marker": _MARKERS[index % len(_MARKERS)]}


def _styled(summaries: Sequence[Summary]) -> Iterator[tuple[Summary, dict[str, Any]]]:
    for index, summary in enumerate(summaries):
        yield summary, {**_style(index), "label": summary.row, "markersize": 5}


def _metric(summary: Summary) -> str:
    return f"test {TITLES.get(summary.metric, summary.metric)} (%)"


def _operations(axes: Any, summaries: Sequence[Summary]) -> None:
    for summary, style in _styled(summaries):
        operations = [count / 1e6 for count in summary.operations]
        scores = [summary.score(output) for output in summary.outputs[:-1]]
        axes.errorbar(
            operations,
            [score.mean for score in scores],
            [score.deviation or 0.0 for score in scores],
            capsize=2,
            **style,
        )
    axes.set_xlabel("operations of a sample that leaves at the exit, millions")
    axes.set_ylabel(_metric(summaries[0]))
    axes.set_title("Every exit", fontsize=10)


def _time(panels: Sequence[Any], summaries: Sequence[Summary]) -> None:
    for axes, (title, place) in zip(panels, _OUTPUTS_OVER_TIME.items(), strict=True):
        for summary, style in _styled(summaries):
            num_epochs = min(len(run.epochs) for run in summary.runs)
            minutes = [(epoch + 1) * summary.epoch_seconds / 60 for epoch in range(num_epochs)]
            scores = [summary.score(summary.outputs[place], epoch).mean for epoch in range(num_epochs)]
            axes.plot(minutes, scores, markevery=[-1], **style)
        axes.set_xlabel("training time, minutes (epochs x their median time)")
        axes.set_ylabel(_metric(summaries[0]))
        axes.set_title(title.capitalize(), fontsize=10)


def _budget(axes: Any, summaries: Sequence[Summary]) -> None:
    for summary, style in _styled(summaries):
        points = list(zip(*(run.budget for run in summary.runs), strict=True))  # the same budgets in each run
        operations = [_mean(point, "test_operations") / 1e6 for point in points]
        axes.plot(operations, [_mean(point, "test_top1") for point in points], **style)
    axes.set_xlabel("mean operations of a test sample, millions")
    axes.set_ylabel("test top-1 (%)")
    axes.set_title("Budgeted: thresholds from held-out samples", fontsize=10)


def _mean(lines: Sequence[dict[str, float]], column: str) -> float:
    return sum(line[column] for line in lines) / len(lines)


def swept_by_beta(summaries: Sequence[Summary]) -> list[Summary]:
    """Rows that differ in beta alone, by rising beta, if there are any."""
    by_rest: dict[str, list[Summary]] = {}
    for summary in summaries:
        if summary.config["model"]["variant"] != "dense":
            rest = {name: value for name, value in summary.config.items() if name not in ("seed", "run_dir", "optim")}
            rest["model"] = {**rest["model"], "beta": None}
            by_rest.setdefault(repr(rest), []).append(summary)
    largest = max(by_rest.values(), key=len, default=[])
    return sorted(largest, key=_beta_of) if len({_beta_of(summary) for summary in largest}) > 1 else []


def _beta_of(summary: Summary) -> float:
    return float(summary.config["model"]["beta"])


def _beta(axes: Any, swept: Sequence[Summary], summaries: Sequence[Summary]) -> None:
    from matplotlib import colormaps

    betas = [_beta_of(summary) for summary in swept]
    dense = next((row for row in summaries if row.is_baseline and row.model == swept[0].model), None)
    for index, output in enumerate(swept[0].outputs):
        is_ensemble = output == "ensemble"
        colour = "black" if is_ensemble else colormaps["viridis"](0.9 * index / max(1, swept[0].num_exits - 1))
        scores = [summary.score(output) for summary in swept]
        axes.errorbar(
            betas,
            [score.mean for score in scores],
            [score.deviation or 0.0 for score in scores],
            color=colour,
            marker="s" if is_ensemble else "o",
            markersize=4,
            capsize=2,
            label=output.replace("exit", "exit "),
        )
        if dense is not None:
            axes.axhline(dense.score(output).mean, color=colour, linestyle=":", linewidth=1)
    axes.set_xlabel(
        "beta, the share of channels that deeper layers train" + ("" if dense is None else " (dotted: dense)")
    )
    axes.set_ylabel(_metric(swept[0]))
