"""Single ops on the GPU: each gradient by itself on the models' shapes, the fused producer forward and backward.

Device time alone: the host launches while the GPU is still busy with something else.
"""

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch

from dfs_engine.benchmarks import markdown
from dfs_engine.benchmarks.gpu_contests import ATEN, BETA, COMPILED, DENSE, TRITON, Calls, Contest, Way, contests
from dfs_engine.benchmarks.measure import Stats, measure
from dfs_engine.benchmarks.results import Measurement, Measurements
from dfs_engine.benchmarks.shapes import BlockShape, Shape
from dfs_engine.runtime.precision import fp32_precision

_ROUNDS, _WARMUP = 20, 2
# name -> (torch's dtype, whether tf32 is on)
PRECISIONS = {
    "bf16": (torch.bfloat16, False), "fp16": (torch.float16, False), "tf32": (torch.float32, True),
    "fp32": (torch.float32, False),
}  # fmt: skip
MEASURED = ("bf16", "tf32", "fp32")
_WAYS = (DENSE, COMPILED, ATEN, TRITON)
_HEADER = (
    *("op", "metric", "shape", "dtype", "dense", "compiled", "aten", "triton"),
    *("dense /", "compiled /", "aten /", "TFLOP/s", "copy"),
)
# What a shape takes, kernels compiled; with less left none is begun.
SHAPE_SECONDS = 8.0


@contextlib.contextmanager
def precision(name: str) -> Iterator[torch.dtype]:
    """Sets tf32 for a block; gives the storage dtype."""
    dtype, allowed = PRECISIONS[name]
    with fp32_precision("tf32" if allowed else "ieee"):
        yield dtype


def measure_device(calls: Calls, rounds: int, max_seconds: float | None = None) -> dict[Any, Stats]:
    """Seconds of device time of each call, taking turns; no further round starts after `max_seconds`."""
    return measure(calls, rounds, _WARMUP, device="cuda", head_start=True, max_seconds=max_seconds)


def machine_rates() -> dict[str, str]:
    """What stock calls reach: copy bandwidth and square matrix products."""
    num_bytes = 4 * 2**30
    rates = {"copy": f"{num_bytes / copy_seconds(num_bytes) / 1e9:.0f} GB/s"}
    for name in MEASURED:
        with precision(name) as dtype:
            left, right = (torch.randn(4096, 4096, device="cuda").to(dtype) for _ in range(2))
            seconds = measure_device({DENSE: functools.partial(torch.mm, left, right)}, 10)[DENSE].median
            rates[name] = f"{2 * 4096**3 / seconds / 1e12:.0f} TFLOP/s"
    return rates


def copy_seconds(num_bytes: int) -> float:
    """Device time of a copy that reads and writes `num_bytes` together."""
    source = torch.zeros(max(num_bytes // 2, 1), dtype=torch.int8, device="cuda")
    target = torch.empty_like(source)
    return measure_device({DENSE: lambda: target.copy_(source)}, 10)[DENSE].median


def first_shapes(shapes: list[Shape]) -> list[Shape]:
    """The first convolution and the first linear layer of each family, and the first block of all."""
    firsts: dict[Any, Shape] = {}
    for shape in shapes:
        firsts.setdefault((shape.op, "" if isinstance(shape, BlockShape) else shape.family), shape)
    return list(firsts.values())


def run(
    shapes: list[Shape], precisions: Iterable[str], left: Callable[[], float], say: Callable[[str], None]
) -> Iterator[Measurements]:
    """Compares with float64, then times, one shape after another, until no time is left.

    Raises:
        RuntimeError: at the end, if some results were wrong or some calls failed; those were not timed.
    """
    failed: list[str] = []

    def fail(what: str, error: Exception) -> None:
        failed.append(what)
        say(f"FAILED: {what}: {type(error).__name__}: {str(error)[:500]}")

    for name in precisions:
        for index, shape in enumerate(shapes):
            if left() < SHAPE_SECONDS:
                say(f"time is over: {len(shapes) - index} of {len(shapes)} shapes were not measured in {name}")
                break
            what = f"{shape.op} {shape.family} {shape} {name}"
            try:
                yield from _measure(shape, name, left, functools.partial(fail, what))
            except torch.OutOfMemoryError:
                say(f"{what}: does not fit the GPU's memory")
            except Exception as error:
                fail(what, error)
    torch.compiler.reset()
    if failed:
        raise RuntimeError(f"{len(failed)} failed, see above")


def _measure(
    shape: Shape, name: str, left: Callable[[], float], fail: Callable[[Exception], None]
) -> Iterator[Measurements]:
    """One wrong gradient does not keep the other from being timed."""
    with precision(name) as dtype:
        for contest in contests(shape, dtype):
            try:
                contest.check()
                timings = measure_device(contest.calls, _ROUNDS, left())
            except torch.OutOfMemoryError:
                raise
            except Exception as error:
                fail(error)
                continue
            yield measurements(contest, shape, name, timings)


def measurements(contest: Contest, shape: Shape, name: str, timings: dict[Way, Stats]) -> Measurements:
    """Of each way of a contest, all in one interleaving."""
    found = Measurements()
    for way, stats in timings.items():
        counts = {"flops": contest.flops.get(way, 0), "bytes": contest.num_bytes}
        extras = {f"{count}_{contest.metric}": Stats.of([value]) for count, value in counts.items() if value}
        found.append(
            Measurement(
                suite="gpu_ops",
                model=shape.family,
                op=contest.op,
                **way._asdict(),
                dtype=name,
                shape=str(shape),
                layout="channels_last",
                beta=None if way.variant == "dense" else BETA,
                num_live=contest.num_live,
                metrics={contest.metric: stats} | extras,
            )
        )
    return found


def table(rows: list[Measurements]) -> str:
    """Markdown: times in us and triton's ratios; of the fused producer the share of a copy's bandwidth."""
    lines = [
        "Device time in us, medians; ratios: that time over triton's; copy: share of the bandwidth of a copy as large.",
        "",
        *markdown.table(_HEADER, map(_cells, rows)),
    ]
    for wanted, rival in (("grad_input", ATEN), ("grad_weight", ATEN), ("step", DENSE), ("step", COMPILED)):
        found = sorted(
            times[rival] / times[TRITON] for metric, times in map(_medians, rows) if metric == wanted and rival in times
        )
        if found:
            wins = sum(ratio > 1 for ratio in found)
            name = "norm_act forward + backward" if wanted == "step" else wanted
            lines.append(
                f"- {name} against {' '.join(rival)}: at least {found[0]:.2f}, median {found[len(found) // 2]:.2f}, "
                f"faster on {wins} of {len(found)}"
            )
    return "\n".join(lines)


def _medians(row: Measurements) -> tuple[str, dict[Way, float]]:
    """A contest's metric, and the seconds of each way."""
    (metric,) = row[0].timings
    return metric, {Way(one.variant, one.backend_used, one.mode): one[metric].median for one in row}


def _cells(row: Measurements) -> list[str]:
    metric, times = _medians(row)
    first, (ours,) = row[0], row.of(backend_used="triton")
    seconds = [f"{times[way] * 1e6:.1f}" if way in times else "-" for way in _WAYS]
    ratios = [f"{times[way] / times[TRITON]:.2f}" if way in times else "-" for way in _WAYS[:-1]]
    rate = f"{ours.flops_of(metric) / times[TRITON] / 1e12:.0f}" if ours.flops_of(metric) else "-"
    num_bytes = f"bytes_{metric}"
    share = f"{copy_seconds(int(ours[num_bytes].median)) / times[TRITON]:.0%}" if num_bytes in ours else "-"
    return [first.op, metric, f"{first.model} {first.shape}", first.dtype, *seconds, *ratios, rate, share]
