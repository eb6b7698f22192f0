"""Whole training steps on the GPU, pair by pair: a step, and `dense` in the same mode, taking turns."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
import torch._dynamo

from dfs_engine.benchmarks import gpu_contests
from dfs_engine.benchmarks.gpu_contests import BETA
from dfs_engine.benchmarks.gpu_graphs import capture
from dfs_engine.benchmarks.gpu_ops import precision
from dfs_engine.benchmarks.gpu_run import device_is_lost
from dfs_engine.benchmarks.measure import TOTAL, Phases, Stats, peak_memory, summarise, time_phases
from dfs_engine.benchmarks.results import Measurement
from dfs_engine.benchmarks.step_models import StepModel
from dfs_engine.benchmarks.train_config import BenchTrainConfig, StepCase
from dfs_engine.benchmarks.train_report import case_of
from dfs_engine.benchmarks.train_step import Step, StepBuilder
from dfs_engine.evaluation.flops import FlopCount

_ROUNDS, _WARMUP, _GATE_BATCH = 20, 2, 8
# Seconds that all rounds of a pair may take, and that a pair takes with all that comes before it; with less left none
# is begun.
_TIMING = 15.0
SECONDS = {"off": 20.0, "captured": 25.0, "on": 75.0, "reduce-overhead": 75.0}
# Backends.
UNFUSED, FUSED, AUTO = "aten", "triton", "auto"


class Pair(NamedTuple):
    """A variant beside `dense`, both run in one mode (`StepCase.compile`); `backend` is that of dfs."""

    mode: str
    variant: str = "dfs"
    backend: str = UNFUSED

    def case(self, variant: str) -> StepCase:
        return StepCase(variant, "channels_last", self.mode, None if variant == "dense" else BETA)

    def __str__(self) -> str:
        return f"{self.case(self.variant)}{f' by {self.backend}' if self.variant == 'dfs' else ''}"


# A model and a pair, in order.
Plan = list[tuple[StepModel, Pair]]

_EAGER = (Pair("off", backend=FUSED), Pair("off"))
_COMPILED = (Pair("on", backend=FUSED), Pair("on"))
_RIVALS = (Pair("off", "detach"), Pair("off", "split"), Pair("on", "detach"))
_TUNED = (Pair("off", backend=AUTO), Pair("on", backend=AUTO), Pair("on", backend=FUSED))
_GRAPHS = (
    Pair("captured", backend=FUSED), Pair("captured"), Pair("reduce-overhead", backend=FUSED), Pair("reduce-overhead"),
)  # fmt: skip


def plan(models: list[StepModel]) -> Plan:
    """Most wanted first: all of the first model's, then the others' eager steps, then what takes long to compile."""
    first, others = models[:1], models[1:]
    ours = [*_EAGER, *_COMPILED]
    return [*_each(ours, first), *_each(ours, others), *_each(_RIVALS, models)]


def tuned_plan(models: list[StepModel]) -> Plan:
    """What this GPU's table can make faster."""
    return _each(_TUNED, models)


def graphs_plan(models: list[StepModel]) -> Plan:
    """With CUDA graphs: a whole step as one, and torch.compile's."""
    return _each(_GRAPHS, models)


def _each(pairs: Sequence[Pair], models: list[StepModel]) -> Plan:
    """Mode by mode; in one, a model's pairs follow each other and share its `dense`."""
    modes = dict.fromkeys(pair.mode for pair in pairs)
    return [(model, pair) for mode in modes for model in models for pair in pairs if pair.mode == mode]


class PairResult(NamedTuple):
    """Two steps that took turns. The other's "speedup" is dense's time over its own, round by round."""

    dense: Measurement
    other: Measurement

    def __str__(self) -> str:
        """One line."""
        dense, other = self
        by_flops, speedup = dense.flops / other.flops, other["speedup"]
        peaks = [one["peak_memory"].median / 2**30 for one in self]
        return (
            f"{other.model} {other.dtype} {case_of(other)} by {other.backend_used}: "
            f"{other[TOTAL].median * 1e3:.2f} ms, dense {dense[TOTAL].median * 1e3:.2f} ms: {speedup.median:.3f} x "
            f"({speedup.p20:.3f} to {speedup.p80:.3f}, n = {speedup.n}; FLOPs alone {by_flops:.2f}); "
            f"peak {peaks[1]:.1f} GiB, dense {peaks[0]:.1f}"
        )


def run(plan: Plan, name: str, left: Callable[[], float], say: Callable[[str], None]) -> Iterator[PairResult]:
    """Every pair of the plan in precision `name`, until no time is left.

    Raises:
        RuntimeError: at the end, if something failed, e.g. gradients that must agree do not; that was not timed.
    """
    benches: dict[str, _Bench] = {}
    failed: list[str] = []
    for model, pair in plan:
        what = f"{model.name} {name} {pair}"
        reason = model.missing()
        if reason is None and left() < SECONDS[pair.mode]:
            reason = "no time is left"
        if reason is not None:
            say(f"{what}: left out, {reason}")
            continue
        for other in benches.keys() - {model.name}:
            benches[other].free()
        try:
            # Compiled cases share the models' code; past dynamo's default limit it would refuse the ninth.
            with precision(name), torch._dynamo.config.patch(recompile_limit=64):
                if model.name not in benches:
                    benches[model.name] = _Bench(model, name)
                result = benches[model.name].time(pair, left)
        except torch.OutOfMemoryError:
            say(f"{what}: does not fit the GPU's memory")
        except Exception as error:  # e.g. of torch.compile; the other pairs still are worth timing
            failed.append(what)
            say(f"FAILED: {what}: {type(error).__name__}: {str(error)[:1000]}")
            if device_is_lost():
                break
        else:
            yield result
    torch.compiler.reset()
    if failed:
        raise RuntimeError(f"{len(failed)} failed, see above: {', '.join(failed)}")


class _Built(NamedTuple):
    """A step that has run, so that it is compiled and fits; `step` keeps alive what a graph reads and writes."""

    step: Step
    phases: Phases
    untimed: Measurement

    def measurement(self, metrics: dict[str, Stats]) -> Measurement:
        return replace(self.untimed, metrics=metrics | self.untimed.metrics)


class _Bench:
    """One model in one precision: checks each formulation once, on few images, and keeps the `dense` step of a mode."""

    def __init__(self, model: StepModel, name: str) -> None:
        config = _config(model)
        self.name, self.dtype = name, _dtype(name)
        self.builder, self.small = StepBuilder(config, model.batch), StepBuilder(config, _GATE_BATCH)
        self._checked: set[Pair] = set()
        self._flops: dict[str, FlopCount] = {}
        self._dense: tuple[Pair, _Built] | None = None

    def time(self, pair: Pair, left: Callable[[], float]) -> PairResult:
        """Raises RuntimeError where the step does not compute what it must; it is not timed then."""
        self._check(pair._replace(mode="off"))
        dense_pair = Pair(pair.mode, "dense")
        if self._dense is None or self._dense[0] != dense_pair:
            self.free()  # before the next one takes memory
            self._dense = dense_pair, self._build(dense_pair)
        dense, other = self._dense[1], self._build(pair)
        times = time_phases(
            {"dense": dense.phases, "other": other.phases},
            _ROUNDS,
            _WARMUP,
            device=gpu_contests.DEVICE,
            max_seconds=min(_TIMING, max(left() - 2, 1.0)),
        )
        # Nothing that could fail stands between the measurement and whoever writes it.
        rounds = zip(times["dense"][TOTAL], times["other"][TOTAL], strict=True)
        timings = summarise(times)
        timings["other"]["speedup"] = Stats.of([first / second for first, second in rounds])
        return PairResult(dense.measurement(timings["dense"]), other.measurement(timings["other"]))

    def free(self) -> None:
        """Gives up the step that is kept, and what was compiled for it."""
        if self._dense is not None:
            self._dense = None
            torch.compiler.reset()
            torch.cuda.empty_cache()

    def _check(self, pair: Pair) -> None:
        if pair not in self._checked:
            case = pair.case(pair.variant)
            if all(checked.variant != pair.variant for checked in self._checked):
                self.small.check_formulation([case])
            self.small.check_kernels(self.dtype, {case: self.small.build(case, self.dtype, backend=pair.backend)})
            self._checked.add(pair)

    def _build(self, pair: Pair) -> _Built:
        case = pair.case(pair.variant)
        if pair.variant not in self._flops:
            self._flops[pair.variant] = self.builder.count_flops(case)
        step = self.builder.build(case, self.dtype, backend=pair.backend)
        step.run()
        if pair.mode == "captured":
            phases, peak_bytes = capture(step)
        else:
            phases, peak_bytes = step.phases, peak_memory(step.run, gpu_contests.DEVICE)
        used = AUTO if pair.variant == "dfs" and pair.backend == AUTO else step.backend_used
        untimed = self.builder.measurement(case, self.name, used, {}, peak_bytes, self._flops[pair.variant])
        return _Built(step, phases, untimed)


def build(model: StepModel, name: str, pair: Pair) -> Step:
    """One step, for a profile: it has run once."""
    builder = StepBuilder(_config(model), model.batch)
    step = builder.build(pair.case(pair.variant), _dtype(name), backend=pair.backend)
    step.run()
    return step


def _dtype(name: str) -> str:
    """What `StepBuilder` calls a precision."""
    return "fp32" if name == "tf32" else name


def _config(model: StepModel) -> BenchTrainConfig:
    return BenchTrainConfig(
        model=model.name, options=model.options, backend=UNFUSED, num_classes=model.num_classes,
        image_size=model.image_size, device=gpu_contests.DEVICE,
    )  # fmt: skip
