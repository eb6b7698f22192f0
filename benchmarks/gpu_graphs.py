"""A training step as one CUDA graph, and what torch's profiler sees of a step."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from dfs_engine.benchmarks import gpu_contests
from dfs_engine.benchmarks.measure import TOTAL, Phases, peak_memory
from dfs_engine.benchmarks.train_step import Step

_WARMUP, _PROFILED, _ROWS = 3, 2, 40
# A larger trace is thrown away: its table tells most of it.
_TRACE_BYTES = 12 * 2**20


def capture(step: Step) -> tuple[Phases, int]:
    """A whole step, its four phases recorded as one graph, and the bytes that it held meanwhile.

    `step` has to outlive the graph, which reads and writes its tensors.
    """
    replays: list[Callable[[], object]] = []
    peak_bytes = peak_memory(lambda: replays.append(record(step.run)), gpu_contests.DEVICE)
    return {TOTAL: replays[0]}, peak_bytes


def record(call: Callable[[], object]) -> Callable[[], object]:
    """What `call` launches, as a graph to be replayed. It runs a few times before, on a stream of its own."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(_WARMUP):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def write_profile(step: Step, path: Path) -> str:
    """Profiles a step that has run before: the kernels that took longest as a table in `path`.txt, which is returned.

    A trace for chrome://tracing or Perfetto lies beside it unless it is large.
    """
    on_gpu = gpu_contests.DEVICE == "cuda"
    with profile(activities=[ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * on_gpu]) as recorded:
        for _ in range(_PROFILED):
            step.run()
        if on_gpu:
            torch.cuda.synchronize()
    order = f"self_{'device' if on_gpu else 'cpu'}_time_total"
    table = recorded.key_averages().table(sort_by=order, row_limit=_ROWS, max_name_column_width=90)
    path.with_suffix(".txt").write_text(table)
    trace = path.with_suffix(".json.gz")
    recorded.export_chrome_trace(str(trace))
    if trace.stat().st_size > _TRACE_BYTES:
        trace.unlink()
    return table
