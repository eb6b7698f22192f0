"""The ways in which `dfs validate` asks for an op: slices, forms and layouts, and what the results have to equal.

A case runs an op, or its oracle, on given tensors, and compares the results of the two.
"""

import itertools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from dfs_engine.compare import EXACT, Comparison, Tolerance, compare, failure
from dfs_engine.partition import ChannelSlice, Partition

BETAS = (0, 0.1, 0.3, 0.5, 0.7, 0.9, 1)
Tensors = dict[str, Tensor | None]
Results = dict[str, Tensor]
# A random tensor of a shape: the gradient of an output. The same for the op and for its oracle.
MakeGrad = Callable[[torch.Size], Tensor]


class Problem(NamedTuple):
    """One shape to try an op on.

    Attributes:
        label: short name for messages.
        tensors: shapes of the op's differentiable arguments in order, by name; `input` comes first. None: not given.
        options: the op's other arguments.
        channel_axis: where `input` is sliced.
        num_channels: its size there.
        layouts: names for `lay_out`.
        cases: the ways to ask for it.
        signed: whether values have both signs. Of one sign, the terms of a sum cannot cancel: a gradient of one element
            whose terms happen to has no relative accuracy in any kernel.
    """

    label: str
    tensors: dict[str, tuple[int, ...] | None]
    options: dict[str, Any]
    channel_axis: int
    num_channels: int
    layouts: tuple[str, ...]
    cases: Callable[["Problem"], list["Case"]]
    signed: bool = False


class Case(Protocol):
    """One way to ask for a problem; its text names it in messages."""

    def canonical(self) -> "Case":
        """The case whose results this one has to give, for the oracle; equal for equal results."""

    def unsupported(self, problem: Problem, backend: str, dtype: torch.dtype) -> str | None:
        """Why the backend's results cannot be compared in this dtype, or None."""

    def run(
        self,
        function: Callable,
        problem: Problem,
        tensors: dict[str, Tensor | None],
        make_grad: MakeGrad,
        **options: Any,
    ) -> Results:
        """What comes out of `function`: outputs by name, and `grad_<name>` of every tensor."""

    def compare(
        self, problem: Problem, results: Results, oracle: Results, tolerance: Tolerance
    ) -> Iterator[Comparison]: ...


class SlicedCase(NamedTuple):
    """Of an op that trains through a slice of its input's channels: a slice, with or without referencing, in a form."""

    part_name: str
    part: ChannelSlice
    reference: bool
    form: str
    layout: str

    def __str__(self) -> str:
        referencing = "referencing" if self.reference else "no referencing"
        return f"{self.part_name} [{self.part.start}, {self.part.stop}), {referencing}, {self.form}, {self.layout}"

    def canonical(self) -> "SlicedCase":
        return self._replace(form="plain", layout=_layout_of_values(self.layout))

    def unsupported(self, problem: Problem, backend: str, dtype: torch.dtype) -> str | None:
        is_half = dtype in (torch.bfloat16, torch.float16)
        if is_half and backend == "reference" and problem.tensors.get("norm_weight") is not None:
            return "with an affine normalisation: the stock one sums its parameters' gradients in half precision"
        return None

    def run(
        self,
        function: Callable,
        problem: Problem,
        tensors: dict[str, Tensor | None],
        make_grad: MakeGrad,
        **options: Any,
    ) -> Results:
        leaves = {name: lay_out(tensor, self.layout) for name, tensor in tensors.items() if tensor is not None}
        start, stop = self.part
        if self.form == "internal":
            options["full"] = leaves["input"]
            leaves["input"] = self.part.of(leaves["input"], problem.channel_axis)
        leaves = {name: leaf.detach().requires_grad_() for name, leaf in leaves.items()}
        arguments = [leaves.get(name) for name in tensors]
        output = function(*arguments, **problem.options, start=start, stop=stop, reference=self.reference, **options)
        return _differentiate({"output": output}, leaves, self.layout, make_grad)

    def compare(
        self, problem: Problem, results: Results, oracle: Results, tolerance: Tolerance
    ) -> Iterator[Comparison]:
        axis = problem.channel_axis
        for name, expected in oracle.items():
            if name == "grad_input" and self.form == "internal":
                expected = self.part.of(expected, axis)
            yield compare(name, results[name], expected, tolerance)
        if self.form == "plain":
            outside = torch.ones_like(results["grad_input"], dtype=torch.bool)
            self.part.of(outside, axis).fill_(False)
            yield _compare_zeros("grad_input outside", results["grad_input"], outside)
        if not self.reference:
            # Weight columns that read zeros have an exactly zero gradient in the oracle, and only they have.
            yield _compare_zeros("grad_weight outside", results["grad_weight"], oracle["grad_weight"] == 0)


def sliced_cases(problem: Problem) -> list[Case]:
    """Every slice that a beta makes, in every form and layout."""
    parts: dict[ChannelSlice, str] = {}
    for beta in BETAS:
        partition = Partition(problem.num_channels, beta)
        # Few channels give the same slice for many betas: once is enough.
        parts.setdefault(partition.shared, f"beta={beta} shared")
        parts.setdefault(partition.exit, f"beta={beta} exit")
    return [
        SlicedCase(name, part, reference, form, layout)
        for (part, name), reference, form, layout in itertools.product(
            parts.items(), (True, False), ("plain", "internal"), problem.layouts
        )
    ]


class ProducedCase(NamedTuple):
    """Of the producer of a feature: which channels its two readers train, in train or eval mode."""

    name: str
    num_shared: int
    exit_start: int
    training: bool
    layout: str

    def __str__(self) -> str:
        return f"{self.name}, {'train' if self.training else 'eval'}, {self.layout}"

    def canonical(self) -> "ProducedCase":
        return self._replace(layout=_layout_of_values(self.layout))

    def unsupported(self, problem: Problem, backend: str, dtype: torch.dtype) -> str | None:
        fused = backend == "triton" or (backend == "cpp" and dtype == torch.bfloat16)
        if fused or dtype not in (torch.bfloat16, torch.float16):
            return None
        if problem.options["pool"]:
            return "with a pool: the stock one compares rounded values, so that other pixels win than in float64"
        if "residual" in problem.tensors:
            return "with a residual: the stock sum is one of rounded values, so that other pixels pass the ReLU"
        if self.exit_start < self.num_shared:
            return "with exit_gradient='whole': stock autograd rounds the sum of the two gradients, pixel by pixel"
        return None

    def run(
        self,
        function: Callable,
        problem: Problem,
        tensors: dict[str, Tensor | None],
        make_grad: MakeGrad,
        **options: Any,
    ) -> Results:
        leaves = {name: lay_out(tensor, self.layout) for name, tensor in tensors.items() if tensor is not None}
        # The normalisation's own tensors stay in float32 at least, as under autocast.
        wide: Any = {
            "dtype": torch.promote_types(leaves["input"].dtype, torch.float32),
            "device": leaves["input"].device,
        }
        leaves |= {name: leaf.to(**wide) for name, leaf in leaves.items() if name in ("weight", "bias")}
        leaves = {name: leaf.detach().requires_grad_() for name, leaf in leaves.items()}
        statistics = {
            "running_mean": torch.linspace(-1, 1, problem.num_channels, **wide),
            "running_var": torch.linspace(0.5, 1.5, problem.num_channels, **wide),
        }
        produced = function(
            *(leaves.get(name) for name in ("input", "weight", "bias")),
            *statistics.values(),
            **problem.options,
            residual=leaves.get("residual"),
            training=self.training,
            num_shared=self.num_shared,
            exit_start=self.exit_start,
            **options,
        )
        outputs = dict(zip(("full", "shared", "average", "exit"), produced, strict=True))
        return _differentiate(outputs | statistics, leaves, self.layout, make_grad)

    def compare(
        self, problem: Problem, results: Results, oracle: Results, tolerance: Tolerance
    ) -> Iterator[Comparison]:
        # The averages of the exit's channels may be few, and all near zero: they are as good as those of all channels.
        scale = oracle["average"].double().square().mean().sqrt().item()
        for name, expected in oracle.items():
            yield compare(name, results[name], expected, tolerance, scale=scale if name == "exit" else 0.0)


def produced_cases(problem: Problem) -> list[Case]:
    """Every route that a beta makes, and that of the last block, whose exit trains everything."""
    routes = {(0, 0): "last block"}
    for beta in BETAS:
        parts = Partition(problem.num_channels, beta)
        for exit_gradient in ("own", "whole"):
            route = parts.num_shared, parts.exit_live(exit_gradient).start
            routes.setdefault(route, f"beta={beta} {exit_gradient}")
    return [
        ProducedCase(name, num_shared, exit_start, training, layout)
        for ((num_shared, exit_start), name), training, layout in itertools.product(
            routes.items(), (True, False), problem.layouts
        )
    ]


def lay_out(tensor: Tensor, layout: str) -> Tensor:
    """The same values in other strides."""
    if layout == "channels_last" and tensor.dim() == 4:
        return tensor.contiguous(memory_format=torch.channels_last)
    if layout == "transposed" and tensor.dim() >= 2:
        return tensor.transpose(-1, -2).contiguous().transpose(-1, -2)
    if layout == "strided":
        # Surrounded by NaN, so that reading beside the view shows.
        base = tensor.new_full([*(size + 2 for size in tensor.shape[:-1]), 2 * tensor.size(-1) + 1], float("nan"))
        inside = [slice(1, -1)] * (tensor.dim() - 1) + [slice(1, None, 2)]
        view = base[tuple(inside)]
        return view.copy_(tensor)
    return tensor


def _lay_out_grad(grad_output: Tensor, layout: str) -> Tensor:
    """As `lay_out`; "expanded" has stride 0 in the last axis, as the gradient of a sum has, and so other values."""
    if layout == "expanded":
        return grad_output[..., :1].expand_as(grad_output)
    return lay_out(grad_output, layout)


def _layout_of_values(layout: str) -> str:
    """The one layout among those of equal values."""
    return layout if layout == "expanded" else "contiguous"


def _differentiate(outputs: Results, leaves: Results, layout: str, make_grad: MakeGrad) -> Results:
    live = [output for output in outputs.values() if output.requires_grad]
    grad_outputs = [_lay_out_grad(make_grad(output.shape).to(output), layout) for output in live]
    grads = torch.autograd.grad(live, list(leaves.values()), grad_outputs, materialize_grads=True)
    results = {name: output.detach() for name, output in outputs.items()}
    return results | {f"grad_{name}": grad for name, grad in zip(leaves, grads, strict=True)}


def _compare_zeros(name: str, tensor: Tensor, mask: Tensor) -> Comparison:
    if tensor.shape != mask.shape:
        return failure(name, f"shape {tuple(tensor.shape)}, expected {tuple(mask.shape)}")
    outside = tensor[mask]
    return compare(name, outside, torch.zeros_like(outside), EXACT)
