"""`dfs bench gradients`: each exit's own gradient, by this engine, by autograd and by torchjd, taking turns."""

import copy
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from dfs_engine.benchmarks import markdown
from dfs_engine.benchmarks.measure import (
    TOTAL,
    Environment,
    Phases,
    Stats,
    append_csv,
    cpu_threads,
    environment,
    load_average,
    measure_phases,
    peak_memory,
)
from dfs_engine.benchmarks.options import LAYOUTS, check_least
from dfs_engine.benchmarks.results import Measurement, Measurements
from dfs_engine.checks import check_choice, split_choices
from dfs_engine.gradients import ExitGradients, exit_gradients
from dfs_engine.models import MultiExitModel, check_model, create_model
from dfs_engine.nn import exit_loss
from dfs_engine.partition import EXIT_GRADIENTS, check_beta
from dfs_engine.runtime import memory
from dfs_engine.runtime.extras import needs
from dfs_engine.runtime.machine import check_device
from dfs_engine.runtime.progress_bar import progress_bar
from dfs_engine.validate.tolerances import TOLERANCES

# What computes the gradients: torch.autograd.grad, one call an exit, and torchjd's autojac, both of `detach`.
FORMS = ("autograd", "torchjd", "dfs")
_GATE_BATCH = 2
# As of training steps: roundings add up in a network, and flip ReLUs and max pools, in stock PyTorch as here.
_NOISE_MARGIN = 4
_DRAWS = 3


class GradientCase(NamedTuple):
    """One way to compute them."""

    form: str
    exit_gradient: str
    layout: str
    allocator: str = "stock"

    def __str__(self) -> str:
        return f"{self.form}/{self.exit_gradient}/{self.layout}/{self.allocator}"


@dataclass(frozen=True, kw_only=True, slots=True)
class BenchGradientsConfig:
    """What `dfs bench gradients` times. Lists are comma-separated.

    Data is synthetic: normal images or random tokens, random labels. Dropout is off.

    Attributes:
        model: A model's name, as of `dfs train --model.name`.
        options: The family's own options, for example {growth: 6} of an MSDNet.
        batch_size: Images (or texts of 128 tokens) of a batch.
        forms: Some of autograd (torch.autograd.grad, an exit at a time, by the parameters that it reaches), torchjd
            (its autojac, an exit at a time; needs torchjd) and dfs (this engine). The first two in variant detach.
        exit_gradients: Some of own, whole. Default: the family's.
        layouts: Some of nchw, channels_last; one is enough for a model of linear layers.
        allocators: Some of stock, caching (dfs_engine.memory) for dfs; "auto" is both where it is there.
        beta: Share of channels that the deeper layers train.
        num_classes: Width of every exit's logits.
        image_size: Height and width of the images. Default: what the model was made for.
        rounds: How often every case is timed; at least 20 for numbers to publish.
        warmup: How often it runs before that, not timed.
        max_seconds: Start no further round after this time; all cases have the same n. Default: no limit.
        num_threads: CPU threads. Default: torch's.
        device: cpu or cuda.
        seed: Of the random weights and data.
        output: CSV file to append the measurements to. Default: none.
        progress: Show a progress bar in a terminal.
    """

    model: str = "vgg7_64"
    options: dict[str, Any] = field(default_factory=dict)
    batch_size: int = 100
    forms: str = "autograd,torchjd,dfs"
    exit_gradients: str = ""
    layouts: str = "nchw,channels_last"
    allocators: str = "auto"
    beta: float = 0.5
    num_classes: int = 10
    image_size: int | None = None
    rounds: int = 20
    warmup: int = 1
    max_seconds: float | None = None
    num_threads: int | None = None
    device: str = "cpu"
    seed: int = 0
    output: str = ""
    progress: bool = True

    def __post_init__(self) -> None:
        check_model(self.model)
        check_beta(self.beta)
        split_choices("forms", self.forms, FORMS)
        split_choices("layouts", self.layouts, LAYOUTS)
        if self.exit_gradients:
            split_choices("exit_gradients", self.exit_gradients, EXIT_GRADIENTS)
        if self.allocators != "auto":
            split_choices("allocators", self.allocators, ("stock", "caching"))
        check_choice("device", self.device, ("cpu", "cuda"))
        check_least(self, dict.fromkeys(("batch_size", "rounds", "warmup", "num_threads", "image_size"), 1))

    @property
    def cases(self) -> list[GradientCase]:
        """One interleaving."""
        routings = split_choices("exit_gradients", self.exit_gradients, EXIT_GRADIENTS) if self.exit_gradients else [""]
        has_caching = self.device == "cpu" and memory.is_available()
        automatic = "stock,caching" if has_caching else "stock"
        asked = automatic if self.allocators == "auto" else self.allocators
        return [
            GradientCase(form, routing, layout, allocator)
            for form in split_choices("forms", self.forms, FORMS)
            for routing in routings
            for layout in split_choices("layouts", self.layouts, LAYOUTS)
            for allocator in (split_choices("allocators", asked, ("stock", "caching")) if form == "dfs" else ["stock"])
        ]


class ExitGradientsOf:
    """The gradients of one model's exits on one batch, cut into phases."""

    def __init__(self, case: GradientCase, model: MultiExitModel, inputs: Any, target: Tensor) -> None:
        self.case, self.model, self.inputs, self.target = case, model, inputs, target
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        self.gradients = ExitGradients(model)
        self.reached = [list(dict.fromkeys(model.reached_parameters(index))) for index in range(model.num_exits)]

    def on(self, allocator: str) -> "ExitGradientsOf":
        """The same model on the memory of `allocator`."""
        other = copy.copy(self)
        other.case = self.case._replace(allocator=allocator)
        return other

    @property
    def phases(self) -> Phases:
        """In order; the allocator is switched on with the first and off with the last."""
        return {"forward": self.forward, "gradients": self.backward, "release": self.release}

    def forward(self) -> None:
        if self.case.allocator == "caching":
            memory.caching_allocator_enable()
        if self.case.form == "dfs":
            with self.gradients.apart():
                logits = self.model(self.inputs)
        else:
            logits = self.model(self.inputs)
        self.losses = [exit_loss(exit_logits, self.target) for exit_logits in logits]

    def backward(self) -> None:
        if self.case.form == "dfs":
            self.gradients.add(self.losses)
        elif self.case.form == "autograd":
            self.rows = exit_gradients(self.losses, self.gradients.parameters, self.reached)
        else:
            from torchjd.autojac import backward

            backward(self.losses, inputs=self.gradients.parameters, parallel_chunk_size=1)

    def release(self) -> None:
        self.gradients.clear()
        self.rows = []
        for parameter in self.gradients.parameters:
            vars(parameter).pop("jac", None)
        del self.losses
        if self.case.allocator == "caching":
            memory.caching_allocator_enable(False)

    def run(self) -> None:
        for phase in self.phases.values():
            phase()

    def results(self) -> list[Tensor]:
        """Of each exit the gradient by all parameters, flat, in float64."""
        self.forward()
        self.backward()
        found = [self._flat(index) for index in range(self.model.num_exits)]
        self.release()
        return found

    def _flat(self, index: int) -> Tensor:
        parameters = self.gradients.parameters
        whole = [torch.zeros(parameter.shape, dtype=torch.float64) for parameter in parameters]
        if self.case.form == "dfs":
            for piece, gradient in zip(self.gradients.pieces, self.gradients.rows[index], strict=True):
                if gradient is not None:
                    piece.of(whole[piece.column]).copy_(gradient)
        else:
            jac = [getattr(parameter, "jac", None) for parameter in parameters]
            rows = [one if one is None else one[index] for one in jac] if self.case.form == "torchjd" else None
            for total, gradient in zip(whole, rows or self.rows[index], strict=True):
                if gradient is not None:
                    total.copy_(gradient)
        return torch.cat([gradient.flatten() for gradient in whole])

    def count_flops(self) -> dict[str, int]:
        """Of the forward pass and of the gradients, on the batch at hand."""
        counted = {}
        for name, phase in (("forward", self.forward), ("gradients", self.backward)):
            with FlopCounterMode(display=False) as counter:
                phase()
            counted[name] = counter.get_total_flops()
        self.release()
        return counted


class _Builder:
    """Models of the same weights, on the same data."""

    def __init__(self, config: BenchGradientsConfig) -> None:
        self.config = config
        torch.manual_seed(config.seed)
        model = create_model(config.model, num_classes=config.num_classes, beta=config.beta, **config.options)
        self.weights, self.family = model.state_dict(), model.fork.exit_gradient
        self.inputs = model.example_input(config.batch_size)
        if config.image_size:
            if self.inputs.dim() != 4:
                raise ValueError(
                    f"image_size: expected None for {config.model}, which reads no images, got {config.image_size}."
                )
            self.inputs = torch.randn(*self.inputs.shape[:2], config.image_size, config.image_size)
        self.target = torch.randint(config.num_classes, (config.batch_size,))
        self._known: dict[tuple[GradientCase, torch.dtype], list[Tensor]] = {}

    def build(self, case: GradientCase, dtype: torch.dtype, batch_size: int | None = None) -> ExitGradientsOf:
        config = self.config
        model = create_model(
            config.model,
            num_classes=config.num_classes,
            beta=config.beta,
            variant="dfs" if case.form == "dfs" else "detach",
            exit_gradient=case.exit_gradient or None,
            backend="aten" if dtype == torch.float64 else None,
            **config.options,
        ).train()
        model.load_state_dict(self.weights)
        model.to(device=config.device, dtype=dtype).to(memory_format=LAYOUTS[case.layout])
        inputs = self.inputs[:batch_size].to(config.device)
        if inputs.is_floating_point():
            inputs = inputs.to(dtype).to(memory_format=LAYOUTS[case.layout])
        return ExitGradientsOf(case, model, inputs, self.target[:batch_size].to(config.device))

    def check(self, cases: list[GradientCase]) -> None:
        """That all compute what `torch.autograd.grad` of `detach` does.

        In float64, by aten, where rounding hides nothing; in float32 about as near to that as stock is. There, as of
        training steps, a case is refused if it fails on every draw of the inputs.
        """
        batch_size = min(self.config.batch_size, _GATE_BATCH)
        for case in sorted(cases, key=lambda case: case[1:]):
            exact, *_ = self._errors(case, torch.float64, batch_size)
            if exact > TOLERANCES[torch.float64].rms_ratio:
                raise RuntimeError(_breach(case, "float64, by aten,", exact))
            for _ in range(_DRAWS):
                error, noise = self._errors(case, torch.float32, batch_size)
                if error <= _NOISE_MARGIN * max(noise, TOLERANCES[torch.float32].rms_ratio):
                    break
                self.inputs = self.inputs[torch.randperm(len(self.inputs))]
                self._known.clear()
            else:
                raise RuntimeError(_breach(case, "float32", error))

    def _errors(self, case: GradientCase, dtype: torch.dtype, batch_size: int) -> tuple[float, float]:
        """The largest relative RMS error of an exit's gradient: of this case, and of `torch.autograd.grad`."""
        stock = GradientCase("autograd", case.exit_gradient, case.layout)
        expected = self._results(stock, torch.float64, batch_size)
        errors = []
        for one in (case, stock):
            pairs = zip(self._results(one, dtype, batch_size), expected, strict=True)
            errors.append(max(((own - truth).norm() / truth.norm()).item() for own, truth in pairs))
        return errors[0], errors[1]

    def _results(self, case: GradientCase, dtype: torch.dtype, batch_size: int) -> list[Tensor]:
        """Those of autograd, which several cases are compared with, are kept until another routing's are asked for."""
        if case.form != "autograd":
            return self.build(case, dtype, batch_size).results()
        if any(known != case for known, _ in self._known):
            self._known.clear()
        if (case, dtype) not in self._known:
            self._known[case, dtype] = self.build(case, dtype, batch_size).results()
        return self._known[case, dtype]


def _breach(case: GradientCase, dtype: str, error: float) -> str:
    return (
        f"bench gradients: expected {case} in {dtype} to compute what torch.autograd.grad does, got a relative error "
        f"of {error:.3g}. Nothing was timed; run `dfs validate` to find the op."
    )


@dataclass(slots=True)
class GradientsReport:
    """All rows of a run, slower ones included."""

    config: BenchGradientsConfig
    stamp: Environment
    rows: Measurements = field(default_factory=Measurements)
    loadavg_end: float = 0.0

    def table(self) -> str:
        """Markdown: conditions, then a row for each case."""
        return "\n".join(
            [
                f"Every exit's gradient, {self.config.model}, synthetic data, batch {self.config.batch_size}, fp32. "
                "Cases interleaved.",
                *str(self.stamp).splitlines(),
                "Compared before, in float64 and in float32, with torch.autograd.grad of `detach`.",
                f"Load average at the end {self.loadavg_end:.2f}. Times in ms, median / minimum of n. Peak: MiB beyond "
                "weights. Ratios: the form's best case of the same routing over this one, medians / minima.",
                "",
                *gradients_table(self.rows),
            ]
        )

    def to_json(self) -> dict[str, Any]:
        """JSON-able values."""
        rows = [
            {
                **_case_of(row)._asdict(),
                "shape": [int(size) for size in row.shape.split("x")],
                "seconds": {phase: asdict(stats) for phase, stats in row.timings.items()},
                "peak_bytes": row["peak_memory"].median,
                "flops": {phase: row.flops_of(phase) for phase in ("forward", "gradients")},
                "ratios": dict(zip(FORMS[:2], _ratios(self.rows, row), strict=True)),
            }
            for row in self.rows
        ]
        return {
            "config": asdict(self.config),
            "data": "synthetic",
            "environment": asdict(self.stamp),
            "loadavg_end": self.loadavg_end,
            "rows": rows,
        }


_HEADER = (
    *("form", "exit_gradient", "layout", "allocator", "n", "forward", "gradients", "both", "peak", "GFLOP"),
    *("vs autograd (FLOPs)", "vs torchjd"),
)


def gradients_table(found: Measurements) -> Iterator[str]:
    """A row for each case, and what it gains on both stock forms, slower ones included."""
    yield from markdown.table(_HEADER, (_cells(found, row) for row in found.ranked()))


def gradients_section(path: Path) -> Iterator[str]:
    """The table of one file."""
    found = Measurements.read(path)
    if not found:
        return
    first = found[0]
    yield (
        f"Every exit's gradient, {first.model}, input {first.shape}, fp32, beta {first.beta:g}; forward, gradients in "
        f"ms, median / minimum. {first.conditions}; {markdown.link(path, path.parents[1])}."
    )
    yield ""
    yield from gradients_table(found)
    yield ""


def _cells(found: Measurements, row: Measurement) -> list[object]:
    case, total = _case_of(row), row[TOTAL]
    times = (f"{row[phase].median * 1e3:.0f} / {row[phase].min * 1e3:.0f}" for phase in ("forward", "gradients", TOTAL))
    flops = row.flops_of("forward") + row.flops_of("gradients")
    ratios: list[str] = []
    for ratio in _ratios(found, row):
        text = "-" if ratio is None else f"{ratio['median']:.2f} / {ratio['min']:.2f}"
        ratios.append(text if ratio is None or ratios else f"{text} ({ratio['flops']:.2f})")
    peak = f"{row['peak_memory'].median / 2**20:.0f}"
    form = f"**{case.form}**" if case.form == "dfs" else case.form
    return [form, *case[1:], total.n, *times, peak, f"{flops / 1e9:.1f}", *ratios]


def _ratios(found: Measurements, row: Measurement) -> list[dict[str, float] | None]:
    """Against autograd's and torchjd's best case of the same routing."""
    result: list[dict[str, float] | None] = []
    for form in FORMS[:2]:
        rivals = [one for one in found.of(backend_used=form, shape=row.shape).ranked() if _same_routing(one, row)]
        if not rivals:
            result.append(None)
            continue
        best = rivals[0]
        own, other = (one.flops_of("forward") + one.flops_of("gradients") for one in (row, best))
        least = min(one[TOTAL].min for one in rivals) / row[TOTAL].min
        result.append({"median": best[TOTAL].median / row[TOTAL].median, "min": least, "flops": other / own})
    return result


def _same_routing(one: Measurement, other: Measurement) -> bool:
    return _case_of(one).exit_gradient == _case_of(other).exit_gradient


def _case_of(row: Measurement) -> GradientCase:
    return GradientCase(row.backend_used, row.mode.split(", ")[0], row.layout, row.allocator)


def run(config: BenchGradientsConfig) -> GradientsReport:
    """Times everything that `config` asks for.

    Raises:
        RuntimeError: a form computes other gradients (nothing is timed then), or there is no CUDA device.
        ModuleNotFoundError: torchjd is asked for and not installed.
    """
    check_device("bench gradients", config.device)
    if "torchjd" in config.forms:
        with needs("methods"):
            import torchjd.autojac  # noqa: F401
    with cpu_threads(config.num_threads):
        return _run(config)


def _run(config: BenchGradientsConfig) -> GradientsReport:
    report = GradientsReport(config=config, stamp=environment(config.device))
    with progress_bar(config.rounds + config.warmup, "round", config.progress) as bar:
        bar.set_description("building, comparing")
        builder = _Builder(config)
        cases = [case._replace(exit_gradient=case.exit_gradient or builder.family) for case in config.cases]
        builder.check(list(dict.fromkeys(case._replace(allocator="stock") for case in cases)))
        built: dict[GradientCase, ExitGradientsOf] = {}
        for case in cases:  # one model serves both allocators
            plain = case._replace(allocator="stock")
            built[plain] = built.get(plain) or builder.build(plain, torch.float32)
        steps = {case: built[case._replace(allocator="stock")].on(case.allocator) for case in cases}
        bar.set_description(f"timing {len(steps)} cases")
        timings = measure_phases(
            {str(case): step.phases for case, step in steps.items()},
            config.rounds,
            config.warmup,
            device=config.device,
            max_seconds=config.max_seconds,
            on_round=bar.update,
        )
    for case, step in steps.items():
        counted = builder.build(case, torch.float32, 2).count_flops()
        flops = {f"flops_{phase}": round(count * config.batch_size / 2) for phase, count in counted.items()}
        extra = {"peak_memory": peak_memory(step.run, config.device), **flops}
        report.rows.append(
            Measurement(
                suite="gradients",
                model=config.model,
                variant="dfs" if case.form == "dfs" else "detach",
                backend_used=case.form,
                dtype="fp32",
                shape="x".join(map(str, builder.inputs.shape)),
                mode=case.exit_gradient if case.allocator == "stock" else f"{case.exit_gradient}, {case.allocator}",
                layout=case.layout,
                beta=config.beta,
                metrics=timings[str(case)] | {name: Stats.of([count]) for name, count in extra.items()},
            )
        )
    if config.output:
        append_csv(Path(config.output), report.stamp, report.rows.csv_rows())
    report.loadavg_end = load_average()
    return report
