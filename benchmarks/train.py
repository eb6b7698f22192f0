"""`dfs bench train`: a training step of every variant, layout and compile setting, taking turns, on synthetic data."""

from pathlib import Path
from typing import Any

import torch
import torch._dynamo

from dfs_engine.benchmarks.attainable import Gauges
from dfs_engine.benchmarks.breakdown import profile_step
from dfs_engine.benchmarks.measure import (
    Times,
    append_csv,
    cpu_threads,
    environment,
    load_average,
    peak_memory,
    summarise,
    time_phases,
)
from dfs_engine.benchmarks.options import split_ints
from dfs_engine.benchmarks.results import Measurements
from dfs_engine.benchmarks.train_config import BenchTrainConfig, StepCase
from dfs_engine.benchmarks.train_report import TrainReport
from dfs_engine.benchmarks.train_step import Step, StepBuilder
from dfs_engine.checks import split_choices
from dfs_engine.runtime import memory
from dfs_engine.runtime.machine import check_device
from dfs_engine.runtime.progress_bar import progress_bar
from dfs_engine.validate.tolerances import DTYPES

# Of several batch sizes.
_LAPS = 4


def run(config: BenchTrainConfig) -> TrainReport:
    """Times everything that `config` asks for.

    Raises:
        RuntimeError: the gradients of two variants that must agree do not (nothing is timed then), the backend named
            in `config.backend` is not usable, or there is no CUDA device.
    """
    check_device("bench train", config.device)
    # All compiled cases share the models' code; past dynamo's default limit it would refuse the ninth.
    with cpu_threads(config.num_threads), torch._dynamo.config.patch(recompile_limit=64):
        return _run(config)


def _run(config: BenchTrainConfig) -> TrainReport:
    report = TrainReport(config=config, stamp=environment(config.device))
    batch_sizes = split_ints("batch_size", config.batch_size)
    dtypes = split_choices("dtypes", config.dtypes, DTYPES)
    laps = _laps(config)
    turns = sum(rounds + warmup for rounds, warmup in laps)
    with progress_bar(len(batch_sizes) * len(dtypes) * turns, "round", config.progress) as bar:
        for dtype in dtypes:
            rows = _time_cases(config, [StepBuilder(config, size) for size in batch_sizes], dtype, laps, bar)
            report.rows += rows
            if config.output:
                append_csv(Path(config.output), report.stamp, rows.csv_rows())
            # Compiled graphs of this interleaving are not needed again, and guards are checked one after another.
            torch.compiler.reset()
            if "caching" in config.chosen_allocators:
                memory.empty_cache()
    report.loadavg_end = load_average()
    return report


def _on_stock(case: StepCase) -> StepCase:
    return case._replace(allocator="stock")


def _laps(config: BenchTrainConfig) -> list[tuple[int, int]]:
    """Rounds and warm-up of each lap, in which every batch size gets its turn.

    Several batch sizes share the minutes, because a machine is faster in some than in others. Not the rounds: a step of
    another size has its memory elsewhere, so that a few are run in a row.
    """
    count = min(_LAPS, config.rounds) if len(split_ints("batch_size", config.batch_size)) > 1 else 1
    rounds = [config.rounds // count + (lap < config.rounds % count) for lap in range(count)]
    return [(in_lap, config.warmup if lap == 0 else 1) for lap, in_lap in enumerate(rounds)]


def _time_cases(
    config: BenchTrainConfig, builders: list[StepBuilder], dtype: str, laps: list[tuple[int, int]], bar: Any
) -> Measurements:
    """One interleaving: compares, then times, then looks at memory and kernels."""
    built: list[tuple[StepBuilder, dict[StepCase, Step], Times]] = []
    for builder in builders:
        bar.set_description(f"{dtype}, batch {builder.batch_size}: building, compiling, comparing")
        builder.check_formulation(config.cases)
        # One model serves all allocators: it would only be compiled again.
        models = {case: builder.build(case, dtype) for case in dict.fromkeys(map(_on_stock, config.cases))}
        steps = {case: models[_on_stock(case)].on(case.allocator) for case in config.cases}
        builder.check_kernels(dtype, steps)
        if config.dropout:
            for step in models.values():
                step.use_dropout()
        built.append((builder, steps, {}))
    gauges = Gauges(DTYPES[dtype], config.device)
    for rounds, warmup in laps:
        for builder, steps, times in built:
            bar.set_description(f"{dtype}, batch {builder.batch_size}: timing {len(steps)} cases")
            in_lap = time_phases(
                {str(case): step.phases for case, step in steps.items()} | gauges.calls,
                rounds,
                warmup,
                device=config.device,
                max_seconds=None if config.max_seconds is None else config.max_seconds / len(laps),
                on_round=bar.update,
            )
            for name, phases in in_lap.items():
                for phase, seconds in phases.items():
                    times.setdefault(name, {}).setdefault(phase, []).extend(seconds)
    found = Measurements()
    for builder, steps, times in built:
        speeds = gauges.speeds(times)
        timings = summarise(times)
        for case, step in steps.items():
            peak_bytes, flops = peak_memory(step.run, config.device), builder.count_flops(case)
            kernels = profile_step(step.phases) if config.breakdown and case.compile == "off" else {}
            limit = builder.limit(case, dtype, speeds)
            found.append(
                builder.measurement(
                    case, dtype, step.backend_used, timings[str(case)], peak_bytes, flops, kernels, limit
                )
            )
    return found
