"""A comparison's table: Markdown for people, CSV for programs."""

from collections.abc import Iterator, Sequence
from typing import Any

from dfs_engine.evaluation.metrics import TITLES
from dfs_engine.experiments.summary import Missing, Summary, steps_are_timed


def headings(summaries: Sequence[Summary]) -> list[str]:
    """Of `cells`."""
    num_exits = max(summary.num_exits for summary in summaries)
    exits = [f"exit {index}" for index in range(1, num_exits + 1)]
    return ["row", *exits, "ensemble", "seeds", "lr", time_heading(summaries), "memory, MiB", "operations, M"]


def time_heading(summaries: Sequence[Summary]) -> str:
    return "time per step" if steps_are_timed(summaries) else "time per epoch"


def cells(summary: Summary, num_exits: int) -> list[str]:
    """A row of the table."""
    *exits, ensemble = summary.outputs
    scores = [str(summary.score(exit)) for exit in exits] + [""] * (num_exits - len(exits))
    peak = summary.peak_memory_mib if summary.step_memory_mib is None else summary.step_memory_mib
    return [
        summary.row,
        *scores,
        str(summary.score(ensemble)),
        str(len(summary.runs)),
        f"{summary.lr:.4g}",
        "" if summary.relative_time is None else f"{summary.relative_time:.2f} x",
        "" if peak is None else f"{peak:.0f}",
        f"{summary.operations[-1] / 1e6:.2f}" if summary.operations else "",
    ]


def markdown(summaries: Sequence[Summary], missing: Sequence[Missing], pictures: Sequence[str]) -> Iterator[str]:
    """The lines of results.md."""
    yield "# Results"
    yield ""
    if summaries:
        yield from conditions(summaries)
        yield ""
        by_model: dict[str, list[Summary]] = {}
        for summary in summaries:
            by_model.setdefault(summary.model, []).append(summary)
        for model, rows in by_model.items():
            yield f"**{model}**"
            yield ""
            names = headings(rows)
            yield f"| {' | '.join(names)} |"
            yield "|---" * len(names) + "|"
            num_exits = max(row.num_exits for row in rows)
            for row in rows:
                yield f"| {' | '.join(cells(row, num_exits))} |"
            yield ""
        yield "What each row changes in the recipe:"
        yield ""
        for summary in summaries:
            yield f"- `{summary.row}`: {_flags(summary)}"
        yield ""
    if missing:
        yield "Not in the table:"
        yield ""
        for run in missing:
            yield f"- {run.name}: {run.why}"
        yield ""
    for name in pictures:
        yield f"![{name}]({name})"
        yield ""


def _flags(summary: Summary) -> str:
    flags = summary.runs[0].record.flags
    return ", ".join(f"`{name}={value}`" for name, value in flags.items()) or "nothing"


def conditions(summaries: Sequence[Summary]) -> Iterator[str]:
    """How the numbers came about, in sentences."""
    config = summaries[0].config
    optim, environments = config["optim"], [run.environment for summary in summaries for run in summary.runs]
    epochs = sorted({len(run.epochs) for summary in summaries for run in summary.runs})
    metric = TITLES.get(summaries[0].metric, summaries[0].metric)
    yield (
        f"Test {metric} in per cent after the last epoch, mean ± standard deviation over the seeds (ensemble: of the "
        "mean of all exits' logits)."
    )
    yield (
        f"{_distinct(environments, 'data')}; {' or '.join(map(str, epochs))} epochs in batches of "
        f"{config['batch_size']}, {optim['name']}, {optim['schedule']} schedule, weight decay "
        f"{optim['weight_decay']:g}."
    )
    tried = [summary for summary in summaries if summary.tried_lrs]
    if tried:
        rates = "; ".join(
            f"{summary.row} {summary.lr:.4g} of {', '.join(f'{rate:.4g}' for rate in summary.tried_lrs)}"
            for summary in tried
        )
        yield f"Learning rates chosen by the mean over the exits on held-out samples, with the first seed: {rates}."
    if any(summary.relative_time is not None for summary in summaries):
        how = (
            "Times per step: medians on synthetic batches, all rows in turns in one process"
            if steps_are_timed(summaries)
            else "Times per epoch: of the runs themselves, evaluation not counted, with what else the machine did"
        )
        yield f"{how}; relative to the row without surgery or method."
    yield (
        "Memory: what a training step holds at its worst moment, beside weights and optimizer state."
        if all(summary.step_memory_mib is not None for summary in summaries)
        else "Memory: the peak of the run's process on a CPU, of torch's allocator on a GPU."
    )
    yield "Operations: of a sample that leaves at the last exit; a multiply-add is one."
    torch = sorted({str((each.get("versions") or {}).get("torch")) for each in environments})
    revisions = sorted({str(each.get("git_sha"))[:12] for each in environments})
    yield (
        f"Machine: {_distinct(environments, 'device')}, {_distinct(environments, 'num_threads')} threads; torch "
        f"{', '.join(torch)}; revision {', '.join(revisions)}."
    )


def _distinct(environments: Sequence[dict[str, Any]], name: str) -> str:
    return " / ".join(dict.fromkeys(str(each.get(name)) for each in environments))


def csv_rows(summaries: Sequence[Summary]) -> list[dict[str, Any]]:
    """The lines of results.csv."""
    num_exits = max(summary.num_exits for summary in summaries)
    outputs = [*(f"exit{index}" for index in range(1, num_exits + 1)), "ensemble"]
    return [dict(_columns(summary, outputs)) for summary in summaries]


def _columns(summary: Summary, outputs: Sequence[str]) -> Iterator[tuple[str, Any]]:
    model = summary.config["model"]
    yield "row", summary.row
    yield "model", summary.model
    yield "method", summary.config["method"]
    for name in ("variant", "beta", "reference", "exit_gradient"):
        yield name, model[name]
    yield "lr", summary.lr
    yield "epochs", len(summary.runs[0].epochs)
    yield "seeds", " ".join(str(run.record.seed) for run in summary.runs)
    for output in outputs:
        score = summary.score(output) if output in summary.outputs else None
        yield f"{summary.metric}_{output}_mean", "" if score is None else round(score.mean, 4)
        deviation = None if score is None else score.deviation
        yield f"{summary.metric}_{output}_deviation", "" if deviation is None else round(deviation, 4)
    yield "seconds_per_epoch", round(summary.epoch_seconds, 3)
    yield "seconds_per_step", summary.step_seconds
    yield "relative_time", "" if summary.relative_time is None else round(summary.relative_time, 4)
    yield "peak_memory_mib", summary.peak_memory_mib
    yield "step_memory_mib", summary.step_memory_mib
    for index, output in enumerate(outputs[:-1]):
        yield f"operations_{output}", summary.operations[index] if index < len(summary.operations) else ""
