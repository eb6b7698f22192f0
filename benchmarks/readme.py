"""Writes the measured tables of README.md from benchmarks/results/: `python -m dfs_engine.benchmarks.readme`.

Each table stands between two markers, `<!-- bench:NAME -->` and `<!-- /bench:NAME -->`; nothing else is touched.
"""

import csv
import re
from collections.abc import Iterator
from pathlib import Path

RESULTS = Path("benchmarks/results")
README = Path("README.md")
Row = dict[str, str]


def latest(path: Path) -> list[Row]:
    """The rows of the newest run of each dtype and shape in a file of measurements."""
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    newest: dict[tuple[str, str], str] = {}
    for row in rows:
        key = (row["dtype"], row["shape"])
        newest[key] = max(newest.get(key, ""), row["timestamp_utc"])
    return [row for row in rows if row["timestamp_utc"] == newest[row["dtype"], row["shape"]]]


def conditions(row: Row, path: Path) -> str:
    """Machine, versions, threads, n, data and file of a table, in one sentence."""
    return (
        f"{row['device_name']}, {row['num_threads']} threads, torch {row['torch']}, load average {row['loadavg']} "
        f"at the start, revision {row['git_sha'][:9]}{' with changes' if row['dirty'] == 'True' else ''}; "
        f"synthetic images; [{path.name}]({path})."
    )


class Case:
    """All metrics of one way to train, from the rows that share everything else."""

    def __init__(self, rows: list[Row]) -> None:
        first = rows[0]
        self.variant, self.layout, self.mode = first["variant"], first["case"].split("/")[-1], first["mode"]
        self.backend = first["backend_used"]
        self.metrics = {row["metric"]: row for row in rows if row["metric"] != "breakdown"}
        self.kernels = {row["op"]: float(row["median"]) for row in rows if row["metric"] == "breakdown"}

    def value(self, metric: str, statistic: str = "median") -> float:
        return float(self.metrics[metric][statistic])

    @property
    def flops(self) -> float:
        return self.value("flops_forward") + self.value("flops_backward")


def cases(rows: list[Row], dtype: str) -> list[Case]:
    """The cases of one dtype, fastest step first."""
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        if row["dtype"] == dtype:
            groups.setdefault(tuple(row[k] for k in ("variant", "case", "mode", "backend_used", "shape")), []).append(
                row
            )
    found = [Case(group) for group in groups.values()]
    return sorted((case for case in found if "step" in case.metrics), key=lambda case: case.value("step"))


def train_table(found: list[Case]) -> Iterator[str]:
    """Every case, its ratios to the best `dense` and the best stock one, and the ceiling that FLOPs allow."""
    stock = [case for case in found if case.variant not in ("dfs", "byot")]
    dense = min((case for case in stock if case.variant == "dense"), key=lambda case: case.value("step"))
    best = min(stock, key=lambda case: case.value("step"))
    yield (
        "| variant | layout | mode | forward ms | backward ms | step ms, median (min) "
        "| vs best `dense` (FLOP ceiling) | vs best stock | peak MB | n |"
    )
    yield "|---|---|---|---|---|---|---|---|---|---|"
    for case in found:
        name = f"**dfs** ({case.backend})" if case.variant == "dfs" else case.variant
        milliseconds = [f"{case.value(phase) * 1e3:.0f}" for phase in ("forward", "backward", "step")]
        cells = [
            *(name, case.layout, case.mode, *milliseconds[:2]),
            f"{milliseconds[2]} ({case.value('step', 'min') * 1e3:.0f})",
            f"{dense.value('step') / case.value('step'):.2f} ({dense.flops / case.flops:.2f})",
            f"{best.value('step') / case.value('step'):.2f}",
            *(f"{case.value('peak_memory') / 1e6:.0f}", case.metrics["step"]["n"]),
        ]
        yield f"| {' | '.join(cells)} |"


def train_section(path: Path) -> Iterator[str]:
    rows = latest(path)
    shape = rows[0]["shape"]
    for dtype in dict.fromkeys(row["dtype"] for row in rows):
        of_dtype = [row for row in rows if row["dtype"] == dtype]
        yield f"Training step, {rows[0]['model']}, input {shape}, {dtype}, beta 0.5. {conditions(of_dtype[0], path)}"
        yield ""
        yield from train_table(cases(rows, dtype))
        yield ""
        # A run of its own, where the long one was disturbed at its end.
        source = path.with_name(f"{path.stem}_breakdown.csv")
        source = source if source.exists() else path
        profiled = cases(latest(source), dtype)
        breakdown = next((case for case in profiled if case.kernels and case.variant == "dfs"), None)
        if breakdown:
            total = sum(breakdown.kernels.values())
            parts = ", ".join(f"{kind} {seconds / total:.0%}" for kind, seconds in breakdown.kernels.items())
            yield f"One `dfs` step by kernel (profiler, CPU time): {parts}. [{source.name}]({source})."
            yield ""


def accuracy_section() -> Iterator[str]:
    """Per-exit accuracy of the recorded CIFAR-10 runs."""
    runs = sorted(RESULTS.glob("cifar10_vgg7_*_metrics.csv"))
    header: list[str] = []
    for path in runs:
        with path.open(newline="") as file:
            rows = list(csv.DictReader(file))
        last = rows[-1]
        exits = [name for name in last if re.fullmatch(r"test_top1_exit\d+", name)]
        if not header:
            header = [f"exit {name.removeprefix('test_top1_exit')}" for name in exits] + ["ensemble"]
            yield (
                "VGG7-64 on CIFAR-10 (real, 50,000 training and 10,000 test images), "
                f"{last['epoch']} epochs, seed 0, one run each, "
                "test top-1 in per cent after the last epoch. Three epochs show that it learns, not what it reaches. "
                "`dfs train --config configs/cifar10_vgg7_short.yaml --model.variant VARIANT --data.root DIR`"
            )
            yield ""
            yield f"| variant | {' | '.join(header)} | file |"
            yield "|---" * (len(header) + 2) + "|"
        values = [f"{float(last[name]):.2f}" for name in [*exits, "test_top1_ensemble"]]
        variant = path.name.removeprefix("cifar10_vgg7_").removesuffix("_metrics.csv")
        yield f"| {variant} | {' | '.join(values)} | [{path.name}]({path}) |"


def headline_section(path: Path) -> Iterator[str]:
    rows = latest(path)
    found = cases(rows, "fp32")
    ours = next(case for case in found if case.variant == "dfs")
    stock = [case for case in found if case.variant not in ("dfs", "byot")]
    yield "| one training step | best form | ms, median | dfs_engine is faster by |"
    yield "|---|---|---|---|"
    yield f"| **dfs_engine** | {ours.layout}, {ours.mode} | **{ours.value('step') * 1e3:.0f}** | |"
    names = {
        "dense": "no surgery (`dense`)",
        "detach": "published formulation (`detach`)",
        "split": "two calls a layer (`split`)",
    }
    for variant, name in names.items():
        best = min(
            (case for case in stock if case.variant == variant), key=lambda case: case.value("step"), default=None
        )
        if best:
            ratio = best.value("step") / ours.value("step")
            yield f"| {name} | {best.layout}, {best.mode} | {best.value('step') * 1e3:.0f} | {ratio:.2f} x |"
    first = next(row for row in rows if row["dtype"] == "fp32")
    yield ""
    rounds = ours.metrics["step"]["n"]
    yield f"VGG7-64, 6 exits, 32 px, batch 100, fp32, beta 0.5, n = {rounds}. {conditions(first, path)}"


def fill(text: str, name: str, lines: Iterator[str]) -> str:
    """`text` with the block `name` replaced."""
    start, end = f"<!-- bench:{name} -->", f"<!-- /bench:{name} -->"
    before, found, rest = text.partition(start)
    _, closed, after = rest.partition(end)
    if not found or not closed:
        raise ValueError(f"README: expected the markers {start} and {end}.")
    return f"{before}{start}\n{chr(10).join(lines).rstrip()}\n{end}{after}"


def main() -> None:
    train = RESULTS / "train_vgg7_64.csv"
    text = README.read_text()
    text = fill(text, "headline", headline_section(train))
    others = [
        path for path in sorted(RESULTS.glob("train_*.csv")) if path.name in ("train_vgg7_64.csv", "train_vgg16_64.csv")
    ]
    text = fill(text, "train", (line for path in others for line in train_section(path)))
    text = fill(text, "accuracy", accuracy_section())
    README.write_text(text)


if __name__ == "__main__":
    main()
