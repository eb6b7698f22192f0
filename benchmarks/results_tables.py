"""Tables of training steps and of single ops: every form that was timed, slower ones included."""

from collections.abc import Iterator
from pathlib import Path

from dfs_engine.benchmarks.markdown import link, table
from dfs_engine.benchmarks.measure import TOTAL
from dfs_engine.benchmarks.results import Measurement, Measurements, compare_file, losses
from dfs_engine.benchmarks.results_targets import command
from dfs_engine.benchmarks.train_config import STOCK_VARIANTS

_STEP_HEADER = (
    *("variant", "layout", "mode", "forward ms", "backward ms", "step ms, median (min)"),
    *(
        "vs best `dense` (FLOP ceiling)",
        "vs best stock",
        "the same on one allocator",
        "limit ms (reached)",
        "peak MB",
        "n",
    ),
)
# What a family's table has a column for, each in its best mode: variants, allocator.
_FORMS = {
    "`dense`": (("dense",), "stock"),
    "`dense`, caching": (("dense",), "caching"),
    "`split` or `detach`": (("split", "detach"), "stock"),
    "**dfs**": (("dfs",), "stock"),
    "**dfs**, caching": (("dfs",), "caching"),
}


def milliseconds(one: Measurement | None, metric: str = TOTAL) -> str:
    """A median, as tables have it."""
    return f"{one[metric].median * 1e3:.0f}" if one else "-"


def _step_rows(found: Measurements) -> Iterator[tuple[str, ...]]:
    """Every case, its ratios to the best `dense` and the best stock one, and the ceiling that FLOPs allow."""
    stock = found.of(variant=STOCK_VARIANTS, allocator="stock")
    dense, best = stock.of(variant="dense").fastest(), stock.fastest()
    if dense is None or best is None:
        raise ValueError("results: expected dense on stock memory among the training steps of a table.")
    for one in found.ranked():
        same = found.of(variant=STOCK_VARIANTS, allocator=one.allocator).fastest() or best
        step = one[TOTAL]
        yield (
            f"**dfs** ({one.backend_used})" if one.variant == "dfs" else one.variant,
            *(one.layout, one.mode, milliseconds(one, "forward"), milliseconds(one, "backward")),
            f"{milliseconds(one)} ({step.min * 1e3:.0f})",
            f"{dense[TOTAL].median / step.median:.2f} ({dense.flops / one.flops:.2f})",
            f"{best[TOTAL].median / step.median:.2f}",
            f"{same[TOTAL].median / step.median:.2f}",
            *(one.limit, f"{one['peak_memory'].median / 1e6:.0f}", str(step.n)),
        )


def train_section(path: Path) -> Iterator[str]:
    """The table of one file of training steps, and where the time of one step goes."""
    every = Measurements.read(path)
    for dtype in every.distinct("dtype"):
        found = every.of(dtype=dtype)
        first = found[0]
        yield (
            f"Training step, {first.model}, input {first.shape}, {dtype}, beta 0.5. {first.conditions}; "
            f"{link(path, path.parents[1])}."
        )
        yield ""
        yield from table(_STEP_HEADER, _step_rows(found))
        yield ""
        # A run of its own, where the long one was disturbed at its end.
        yield from _breakdown(path.with_name(f"{path.stem}_breakdown.csv"), dtype)


def _breakdown(path: Path, dtype: str) -> Iterator[str]:
    for one in Measurements.read(path).of(dtype=dtype, variant="dfs").ranked()[:1]:
        total = sum(one.kernels.values())
        parts = ", ".join(f"{kind} {seconds / total:.0%}" for kind, seconds in one.kernels.items())
        source = f"{link(path, path.parents[1])} `{command(path.name)}`"
        yield f"One `dfs` step by kernel (profiler, CPU time): {parts}. {source}."
        yield ""


def families_section(paths: list[Path]) -> Iterator[str]:
    """One line per family: every formulation in its best form."""
    rows, notes = [], []
    for path in filter(Path.exists, paths):
        found, ratio = Measurements.read(path), compare_file(path)
        ours = ratio.ours
        forms = (found.of(variant=variants, allocator=allocator).fastest() for variants, allocator in _FORMS.values())
        rows.append(
            (
                *(
                    f"{ours.model}, {ours.batch_size}{', dropout' * (ours.suite == 'train_dropout')}",
                    ours.dtype,
                    *map(milliseconds, forms),
                ),
                *(f"{ratio.median:.2f} ({ratio.min:.2f})", f"{ratio.one_allocator:.2f}", f"{ratio.flops:.2f}"),
                *(ours.limit, " / ".join(f"{one['peak_memory'].median / 1e6:.0f}" for one in (ours, ratio.best))),
                *(ours[TOTAL].n, link(path, path.parents[1])),
            )
        )
        notes.append(f"- {ours.conditions}; {link(path, path.parents[1])}.")
    ratios = (
        *("dfs vs best stock, medians (minima)", "the same on one allocator", "FLOP ceiling", "limit ms (reached)"),
        *("peak MB, dfs / best stock", "n", "file"),
    )
    yield from table(("model, batch", "dtype", *_FORMS, *ratios), rows)
    yield ""
    yield "Milliseconds a step, medians, every formulation in its best mode. Each file's conditions:"
    yield ""
    yield from notes


def ops_section(path: Path) -> Iterator[str]:
    """What wins where: each op and shape in its best layout."""
    if not path.exists():
        return
    found = Measurements.read(path)
    rows = []
    for op in ("conv2d", "norm_act", "linear"):
        for model, shape in dict.fromkeys((one.model, one.shape) for one in found.of(op=op)):
            same = found.of(op=op, model=model, shape=shape)
            own = same.of(is_automatic=True).fastest()
            if own is None:
                continue
            ratios = []
            for rival, metric in (("dense", "backward"), ("dense", TOTAL), ("detach", TOTAL)):
                best, mine = same.of(path=rival).fastest(metric), same.of(is_automatic=True).fastest(metric)
                ratios.append(f"{best[metric].median / mine[metric].median:.2f}" if best and mine else "-")
            rows.append((op, f"{model} {shape}", own.path, *ratios))
    header = ("op", "shape", "`auto` takes", "backward vs `dense`", "forward + backward vs `dense`", "vs `detach`")
    yield from table(header, rows)


def losses_section(path: Path) -> Iterator[str]:
    """Every benchmarked op on which the automatic choice is slower than stock or than `aten`."""
    if not path.exists():
        return
    found = Measurements(one for one in Measurements.read(path) if one.op != "machine")
    num_cases = len({(one.op, one.model, one.shape, one.layout) for one in found})
    for rivals, name in ((("dense", "detach"), "stock"), (("aten",), "`aten`")):
        lost = list(losses(found, rivals))
        yield (
            f"Slower than {name} beyond noise (p20 above p80) in the same layout, forward + backward, of {num_cases} "
            f"combinations of shape and layout in {link(path, path.parents[1])}: {'none.' if not lost else ''}".rstrip()
        )
        yield ""
        for own, rival, _ in lost:
            ours, theirs = own[TOTAL].median * 1e3, rival[TOTAL].median * 1e3
            where = f"{own.op} {own.model} {own.shape} {own.layout} ({own.path})"
            yield f"- {where}: {ours:.2f} ms against {rival.path}'s {theirs:.2f}"
        yield ""
