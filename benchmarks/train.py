"""`dfs bench train`: a training step of every variant, layout and compile setting, taking turns, on synthetic data."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch._dynamo

from dfs_engine.benchmarks.breakdown import profile_step
from dfs_engine.benchmarks.measure import Times, append_csv, environment, peak_memory, summarise, time_phases
from dfs_engine.benchmarks.options import LAYOUTS, check_least, split_ints
from dfs_engine.benchmarks.train_report import Case, TrainReport, TrainRow
from dfs_engine.benchmarks.train_step import UNSPLIT, Step, StepBuilder
from dfs_engine.checks import check_choice, split_betas, split_choices
from dfs_engine.models import VARIANTS, check_model
from dfs_engine.runtime import backend as backends
from dfs_engine.runtime import memory
from dfs_engine.runtime.machine import check_device
from dfs_engine.runtime.progress_bar import progress_bar
from dfs_engine.validate.tolerances import DTYPES

# Of several batch sizes.
_LAPS = 4


@dataclass(frozen=True, kw_only=True, slots=True)
class BenchTrainConfig:
    """What `dfs bench train` times. Lists are comma-separated.

    Data is synthetic: normal images or random tokens, random labels. Dropout is off, so that the variants can be
    compared.

    Attributes:
        model: A model's name, as of `dfs train --model.name`.
        options: The family's own options, for example {config: {num_hidden_layers: 6}} of a BERT.
        batch_size: Images (or texts of 128 tokens) per step. Each is a measurement of its own.
        variants: Some of dense, detach, split, dfs, and byot (BYOT's loss on the dense model).
        layouts: Some of nchw, channels_last; one is enough for a model of linear layers.
        compile: Some of off, on (torch.compile, whole graph).
        allocators: Some of stock, caching (dfs_engine.memory, with which `dfs train` runs); "auto" is both where it is
            there, on the CPU with the C++ extension.
        dtypes: Some of fp32, bf16, fp16 (autocast, float32 parameters), fp64. Each is a measurement of its own.
        beta: Shares of channels that the deeper layers train, timed in turns with each other.
        backend: Kernels of the dfs variant: auto, aten, cpp or triton.
        num_classes: Width of every exit's logits.
        image_size: Height and width of the images. Default: what the model was made for.
        rounds: How often every case is timed; at least 20 for numbers to publish.
        warmup: How often it runs before that, not timed.
        max_seconds: Start no further round of a measurement after this time; all its cases have the same n. Default:
            no limit.
        num_threads: CPU threads. Default: torch's.
        device: cpu or cuda.
        seed: Of the random weights and data.
        breakdown: Profile the eager cases too, and say where a step's time goes.
        output: CSV file to append the measurements to. Default: none.
        progress: Show a progress bar in a terminal.
    """

    model: str = "vgg7_64"
    options: dict[str, Any] = field(default_factory=dict)
    batch_size: str = "100"
    variants: str = "dense,detach,split,dfs"
    layouts: str = "nchw,channels_last"
    compile: str = "off,on"
    allocators: str = "auto"
    dtypes: str = "fp32,bf16"
    beta: str = "0.5"
    backend: str = "auto"
    num_classes: int = 10
    image_size: int | None = None
    rounds: int = 20
    warmup: int = 2
    max_seconds: float | None = None
    num_threads: int | None = None
    device: str = "cpu"
    seed: int = 0
    breakdown: bool = False
    output: str = ""
    progress: bool = True

    def __post_init__(self) -> None:
        check_model(self.model)
        split_ints("batch_size", self.batch_size)
        split_choices("variants", self.variants, (*VARIANTS, "byot"))
        split_choices("layouts", self.layouts, LAYOUTS)
        split_choices("compile", self.compile, ("off", "on"))
        if "caching" in self._allocators and not self._has_caching:
            raise ValueError(
                f"allocators: expected stock with device {self.device}, got {self.allocators}: the caching allocator "
                "is one of CPU memory and part of the C++ extension."
            )
        split_choices("dtypes", self.dtypes, DTYPES)
        split_betas("beta", self.beta)
        check_choice("backend", self.backend, ("auto", *backends.BACKENDS))
        check_choice("device", self.device, ("cpu", "cuda"))
        check_least(self, dict.fromkeys(("rounds", "warmup", "num_threads", "image_size"), 1))

    @property
    def _has_caching(self) -> bool:
        return self.device == "cpu" and memory.is_available()

    @property
    def _allocators(self) -> list[str]:
        if self.allocators == "auto":
            return ["stock", "caching"] if self._has_caching else ["stock"]
        return split_choices("allocators", self.allocators, ("stock", "caching"))

    @property
    def cases(self) -> list[Case]:
        """One interleaving: what is timed for each batch size and dtype."""
        return [
            Case(variant, layout, compiled, beta, allocator)
            for variant in split_choices("variants", self.variants, (*VARIANTS, "byot"))
            for beta in ([None] if variant in UNSPLIT else split_betas("beta", self.beta))
            for layout in split_choices("layouts", self.layouts, LAYOUTS)
            for compiled in split_choices("compile", self.compile, ("off", "on"))
            for allocator in self._allocators
        ]


def run(config: BenchTrainConfig) -> TrainReport:
    """Times everything that `config` asks for.

    Raises:
        RuntimeError: the gradients of two variants that must agree do not (nothing is timed then), the backend named
            in `config.backend` is not usable, or there is no CUDA device.
    """
    check_device("bench train", config.device)
    num_threads_before = torch.get_num_threads()
    torch.set_num_threads(config.num_threads or num_threads_before)
    try:
        # All compiled cases share the models' code; past dynamo's default limit it would refuse the ninth.
        with torch._dynamo.config.patch(recompile_limit=64):
            return _run(config)
    finally:
        torch.set_num_threads(num_threads_before)


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
                append_csv(Path(config.output), report.stamp, report.csv_rows(rows))
            # Compiled graphs of this interleaving are not needed again, and guards are checked one after another.
            torch.compiler.reset()
            if "caching" in config._allocators:
                memory.empty_cache()
    report.finish()
    return report


def _on_stock(case: Case) -> Case:
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
) -> list[TrainRow]:
    """One interleaving: compares, then times, then looks at memory and kernels."""
    built: list[tuple[StepBuilder, dict[Case, Step], Times]] = []
    for builder in builders:
        bar.set_description(f"{dtype}, batch {builder.batch_size}: building, compiling, comparing")
        builder.check_formulation(config.cases)
        # One model serves all allocators: it would only be compiled again.
        models = {case: builder.build(case, dtype) for case in dict.fromkeys(map(_on_stock, config.cases))}
        steps = {case: models[_on_stock(case)].on(case.allocator) for case in config.cases}
        builder.check_kernels(dtype, steps)
        built.append((builder, steps, {}))
    for rounds, warmup in laps:
        for builder, steps, times in built:
            bar.set_description(f"{dtype}, batch {builder.batch_size}: timing {len(steps)} cases")
            in_lap = time_phases(
                {str(case): step.phases for case, step in steps.items()},
                rounds,
                warmup,
                device=config.device,
                max_seconds=None if config.max_seconds is None else config.max_seconds / len(laps),
                on_round=bar.update,
            )
            for name, phases in in_lap.items():
                for phase, seconds in phases.items():
                    times.setdefault(name, {}).setdefault(phase, []).extend(seconds)
    return [
        TrainRow(
            dtype=dtype,
            case=case,
            shape=tuple(builder.inputs.shape),
            backend_used=step.backend_used,
            timings=timings[str(case)],
            peak_bytes=peak_memory(step.run, config.device),
            flops=builder.count_flops(case),
            kernels=profile_step(step.phases) if config.breakdown and case.compile == "off" else {},
        )
        for builder, steps, times in built
        for timings in [summarise(times)]
        for case, step in steps.items()
    ]
