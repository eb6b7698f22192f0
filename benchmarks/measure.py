"""Timing that can be believed: variants take turns in one process, and every number carries its conditions.

Timed one after another, two variants meet two different machines: what else runs, clock speed and caches change. Taking
turns, they meet the same one.
"""

import contextlib
import csv
import io
import os
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from dfs_engine.runtime.doctor import version_of
from dfs_engine.runtime.machine import cpu_and_instructions, num_cores

CSV_COLUMNS = (
    "timestamp_utc", "git_sha", "dirty", "suite", "case", "model", "op", "mode", "variant", "backend_used",
    "device_name", "num_threads", "dtype", "shape", "start", "stop", "metric", "unit", "median", "min", "p20", "p80",
    "n", "loadavg", "torch", "triton",
)  # fmt: skip

# Or every profile would announce itself; read when the first one starts.
os.environ.setdefault("KINETO_LOG_LEVEL", "6")

# Cycles that a GPU idles for a head start: about half a millisecond.
_HEAD_START = 1_000_000

Phases = dict[str, Callable[[], object]]
# Name of a variant -> phase -> seconds of every round.
Times = dict[str, dict[str, list[float]]]
TOTAL = "step"


@dataclass(frozen=True, slots=True)
class Stats:
    """Order statistics of n measurements. `min` is what the code can do, `median` what it did on this machine."""

    median: float
    min: float
    p20: float
    p80: float
    n: int

    @classmethod
    def of(cls, values: Sequence[float]) -> "Stats":
        """Order statistics of at least one value."""
        ordered = sorted(values)
        last = len(ordered) - 1
        return cls(
            statistics.median(ordered), ordered[0], ordered[round(0.2 * last)], ordered[round(0.8 * last)], len(ordered)
        )


@dataclass(frozen=True, slots=True)
class Environment:
    """The conditions of a run. `busy`: something else was using the cores when it started, so distrust its medians."""

    timestamp_utc: str
    git_sha: str
    dirty: bool
    device_name: str
    num_threads: int
    num_cores: int
    loadavg: float
    busy: bool
    torch: str
    triton: str

    def __str__(self) -> str:
        load = f"load average {self.loadavg:.2f} on {self.num_cores} cores at the start"
        dirty = "-dirty" if self.dirty else ""
        text = (
            f"{self.timestamp_utc} | {self.device_name}, {self.num_threads} threads | torch {self.torch}, "
            f"triton {self.triton or 'none'} | git {self.git_sha}{dirty} | {load}"
        )
        return f"{text}\nBUSY MACHINE: other work held the cores at the start; repeat the run." if self.busy else text


def environment(device: str = "cpu") -> Environment:
    """Stamps the conditions; call it before the first work."""
    load = load_average()
    return Environment(
        timestamp_utc=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        git_sha=_git("rev-parse", "--short=12", "HEAD") or "unknown",
        dirty=bool(_git("status", "--porcelain", "--untracked-files=no")),
        device_name=cpu_and_instructions() if device == "cpu" else torch.cuda.get_device_name(device),
        num_threads=torch.get_num_threads(),
        num_cores=num_cores(),
        loadavg=load,
        busy=load > num_cores(),
        torch=str(torch.__version__),
        triton=version_of("triton") or "",
    )


def load_average() -> float:
    """Of the last minute."""
    return round(os.getloadavg()[0], 2)


@contextlib.contextmanager
def cpu_threads(num_threads: int | None) -> Iterator[None]:
    """Sets torch's number of threads for a block; None: leaves it as it is."""
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _git(*arguments: str) -> str:
    """Output of git in the source tree of this file; empty where that is no checkout."""
    command = ["git", "-C", str(Path(__file__).resolve().parent), *arguments]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def measure(
    variants: dict[str, Callable[[], object]],
    rounds: int = 20,
    warmup: int = 2,
    **options: Any,
) -> dict[str, Stats]:
    """Seconds per call of each variant, taking turns; `options` as `measure_phases`."""
    results = measure_phases({name: {TOTAL: call} for name, call in variants.items()}, rounds, warmup, **options)
    return {name: phases[TOTAL] for name, phases in results.items()}


def measure_phases(
    variants: dict[str, Phases],
    rounds: int = 20,
    warmup: int = 2,
    **options: Any,
) -> dict[str, dict[str, Stats]]:
    """Seconds of each phase of each variant, and of the whole as "step"; `options` as `time_phases`."""
    return summarise(time_phases(variants, rounds, warmup, **options))


def summarise(times: Times) -> dict[str, dict[str, Stats]]:
    return {name: {phase: Stats.of(values) for phase, values in phases.items()} for name, phases in times.items()}


def time_phases(
    variants: dict[str, Phases],
    rounds: int,
    warmup: int,
    *,
    device: str = "cpu",
    head_start: bool = False,
    max_seconds: float | None = None,
    on_round: Callable[[], object] = lambda: None,
) -> Times:
    """Seconds of each phase of each variant, and of the whole as "step", in every round, taking turns in one process.

    Args:
        variants: name -> phases, which run in order.
        rounds: turns of every variant. They start with another variant each time, so that none always has the same
            predecessor in the caches.
        warmup: turns before that, not timed: compilation, memory pools, oneDNN's primitive cache.
        device: on "cuda", device events are read after a synchronisation, and the L2 cache is flushed before each turn.
        head_start: on "cuda", the device idles before each turn, not timed, so that what the host takes to launch a few
            kernels is not timed either.
        max_seconds: start no further round after this time, but finish the one that runs: every variant has the same n.
        on_round: called after every round, warm-up included.
    """
    if rounds < 1 or not variants:
        raise ValueError(
            f"measure: expected rounds >= 1 and at least one variant, got rounds={rounds}, {len(variants)} variants."
        )
    run = _CudaClock(head_start).run if torch.device(device).type == "cuda" else _run_on_cpu
    for _ in range(warmup):
        for phases in variants.values():
            run(phases)
        on_round()
    names = list(variants)
    times: Times = {name: {} for name in names}
    begin = time.perf_counter()
    for turn in range(rounds):
        for offset in range(len(names)):
            name = names[(turn + offset) % len(names)]
            for phase, seconds in run(variants[name]).items():
                times[name].setdefault(phase, []).append(seconds)
        on_round()
        if max_seconds is not None and time.perf_counter() - begin > max_seconds:
            break
    return times


def _run_on_cpu(phases: Phases) -> dict[str, float]:
    marks = [time.perf_counter()]
    for call in phases.values():
        call()
        marks.append(time.perf_counter())
    return _differences(phases, marks)


class _CudaClock:
    def __init__(self, head_start: bool) -> None:
        self.head_start = head_start
        # Larger than any L2 cache.
        self.flush = torch.empty(256 * 2**20, dtype=torch.int8, device="cuda")

    def run(self, phases: Phases) -> dict[str, float]:
        events = [torch.cuda.Event(enable_timing=True) for _ in range(len(phases) + 1)]
        self.flush.zero_()
        torch.cuda.synchronize()
        if self.head_start:
            torch.cuda._sleep(_HEAD_START)
        events[0].record()
        for call, event in zip(phases.values(), events[1:], strict=True):
            call()
            event.record()
        torch.cuda.synchronize()
        return _differences(phases, [events[0].elapsed_time(event) / 1000 for event in events])


def _differences(phases: Phases, marks: list[float]) -> dict[str, float]:
    parts = {name: end - begin for name, begin, end in zip(phases, marks, marks[1:], strict=False)}
    return parts | {TOTAL: marks[-1] - marks[0]}


def peak_memory(call: Callable[[], object], device: str = "cpu") -> int:
    """Bytes that torch's allocator held at the worst moment of `call`, beyond what it held before.

    On CUDA: `max_memory_allocated`. On the CPU the same quantity, from the allocator's own events: unlike the process's
    resident size it has no history (memory that an earlier variant or the compiler left in the heap) and is exact to
    the byte. Scratch memory that oneDNN or a kernel takes from malloc by itself is not in it.
    """
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        call()
    assert recorded.profiler is not None
    events = [event for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def append_csv(path: Path, stamp: Environment, rows: Sequence[dict[str, Any]]) -> None:
    """Appends one line per measurement in `CSV_COLUMNS`; a column that is not in `stamp` or the row stays empty."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = io.StringIO()
    writer = csv.DictWriter(text, CSV_COLUMNS)
    before = path.read_bytes() if path.exists() else b""
    if not before:
        writer.writeheader()
    elif not before.endswith(b"\n"):
        text.write("\r\n")  # a run was killed while it wrote
    shared = {name: value for name, value in asdict(stamp).items() if name in CSV_COLUMNS}
    writer.writerows(shared | row for row in rows)
    with path.open("ab") as file:
        file.write(text.getvalue().encode())  # at once, so that a run that is killed leaves whole measurements


def read_csv(path: Path) -> list[dict[str, str]]:
    """The whole lines of a file, by the names of its columns; none where it is not there.

    A run that was killed while it wrote may have left a part of one.
    """
    if not path.is_file():
        return []
    with path.open(newline="") as file:
        return [row for row in csv.DictReader(file) if None not in row.values()]
