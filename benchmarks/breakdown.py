"""Where the time of one training step goes, by kind of kernel, as torch's profiler sees it on the CPU."""

from collections import defaultdict
from typing import Any

from torch.profiler import ProfilerActivity, profile, record_function

from dfs_engine.benchmarks.measure import Phases

_STEPS = 5
_PHASE = "bench_phase:"

# Kind of work <- how the names of its operators and autograd nodes begin. An operator counts for the outermost one that
# is listed, so that what a fused op calls inside counts for the fused op. Prefixes are tried in this order.
_KINDS = (
    ("convolution grad_input", ("dfs_engine::conv2d_grad_input",)),
    ("convolution grad_weight", ("dfs_engine::conv2d_grad_weight",)),
    ("convolution grad_input + grad_weight", ("aten::convolution_backward",)),
    ("convolution forward", ("dfs_engine::conv2d", "aten::conv2d", "aten::convolution")),
    ("producer backward", ("dfs_engine::norm_act_backward", *(
        f"autograd::engine::evaluate_function: {node}"
        for node in ("NativeBatchNorm", "CudnnBatchNorm", "BatchNorm", "Threshold", "Relu", "MaxPool2D", "Mean")
    ))),
    ("producer forward", (
        "dfs_engine::norm_act", "aten::batch_norm", "aten::relu", "aten::max_pool2d", "aten::mean",
    )),
    ("linear + loss", ("dfs_engine::linear", "aten::linear", "aten::addmm", *(
        f"autograd::engine::evaluate_function: {node}"
        for node in ("Addmm", "Mm", "NllLoss", "LogSoftmax", "LinalgVectorNorm", "Linear")
    ))),
)  # fmt: skip
_PHASE_KINDS = {"loss": "linear + loss", "update": "optimizer"}
OTHER = "other"
KINDS = (*(kind for kind, _ in _KINDS), "optimizer", OTHER)


def profile_step(phases: Phases, steps: int = _STEPS) -> dict[str, float]:
    """Seconds of one step for each of `KINDS` that took any, the mean over `steps`, without idle time.

    Only meaningful for eager CPU work. Kernels of several threads count once, for the thread that waits for them.
    """
    with profile(activities=[ProfilerActivity.CPU]) as recorded:
        for _ in range(steps):
            for name, call in phases.items():
                with record_function(_PHASE + name):
                    call()
    microseconds: dict[str, float] = defaultdict(float)
    for event in recorded.events():
        microseconds[_kind(event)] += event.self_cpu_time_total
    return {kind: microseconds[kind] * 1e-6 / steps for kind in KINDS if microseconds[kind] > 0}


def _kind(event: Any) -> str:
    """Of the outermost listed operator around `event`, itself included; whole phases go first."""
    found = OTHER
    while event is not None:
        name = event.name
        if name.startswith(_PHASE):
            return _PHASE_KINDS.get(name.removeprefix(_PHASE), found)
        found = next((kind for kind, prefixes in _KINDS if name.startswith(prefixes)), found)
        event = event.cpu_parent
    return found
