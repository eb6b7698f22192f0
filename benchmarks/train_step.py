"""Training steps to be timed: all from the same weights and data, and compared with each other before."""

import copy
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from dfs_engine.benchmarks.attainable import Speeds, Work, count_work
from dfs_engine.benchmarks.measure import Phases, Stats
from dfs_engine.benchmarks.options import LAYOUTS
from dfs_engine.benchmarks.results import LIMIT, Measurement
from dfs_engine.benchmarks.train_config import UNSPLIT, BenchTrainConfig, StepCase
from dfs_engine.evaluation.flops import FlopCount, count_flops
from dfs_engine.methods import Joint, Method, create_method
from dfs_engine.models import MultiExitModel, create_model
from dfs_engine.runtime import backend as backends
from dfs_engine.runtime import memory
from dfs_engine.validate.tolerances import DTYPES, TOLERANCES, Tolerance, compare, gradient_scale

# `StepCase.compile` -> torch.compile's mode. Other cases run eager.
_COMPILE_MODES = {"on": None, "reduce-overhead": "reduce-overhead"}
_GATE_BATCH = 4
# The table is for one op. In a network roundings add up, and flip some ReLUs and max pools, in stock PyTorch as here.
_NOISE_MARGIN = 4
_DRAWS = 3


class Step:
    """One model's training step, cut into phases."""

    def __init__(
        self,
        model: torch.nn.Module,
        method: Method,
        inputs: Tensor,
        target: Tensor,
        *,
        compile: str,
        autocast: torch.dtype | None,
        backend_used: str,
    ) -> None:
        # Off at first: what is drawn anew each time cannot be compared.
        self.dropout_rates = {module: module.p for module in model.modules() if isinstance(module, torch.nn.Dropout)}
        for module in self.dropout_rates:
            module.p = 0.0
        self.inputs, self.target, self.method, self.backend_used = inputs, target, method, backend_used
        trained = torch.nn.ModuleDict({"model": model, "method": method})
        self.parameters = {name.removeprefix("model."): value for name, value in trained.named_parameters()}
        self.model: Any = model
        if compile in _COMPILE_MODES:
            self.model = torch.compile(model, dynamic=False, fullgraph=True, mode=_COMPILE_MODES[compile])
        self.autocast = torch.autocast(inputs.device.type, autocast, enabled=autocast is not None)
        # The smallest learning rate that still is work: random labels must not drive the weights to infinity.
        self.optimizer = torch.optim.SGD(trained.parameters(), lr=1e-6, momentum=0.9, weight_decay=5e-4, foreach=True)
        self.caching = False

    def use_dropout(self) -> None:
        """The model's own rates, from now on."""
        for module, rate in self.dropout_rates.items():
            module.p = rate

    def on(self, allocator: str) -> "Step":
        """The same step, model and all, on the memory of `allocator`."""
        step = copy.copy(self)
        step.caching = allocator == "caching"
        return step

    @property
    def phases(self) -> Phases:
        """In order; the allocator is switched on with the first and off with the last."""
        return {
            "forward": self.forward, "loss": self.compute_loss, "backward": self.backward, "update": self.update,
        }  # fmt: skip

    def forward(self) -> None:
        if self.caching:
            memory.caching_allocator_enable()
        with self.autocast:
            self.logits, self.features = self.method.run(self.model, self.inputs)

    def compute_loss(self) -> None:
        with self.autocast:
            held = next(iter(self.parameters.values())).dtype
            logits = [exit_logits.to(held) for exit_logits in self.logits]  # as trainers do, off bf16
            self.loss = self.method(logits, self.target, self.features)

    def backward(self) -> None:
        self.loss.backward()

    def update(self) -> None:
        self.optimizer.step()
        self._drop()

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
        self._drop()
        return results

    def _drop(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        del self.logits, self.features, self.loss
        if self.caching:
            memory.caching_allocator_enable(False)


class StepBuilder:
    """Builds steps of one batch size that start from the same weights and data, and checks that they agree."""

    def __init__(self, config: BenchTrainConfig, batch_size: int) -> None:
        self.config, self.batch_size = config, batch_size
        torch.manual_seed(config.seed)
        model = self._model("dense", None)
        self.weights = model.state_dict()
        self.byot = create_method("byot", model) if "byot" in config.variants else None
        self.inputs: Tensor = model.example_input(batch_size)
        if config.image_size:
            if self.inputs.dim() != 4:
                raise ValueError(
                    f"image_size: expected None for {config.model}, which reads no images, got {config.image_size}."
                )
            self.inputs = torch.randn(*self.inputs.shape[:2], config.image_size, config.image_size)
        self.target = torch.randint(config.num_classes, (batch_size,))

    def _model(self, variant: str, beta: float | None, backend: str | None = None, **options: Any) -> MultiExitModel:
        config = self.config
        return create_model(
            config.model,
            num_classes=config.num_classes,
            beta=0.5 if beta is None else beta,
            variant="dense" if variant == "byot" else variant,
            backend=backend or config.backend,
            **config.options,
            **options,
        )

    def build(self, case: StepCase, dtype: str, batch_size: int | None = None, backend: str | None = None) -> Step:
        """The step of `case`; on the first `batch_size` inputs, default all; by `backend`, default the config's."""
        torch_dtype, device = DTYPES[dtype], self.config.device
        # As in mixed-precision training, parameters stay float32.
        held = torch.float64 if dtype == "fp64" else torch.float32
        model = self._model(case.variant, case.beta, backend).train()
        model.load_state_dict(self.weights)
        if case.attention == "plain":
            _use_plain_attention(self.config.model, model)
        model.to(device=device, dtype=held).to(memory_format=LAYOUTS[case.layout])
        method = copy.deepcopy(self.byot) if case.variant == "byot" else None
        inputs = self.inputs[:batch_size].to(device)
        if inputs.is_floating_point():  # images, no tokens
            inputs = inputs.to(held).to(memory_format=LAYOUTS[case.layout])
        return Step(
            model,
            (method or Joint()).to(device=device, dtype=held),
            inputs,
            self.target[:batch_size].to(device),
            compile=case.compile,
            autocast=None if torch_dtype == held else torch_dtype,
            backend_used=self._backend_used(torch_dtype, backend or self.config.backend)
            if case.variant == "dfs"
            else "stock",
        )

    def _backend_used(self, dtype: torch.dtype, backend: str) -> str:
        """Of the ops that it has in this dtype; a model with another one raises when it runs."""
        device, asked = torch.device(self.config.device), backends.requested(backend)
        ops = [op for op in backends.OPS if asked is None or backends.unsupported_dtype(op, asked, dtype) is None]
        return "+".join(dict.fromkeys(backends.select(op, device, dtype, asked) for op in ops))

    def count_flops(self, case: StepCase) -> FlopCount:
        """Of the whole batch, counted on two samples: all of it is proportional to the batch."""
        model = self._model(case.variant, case.beta).to(self.config.device)
        two = count_flops(model, self.inputs[:1].repeat(2, *[1] * (self.inputs.dim() - 1)).to(self.config.device))
        per_two = self.batch_size / 2
        return FlopCount(round(two.forward * per_two), round(two.backward * per_two))

    def count_work(self, case: StepCase) -> Work | None:
        """What no formulation of the case's step can do without; None of BYOT's, whose loss has products of its own."""
        if case.variant == "byot":
            return None
        variant = "dense" if case.variant in UNSPLIT else "dfs"
        model = self._model(variant, case.beta, "aten", device="meta").train()
        return count_work(model, self.inputs.to("meta"))

    def limit(self, case: StepCase, dtype: str, speeds: Speeds) -> dict[str, float]:
        """The metrics of the case's attainable limit, at what the machine reached in the same run."""
        work = self.count_work(case)
        if work is None:
            return {}
        speed = {"speed_products": speeds.products, "speed_copy": speeds.copy}
        return {LIMIT: work.seconds(DTYPES[dtype], speeds), **speed}

    def measurement(
        self,
        case: StepCase,
        dtype: str,
        backend_used: str,
        timings: dict[str, Stats],
        peak_bytes: int,
        flops: FlopCount,
        kernels: dict[str, float] | None = None,
        limit: dict[str, float] | None = None,
    ) -> Measurement:
        """All that is told of a step; `peak_bytes` is beyond weights and optimizer state."""
        counts: dict[str, float] = {
            "peak_memory": peak_bytes,
            "flops_forward": flops.forward,
            "flops_backward": flops.backward,
        }
        counts |= limit or {}
        return Measurement(
            suite="train_dropout" if self.config.dropout else "train",
            model=self.config.model,
            variant=case.variant,
            backend_used=backend_used,
            dtype=dtype,
            shape="x".join(map(str, self.inputs.shape)),
            mode=case.mode,
            layout=case.layout,
            beta=case.beta,
            metrics=timings | {name: Stats.of([count]) for name, count in counts.items()},
            kernels=kernels or {},
        )

    def check_formulation(self, cases: Iterable[StepCase]) -> None:
        """In float64, where rounding hides nothing, every variant computes what its plain formulation computes.

        `dfs` by `aten`: no kernel computes in float64 (`check_kernels` compares those in the dtypes that they have).
        """
        batch_size = min(self.batch_size, _GATE_BATCH)
        cases = dict.fromkeys(case._replace(compile="off", allocator="stock") for case in cases)
        expected = {truth: self._exact(truth, batch_size) for truth in map(_truth, cases)}
        for case in cases:
            results = self._exact(case, batch_size)
            breach = _breach(case, "float64, by aten,", results, expected[_truth(case)], TOLERANCES[torch.float64])
            if breach:
                raise RuntimeError(breach)

    def _exact(self, case: StepCase, batch_size: int | None = None) -> dict[str, Tensor]:
        return self.build(case, "fp64", batch_size, backend="aten").results()

    def check_kernels(self, dtype: str, steps: dict[StepCase, Step]) -> None:
        """As they will be timed, they are about as near to float64 as the stock formulation is in that dtype.

        A rounding that flips a ReLU or a max pool changes a gradient at once, in stock PyTorch as here. On other inputs
        it flips another or none, while a wrong kernel stays wrong: a case is refused if it fails on every draw.
        """
        for truth in dict.fromkeys(map(_truth, steps)):
            pending = {case: step for case, step in steps.items() if _truth(case) == truth}
            for _ in range(_DRAWS):
                breaches = self._breaches(dtype, truth, pending)
                pending = {case: pending[case] for case in breaches}
                if not pending:
                    break
                self._redraw_inputs(steps.values())
            else:
                raise RuntimeError(next(iter(breaches.values())))

    def _breaches(self, dtype: str, truth: StepCase, steps: dict[StepCase, Step]) -> dict[StepCase, str]:
        """The cases that are too far from `truth` in float64, and how far."""
        expected = self._exact(truth)
        scales, noise = _scales(expected), 0.0
        # In every layout, because stock kernels of one layout round otherwise than those of another.
        for layout in LAYOUTS:
            stock = self.build(truth._replace(layout=layout), dtype).results()
            found = (compare(name, stock[name], expected[name], scale=scales[name]) for name in expected)
            noise = max(noise, *(comparison.rms_ratio for comparison in found))
        bound = Tolerance(float("inf"), _NOISE_MARGIN * max(TOLERANCES[DTYPES[dtype]].rms_ratio, noise))
        judged = ((case, _breach(case, dtype, step.results(), expected, bound)) for case, step in steps.items())
        return {case: breach for case, breach in judged if breach}

    def _redraw_inputs(self, steps: Iterable[Step]) -> None:
        order = torch.randperm(self.inputs.numel())  # others of the same kind, images or tokens
        self.inputs = self.inputs.flatten()[order].view_as(self.inputs)
        for step in steps:
            step.inputs.copy_(self.inputs)


def _breach(
    case: StepCase, dtype: str, results: dict[str, Tensor], expected: dict[str, Tensor], tolerance: Tolerance
) -> str:
    """The first result that is too far from the expected one; empty where none is."""
    scales = _scales(expected)
    for name, reference in expected.items():
        comparison = compare(name, results[name], reference, tolerance, scale=scales[name])
        if not comparison.ok:
            return (
                f"bench train: expected {case} in {dtype} to compute what {_truth(case).variant} computes, got "
                f"{comparison}. Nothing was timed; run `dfs validate` to find the op."
            )
    return ""


def _scales(expected: dict[str, Tensor]) -> dict[str, float]:
    """By which size each result is judged where its own is smaller."""
    is_gradient = {name: name.startswith("gradient of ") for name in expected}
    scale = gradient_scale(expected[name] for name in expected if is_gradient[name])
    return {name: scale if is_gradient[name] else 0.0 for name in expected}


def _use_plain_attention(name: str, model: torch.nn.Module) -> None:
    """What users of timm and of transformers would set."""
    switched = [module for module in model.modules() if hasattr(module, "fused_attn")]
    for module in switched:
        module.fused_attn = False  # type: ignore[assignment]
    config: Any = getattr(model, "config", None)
    if hasattr(config, "_attn_implementation"):
        config._attn_implementation = "eager"
    elif not switched:
        raise ValueError(f"attentions: expected fused, the default, with {name}, which has no attention; got plain.")


def _truth(case: StepCase) -> StepCase:
    """The plain formulation on stock autograd that `case` must agree with."""
    return StepCase(case.variant if case.variant in UNSPLIT else "detach", "nchw", "off", case.beta)
