"""Whole training steps on the GPU: every variant and backend, eager and compiled, taking turns."""

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import torch
import torch._dynamo

from dfs_engine.benchmarks import gpu_problems
from dfs_engine.benchmarks.gpu_ops import precision
from dfs_engine.benchmarks.gpu_problems import BETA
from dfs_engine.benchmarks.measure import TOTAL, Environment, measure_phases, peak_memory
from dfs_engine.benchmarks.train_report import Case, TrainReport, TrainRow
from dfs_engine.benchmarks.train_step import Step, StepBuilder
from dfs_engine.kernels import config as kernels

_ROUNDS, _WARMUP = 20, 1
_MODELS = (("vgg16_64", 256), ("vgg7_64", 512))
# Most wanted first: (model, batch, precision).
_RUNS = [(*model, name) for name in ("bf16", "tf32", "fp32") for model in _MODELS]
_GATE_BATCH = 8
# Seconds that a case may take to compile and warm up, and all cases of an interleaving to be timed.
_COMPILE, _TIMING = 45.0, 25.0
STOCK, FUSED, AUTO = "aten", "triton", "auto"


def cases(quick: bool) -> list[tuple[Case, str]]:
    """(case, backend of dfs), most wanted first; `auto` where a tuned table can make it something of its own."""
    variants = [("dense", STOCK), ("dfs", FUSED), ("dfs", STOCK), ("detach", STOCK), ("split", STOCK)]
    if kernels.gpu_name() in kernels.read_tables():
        variants.insert(2, ("dfs", AUTO))
    found = [
        (Case(variant, layout, compiled, None if variant == "dense" else BETA), backend)
        for layout, compiled in (("channels_last", "off"), ("channels_last", "on"), ("nchw", "off"))
        for variant, backend in variants
        # dfs works in channels_last whatever it is given.
        if layout == "channels_last" or variant != "dfs"
    ]
    return [(case, backend) for case, backend in found if _is_quick(case)] if quick else found


def _is_quick(case: Case) -> bool:
    return case.layout == "channels_last" and (case.compile == "off" or case.variant in ("dense", "dfs"))


def _config(model: str, backend: str) -> Any:
    """What `StepBuilder` and `TrainReport` read of a configuration."""
    return SimpleNamespace(
        model=model, options={}, backend=backend, variants="", num_classes=1000 if model == "vgg16_64" else 10,
        image_size=None, device=gpu_problems.DEVICE, seed=0,
    )  # fmt: skip


def run(
    stamp: Environment, quick: bool, left: Callable[[], float], say: Callable[[str], None]
) -> Iterator[TrainReport]:
    """One report for each model and precision, until no time is left.

    Raises:
        RuntimeError: at the end, if something failed, e.g. gradients that must agree do not; that was not timed.
    """
    failed: list[str] = []
    for model, batch_size, name in _RUNS[:2] if quick else _RUNS:
        if left() < 30:
            say(f"no time is left for {model} in {name}")
            continue

        def fail(what: str, error: Exception) -> None:
            failed.append(what)
            say(f"FAILED: {what}: {type(error).__name__}: {str(error)[:1000]}")

        # All compiled cases share the models' code; past dynamo's default limit it would refuse the ninth.
        try:
            with precision(name), torch._dynamo.config.patch(recompile_limit=64):
                yield _time(stamp, model, batch_size, name, cases(quick), left, say, fail)
        except Exception as error:
            fail(f"{model} {name}", error)
        torch.compiler.reset()
        torch.cuda.empty_cache()
    if failed:
        raise RuntimeError(f"{len(failed)} failed, see above: {', '.join(failed)}")


def _time(
    stamp: Environment,
    model: str,
    batch_size: int,
    name: str,
    wanted: list[tuple[Case, str]],
    left: Callable[[], float],
    say: Callable[[str], None],
    fail: Callable[[str, Exception], None],
) -> TrainReport:
    """One interleaving: compares on few images, then times all."""
    dtype = "fp32" if name == "tf32" else name
    report = TrainReport(config=_config(model, STOCK), stamp=stamp)
    backends = dict.fromkeys(backend for _, backend in wanted)
    builders = {backend: StepBuilder(_config(model, backend), batch_size) for backend in backends}
    for backend in builders:
        small = StepBuilder(_config(model, backend), _GATE_BATCH)
        gated = list(dict.fromkeys(case._replace(compile="off") for case, own in wanted if own == backend))
        small.check_formulation(gated)
        small.check_kernels(dtype, {case: small.build(case, dtype) for case in gated})
    steps: dict[str, tuple[Case, Step, str]] = {}
    for case, backend in wanted:
        if case.compile == "on" and left() < _COMPILE + _TIMING:
            say(f"{model} {name}: no time to compile {case}/{backend}")
            continue
        step = builders[backend].build(case, dtype)
        try:
            step.run()
        except torch.OutOfMemoryError:
            say(f"{model} {name}: {case}/{backend} does not fit the GPU's memory")
            continue
        except Exception as error:  # e.g. of torch.compile; the other cases still are worth timing
            fail(f"{model} {name} {case}/{backend}", error)
            continue
        steps[f"{case}/{backend}"] = case, step, backend
    timings = measure_phases(
        {key: step.phases for key, (_, step, _) in steps.items()},
        _ROUNDS,
        _WARMUP,
        device=gpu_problems.DEVICE,
        max_seconds=min(_TIMING, max(left() - 5, 1.0)),
    )
    for key, (case, step, backend) in steps.items():
        report.rows.append(
            TrainRow(
                dtype=name,
                case=case,
                shape=tuple(builders[backend].inputs.shape),
                backend_used=AUTO if backend == AUTO else step.backend_used,
                timings=timings[key],
                peak_bytes=peak_memory(step.run, gpu_problems.DEVICE),
                flops=builders[backend].count_flops(case),
            )
        )
    report.finish()
    return report


def targets(report: TrainReport) -> str:
    """The ratios that issue 4 sets targets for, of the fastest triton step of the report."""
    own = [row for row in report.rows if row.backend_used.startswith(FUSED)]
    if not own:
        return f"No {FUSED} step was timed."
    best = min(own, key=lambda row: row.timings[TOTAL].median)
    lines = []
    for name, variants in (("dense", ("dense",)), ("detach or split", ("detach", "split"))):
        rivals = [row for row in report.rows if row.case.variant in variants]
        if rivals:
            rival = min(rivals, key=lambda row: row.timings[TOTAL].median)
            ratio = rival.timings[TOTAL].median / best.timings[TOTAL].median
            lines.append(f"- step: {best.case} {FUSED} is {ratio:.2f} x as fast as the best {name} ({rival.case})")
    eager = [row for row in report.rows if row.case.variant == "dense" and row.case.compile == "off"]
    for row in eager:
        lines.append(f"- peak memory: {best.peak_bytes / row.peak_bytes:.2f} x that of {row.case}")
    return "\n".join(lines)
