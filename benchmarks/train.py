"""`dfs bench train`: a training step of every variant, layout and compile setting, taking turns, on synthetic data."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch._dynamo
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from dfs_engine import backend as backends
from dfs_engine.choices import split_choices
from dfs_engine.compare import DTYPES, TOLERANCES, Tolerance, compare
from dfs_engine.evaluation.flops import FlopCount, count_flops
from dfs_engine.models import VARIANTS, MultiExitModel, create_model, list_models
from dfs_engine.names import check_choice
from dfs_engine.partition import check_beta

from .measure import Phases, append_csv, environment, measure_phases, peak_memory
from .train_report import Case, TrainReport, TrainRow

LAYOUTS = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}
_GATE_BATCH = 4
# The table is for one op. In a network roundings add up, and flip some ReLUs and max pools, in stock PyTorch as here.
_NOISE_MARGIN = 4


@dataclass(frozen=True, kw_only=True, slots=True)
class BenchTrainConfig:
    """What `dfs bench train` times. Lists are comma-separated; data is synthetic (normal images, random labels).

    Attributes:
        model: a name of `list_models()`.
        batch_size: images per step.
        variants: of dense, detach, split, dfs.
        layouts: of nchw, channels_last.
        compile: of off, on (torch.compile, whole graph).
        dtypes: of fp32, bf16, fp16 (autocast, float32 parameters), fp64. One interleaving each.
        beta: share of channels that deeper exits train.
        backend: of the dfs variant; "auto" picks.
        num_classes: width of every exit's logits.
        image_size: pixels a side; None: the model's own.
        rounds: turns of every case, at least 20 for numbers to publish.
        warmup: turns before that, not timed.
        max_seconds: per dtype, start no further round after this time; all its cases have the same n.
        num_threads: of torch; None leaves them as they are.
        device: "cpu" or "cuda".
        seed: of weights and data.
        output: CSV file to append the measurements to; empty: none.
        progress: show a progress bar.
    """

    model: str = "vgg7_64"
    batch_size: int = 100
    variants: str = "dense,detach,split,dfs"
    layouts: str = "nchw,channels_last"
    compile: str = "off,on"
    dtypes: str = "fp32,bf16"
    beta: float = 0.5
    backend: str = "auto"
    num_classes: int = 10
    image_size: int | None = None
    rounds: int = 20
    warmup: int = 2
    max_seconds: float | None = None
    num_threads: int | None = None
    device: str = "cpu"
    seed: int = 0
    output: str = ""
    progress: bool = True

    def __post_init__(self) -> None:
        check_choice("model", self.model, list_models())
        split_choices("variants", self.variants, VARIANTS)
        split_choices("layouts", self.layouts, LAYOUTS)
        split_choices("compile", self.compile, ("off", "on"))
        split_choices("dtypes", self.dtypes, DTYPES)
        check_beta(self.beta)
        check_choice("backend", self.backend, ("auto", *backends.BACKENDS))
        check_choice("device", self.device, ("cpu", "cuda"))
        for name, least in (("batch_size", 1), ("rounds", 1), ("warmup", 1), ("num_threads", 1), ("image_size", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name}: expected at least {least}, got {value}.")

    @property
    def cases(self) -> list[Case]:
        """One interleaving: what is timed for each dtype."""
        return [
            Case(variant, layout, compiled)
            for variant in split_choices("variants", self.variants, VARIANTS)
            for layout in split_choices("layouts", self.layouts, LAYOUTS)
            for compiled in split_choices("compile", self.compile, ("off", "on"))
        ]


def run(config: BenchTrainConfig) -> TrainReport:
    """Times everything that `config` asks for.

    Raises:
        RuntimeError: the gradients of two variants that must agree do not (nothing is timed then), or the backend named
            in `config.backend` is not usable.
    """
    num_threads_before = torch.get_num_threads()
    torch.set_num_threads(config.num_threads or num_threads_before)
    try:
        # All compiled cases share the models' code; past dynamo's default limit it would refuse the ninth.
        with torch._dynamo.config.patch(recompile_limit=64):
            return _run(config)
    finally:
        torch.set_num_threads(num_threads_before)


def _run(config: BenchTrainConfig) -> TrainReport:
    stamp = environment(config.device)
    bench = _Bench(config)
    report = TrainReport(config=config, stamp=stamp, shape=bench.shape)
    flops = {variant: bench.count_flops(variant) for variant in dict.fromkeys(case.variant for case in config.cases)}
    dtypes = split_choices("dtypes", config.dtypes, DTYPES)
    with tqdm(total=len(dtypes) * (config.warmup + config.rounds), unit="round", disable=not config.progress) as bar:
        bar.set_description("gradients agree?")
        bench.check_formulation()
        for dtype in dtypes:
            bar.set_description(f"{dtype}: building, compiling, comparing")
            steps = {case: bench.build(case, dtype) for case in config.cases}
            bench.check_kernels(dtype, steps)
            bar.set_description(f"{dtype}: timing {len(steps)} cases")
            timings = measure_phases(
                {str(case): step.phases for case, step in steps.items()},
                config.rounds,
                config.warmup,
                device=config.device,
                max_seconds=config.max_seconds,
                on_round=bar.update,
            )
            for case, step in steps.items():
                peak = peak_memory(step.run, config.device)
                report.rows.append(
                    TrainRow(dtype, case, step.backend_used, timings[str(case)], peak, flops[case.variant])
                )
            # Compiled graphs of this dtype are not needed again, and guards are checked one after another.
            torch.compiler.reset()
    report.finish()
    if config.output:
        append_csv(Path(config.output), stamp, report.csv_rows())
    return report


class _Step:
    """One model's training step, cut into phases."""

    def __init__(
        self,
        model: torch.nn.Module,
        images: Tensor,
        target: Tensor,
        *,
        compiled: bool,
        autocast: torch.dtype | None,
        backend_used: str,
    ) -> None:
        self.images, self.target, self.backend_used = images, target, backend_used
        self.parameters = dict(model.named_parameters())
        self.model: Callable = torch.compile(model, dynamic=False, fullgraph=True) if compiled else model
        self.autocast = torch.autocast(images.device.type, autocast, enabled=autocast is not None)
        # The smallest learning rate that still is work: random labels must not drive the weights to infinity.
        self.optimizer = torch.optim.SGD(model.parameters(), lr=1e-6, momentum=0.9, weight_decay=5e-4)
        self.phases: Phases = {
            "forward": self.forward, "loss": self.compute_loss, "backward": self.backward, "update": self.update,
        }  # fmt: skip

    def forward(self) -> None:
        with self.autocast:
            self.logits = self.model(self.images)

    def compute_loss(self) -> None:
        self.loss = torch.stack([F.cross_entropy(logits.float(), self.target) for logits in self.logits]).sum()

    def backward(self) -> None:
        self.loss.backward()

    def update(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        del self.logits, self.loss

    def run(self) -> None:
        for phase in self.phases.values():
            phase()

    def results(self) -> dict[str, Tensor]:
        """Logits and gradients of one pass, in float64; leaves the weights as they are."""
        self.forward()
        self.compute_loss()
        self.backward()
        results = {f"logits of exit {index}": logits.detach().double() for index, logits in enumerate(self.logits)}
        # A gradient that no exit reaches (beta = 0) is absent in one formulation and zero in another.
        results |= {
            f"gradient of {name}": torch.zeros_like(parameter, dtype=torch.float64)
            if parameter.grad is None
            else parameter.grad.double()
            for name, parameter in self.parameters.items()
        }
        self.optimizer.zero_grad(set_to_none=True)
        del self.logits, self.loss
        return results


class _Bench:
    """Builds steps that start from the same weights and data, and checks that they compute the same."""

    def __init__(self, config: BenchTrainConfig) -> None:
        self.config = config
        torch.manual_seed(config.seed)
        model = self._model("dense")
        channels, *size = model.input_shape
        self.shape = (channels, *([config.image_size] * 2 if config.image_size else size))
        self.weights = model.state_dict()
        self.images = torch.randn(config.batch_size, *self.shape)
        self.target = torch.randint(config.num_classes, (config.batch_size,))

    def _model(self, variant: str) -> MultiExitModel:
        config = self.config
        return create_model(
            config.model, num_classes=config.num_classes, beta=config.beta, variant=variant, backend=config.backend
        )

    def build(self, case: Case, dtype: str, batch_size: int | None = None) -> _Step:
        """The step of `case`; its first `batch_size` images, default all."""
        torch_dtype, device = DTYPES[dtype], self.config.device
        # As in mixed-precision training, parameters stay float32.
        held = torch.float64 if dtype == "fp64" else torch.float32
        model = self._model(case.variant).train()
        model.load_state_dict(self.weights)
        model.to(device=device, dtype=held).to(memory_format=LAYOUTS[case.layout])
        images = self.images[:batch_size].to(device, held).to(memory_format=LAYOUTS[case.layout])
        return _Step(
            model,
            images,
            self.target[:batch_size].to(device),
            compiled=case.compile == "on",
            autocast=None if torch_dtype == held else torch_dtype,
            backend_used=self._backend_used(torch_dtype) if case.variant == "dfs" else "stock",
        )

    def _backend_used(self, dtype: torch.dtype) -> str:
        device = torch.device(self.config.device)
        return "+".join(dict.fromkeys(backends.select(op, device, dtype, self.config.backend) for op in backends.OPS))

    def count_flops(self, variant: str) -> FlopCount:
        """Of the whole batch, counted on two images: all of it is proportional to the batch."""
        model = self._model(variant).to(self.config.device)
        two = count_flops(model, self.shape, 2, device=self.config.device)
        per_two = self.config.batch_size / 2
        return FlopCount(round(two.forward * per_two), round(two.backward * per_two))

    def check_formulation(self) -> None:
        """In float64, where rounding hides nothing, all variants but `dense` compute what `detach` computes."""
        batch_size = min(self.config.batch_size, _GATE_BATCH)
        expected = self.build(Case("detach", "nchw", "off"), "fp64", batch_size).results()
        for case in dict.fromkeys(case._replace(compile="off") for case in self.config.cases):
            if case.variant not in ("dense", "detach"):
                results = self.build(case, "fp64", batch_size).results()
                self._refuse_unless_close(f"{case} in float64", results, expected, TOLERANCES[torch.float64])

    def check_kernels(self, dtype: str, steps: dict[Case, _Step]) -> None:
        """As they will be timed, they are about as near to float64 as stock `detach` is in that dtype."""
        expected = self.build(Case("detach", "nchw", "off"), "fp64").results()
        # In every layout, because stock kernels of one layout round otherwise than those of another.
        layouts = dict.fromkeys(case.layout for case in steps)
        stock = [self.build(Case("detach", layout, "off"), dtype).results() for layout in layouts]
        noise = max(compare(name, results[name], expected[name]).rms_ratio for results in stock for name in expected)
        bound = Tolerance(float("inf"), _NOISE_MARGIN * max(TOLERANCES[DTYPES[dtype]].rms_ratio, noise))
        for case, step in steps.items():
            if case.variant != "dense":
                self._refuse_unless_close(f"{case} in {dtype}", step.results(), expected, bound)

    @staticmethod
    def _refuse_unless_close(
        what: str, results: dict[str, Tensor], expected: dict[str, Tensor], tolerance: Tolerance
    ) -> None:
        for name, reference in expected.items():
            comparison = compare(name, results[name], reference, tolerance)
            if not comparison.ok:
                raise RuntimeError(
                    f"bench train: expected {what} to compute what detach computes, got {comparison}. "
                    "Nothing was timed; run `dfs validate` to find the op."
                )
