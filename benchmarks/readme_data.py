"""Measurements read back from benchmarks/results/, for README."""

import csv
from pathlib import Path
from typing import NamedTuple

Row = dict[str, str]
# Multi-exit training in stock PyTorch: without surgery, and two formulations of it.
STOCK = ("dense", "detach", "split")


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
        f"synthetic data; {link(path)}."
    )


def link(path: Path) -> str:
    """Markdown."""
    return f"[{path.name}]({path})"


class Case:
    """All metrics of one way to train, from the rows that share everything else."""

    def __init__(self, rows: list[Row]) -> None:
        first = rows[0]
        self.variant, self.layout, self.mode = first["variant"], first["case"].split("/")[-1], first["mode"]
        self.backend, self.batch = first["backend_used"], int(first["shape"].split("x")[0])
        self.metrics = {row["metric"]: row for row in rows if row["metric"] != "breakdown"}
        self.kernels = {row["op"]: float(row["median"]) for row in rows if row["metric"] == "breakdown"}

    def value(self, metric: str, statistic: str = "median") -> float:
        return float(self.metrics[metric][statistic])

    @property
    def allocator(self) -> str:
        return "caching" if self.mode.endswith(", caching") else "stock"

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


def best_of(found: list[Case], variants: tuple[str, ...] = STOCK, allocator: str = "stock") -> Case | None:
    """The fastest form of `variants` on the memory of `allocator`; `found` is sorted."""
    return next((case for case in found if case.variant in variants and case.allocator == allocator), None)


class Comparison(NamedTuple):
    """The fastest `dfs` step against the fastest of `rivals` on PyTorch's own memory."""

    ours: Case
    median: float
    min: float
    flops: float
    """What FLOPs alone imply."""
    one_allocator: float
    """As `median`, with the rivals on the memory of `ours`."""


def compare(found: list[Case], rivals: tuple[str, ...] = STOCK) -> Comparison | None:
    """None where `found`, which is sorted, lacks one of the steps compared."""
    ours = next((case for case in found if case.variant == "dfs"), None)
    best = best_of(found, rivals)
    same = best_of(found, rivals, ours.allocator) if ours else None
    if ours is None or best is None or same is None:
        return None
    fastest = min(
        case.value("step", "min") for case in found if case.variant in rivals and case.allocator == best.allocator
    )
    step = ours.value("step")
    return Comparison(
        ours,
        median=best.value("step") / step,
        min=fastest / ours.value("step", "min"),
        flops=best.flops / ours.flops,
        one_allocator=same.value("step") / step,
    )
