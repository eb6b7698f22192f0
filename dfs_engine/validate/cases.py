"""The ways in which `dfs validate` asks for an op: slices, forms and layouts, and what the results have to equal.

A case runs an op, or its oracle, on given tensors, and compares the results of the two.
"""

import itertools
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dfs_engine.ops import FixedConv
from dfs_engine.partition import ChannelSlice, Partition
from dfs_engine.validate.gradients import MakeGrad, Results, as_leaves, differentiate, lay_out, layout_of_values
from dfs_engine.validate.tolerances import EXACT, Comparison, Tolerance, compare, failure

BETAS = (0, 0.1, 0.3, 0.5, 0.7, 0.9, 1)


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
        has_ties: whether the input's values are multiples of 1/2, many of them equal: a pool takes the first of those.
    """

    label: str
    tensors: dict[str, tuple[int, ...] | None]
    options: dict[str, Any]
    channel_axis: int
    num_channels: int
    layouts: tuple[str, ...]
    cases: Callable[["Problem"], list["Case"]]
    signed: bool = False
    has_ties: bool = False


class Case:
    """One way to ask for a problem; its text names it in messages.

    Attributes:
        layout: a name for `lay_out`, of the arguments and of the outputs' gradients.
        reader: the one output that the loss reads, as where an exit is left out or the deeper path is frozen; or
            "both".
        alone: the name of the one tensor that wants a gradient, as where the others are frozen; "": all want theirs.
    """

    layout: str
    reader: str = "both"
    alone: str = ""

    def canonical(self) -> "Case":
        """The case whose results this one has to give, for the oracle; equal for equal results."""
        raise NotImplementedError

    def traits(self, problem: Problem) -> tuple[str, ...]:
        """What is particular about it, one name an aspect, in the order of aspects."""
        raise NotImplementedError

    def unsupported(self, problem: Problem, backend: str, dtype: torch.dtype) -> str | None:
        """Why the backend's results cannot be compared in this dtype, or None."""
        return None

    def run(
        self, function: Callable, problem: Problem, tensors: dict[str, Tensor | None], make_grad: MakeGrad
    ) -> Results:
        """What comes out of `function`: outputs by name, and `grad_<name>` of every tensor that wants a gradient."""
        given = {name: lay_out(tensor, self.layout) for name, tensor in tensors.items() if tensor is not None}
        outputs, leaves = self.call(function, problem, given)
        return differentiate(outputs, leaves, self.layout, make_grad, self.reader)

    def call(self, function: Callable, problem: Problem, tensors: Results) -> tuple[Results, Results]:
        """The outputs of `function` by name, and the leaves that it was given."""
        raise NotImplementedError

    def compare(
        self, problem: Problem, results: Results, oracle: Results, tolerance: Tolerance
    ) -> Iterator[Comparison]:
        for name, result in results.items():
            yield compare(name, result, oracle[name], tolerance)


def covering_sample(problem: Problem, cases: list[Case], chooser: random.Random) -> list[Case]:
    """A random sample in which any two traits that meet in one of all the cases meet in one of the sample's.

    So a fault that shows wherever two of them meet is found, whatever was drawn.
    """
    missing: set[tuple[str, str]] = set()
    left = {}
    for case in chooser.sample(cases, len(cases)):
        left[case] = set(itertools.combinations_with_replacement(case.traits(problem), 2))
        missing |= left[case]
    sample = []
    while missing:
        sample.append(max(left, key=lambda case: len(left[case] & missing)))
        missing -= left.pop(sample[-1])
    return sample


@dataclass(frozen=True)
class SlicedCase(Case):
    """Of an op that trains through a slice of its input's channels: a slice, with or without referencing, in a form."""

    part_name: str
    part: ChannelSlice
    reference: bool
    form: str
    layout: str
    alone: str = ""

    def __str__(self) -> str:
        alone = f", {self.alone} alone" if self.alone else ""
        return f"{self.part_name} [{self.part.start}, {self.part.stop}), {', '.join(self._modes())}{alone}"

    def _modes(self) -> tuple[str, str, str]:
        return "referencing" if self.reference else "no referencing", self.form, self.layout

    def canonical(self) -> "SlicedCase":
        return replace(self, form="plain", layout=layout_of_values(self.layout), alone="")

    def traits(self, problem: Problem) -> tuple[str, ...]:
        referencing, *_ = modes = self._modes()
        if self.alone:
            return (f"{self.alone} alone", referencing)
        if self.part.width == 0:
            return ("nothing", referencing)  # there is no gradient in which a form or a layout could show
        left_out = problem.num_channels - self.part.width
        size = "whole" if left_out == 0 else "wide" if self.part.width >= left_out else "narrow"
        return (size, "first" if self.part.start == 0 else "last", *modes)

    def unsupported(self, problem: Problem, backend: str, dtype: torch.dtype) -> str | None:
        is_half = dtype in (torch.bfloat16, torch.float16)
        if is_half and backend == "reference" and problem.tensors.get("norm_weight") is not None:
            return "with an affine normalisation: the stock one sums its parameters' gradients in half precision"
        return None

    def call(self, function: Callable, problem: Problem, tensors: Results) -> tuple[Results, Results]:
        start, stop = self.part
        options = dict(problem.options)
        if self.form == "internal":
            options["full"] = tensors["input"]
            tensors["input"] = self.part.of(tensors["input"], problem.channel_axis)
        leaves = as_leaves(tensors, self.alone)
        arguments = [leaves.get(name) for name in problem.tensors]
        output = function(*arguments, **options, start=start, stop=stop, reference=self.reference)
        return {"output": output}, leaves

    def compare(
        self, problem: Problem, results: Results, oracle: Results, tolerance: Tolerance
    ) -> Iterator[Comparison]:
        axis = problem.channel_axis
        for name, result in results.items():
            expected = oracle[name]
            if name == "grad_input" and self.form == "internal":
                expected = self.part.of(expected, axis)
            yield compare(name, result, expected, tolerance)
        if "grad_input" in results and self.form == "plain":
            outside = torch.ones_like(results["grad_input"], dtype=torch.bool)
            self.part.of(outside, axis).fill_(False)
            yield _compare_zeros("grad_input outside", results["grad_input"], outside)
        if "grad_weight" in results and not self.reference:
            # Weight columns that read zeros have an exactly zero gradient in the oracle, and only they have.
            yield _compare_zeros("grad_weight outside", results["grad_weight"], oracle["grad_weight"] == 0)


def sliced_cases(problem: Problem) -> list[Case]:
    """Every slice that a beta makes, in every form and layout; and every tensor that wants a gradient alone."""
    parts: dict[ChannelSlice, str] = {}
    for beta in BETAS:
        partition = Partition(problem.num_channels, beta)
        # Few channels give the same slice for many betas: once is enough.
        parts.setdefault(partition.shared, f"beta={beta} shared")
        parts.setdefault(partition.exit, f"beta={beta} exit")
    cases = [
        SlicedCase(name, part, reference, form, layout)
        for (part, name), reference, form, layout in itertools.product(
            parts.items(), (True, False), ("plain", "internal"), problem.layouts
        )
    ]
    # Where something is left out; of one channel nothing can be.
    proper = [case for case in cases if 0 < case.part.width < problem.num_channels]
    return [*cases, *_alone(problem, proper or cases)]


def few_sliced_cases(problem: Problem) -> list[Case]:
    """For a problem that takes long: both parts of one partition, with and without referencing."""
    partition = Partition(problem.num_channels, 0.7)
    first_layout, second_layout, *_ = problem.layouts
    return [
        SlicedCase(f"beta=0.7 {name}", part, *modes)
        for (name, part), modes in itertools.product(
            (("shared", partition.shared), ("exit", partition.exit)),
            ((True, "internal", first_layout), (False, "plain", second_layout)),
        )
    ]


def _alone(problem: Problem, cases: list) -> list[Case]:
    """Each of the tensors wants a gradient alone, in some of the cases: an odd step meets every mode and layout."""
    names = [name for name, shape in problem.tensors.items() if shape is not None]
    return [replace(case, alone=name) for name in names for case in cases[:: len(cases) // 8 | 1]]


@dataclass(frozen=True)
class ProducedCase(Case):
    """Of the producer of a feature: which channels its two readers train, in train or eval mode."""

    name: str
    num_shared: int
    exit_start: int
    training: bool
    layout: str
    reader: str = "both"
    alone: str = ""

    def __str__(self) -> str:
        reader = "" if self.reader == "both" else f", {self.reader} read alone"
        alone = f", {self.alone} alone" if self.alone else ""
        return f"{self.name}, {self._mode()}, {self.layout}{reader}{alone}"

    def _mode(self) -> str:
        return "train" if self.training else "eval"

    def canonical(self) -> "ProducedCase":
        return replace(self, layout=layout_of_values(self.layout), alone="")

    def traits(self, problem: Problem) -> tuple[str, ...]:
        if self.alone:
            return (f"{self.alone} alone", self._mode())
        route = _route_traits(self.num_shared, self.exit_start, problem.num_channels)
        return (*route, f"{self.reader} read", self._mode(), self.layout)

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

    def call(self, function: Callable, problem: Problem, tensors: Results) -> tuple[Results, Results]:
        # The normalisation's own tensors stay in float32 at least, as under autocast.
        wide: Any = {
            "dtype": torch.promote_types(tensors["input"].dtype, torch.float32),
            "device": tensors["input"].device,
        }
        tensors |= {name: tensor.to(**wide) for name, tensor in tensors.items() if name in ("weight", "bias")}
        leaves = as_leaves(tensors, self.alone)
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
        )
        outputs = dict(zip(("full", "shared", "average", "exit"), produced, strict=True))
        return outputs | statistics, leaves

    def compare(
        self, problem: Problem, results: Results, oracle: Results, tolerance: Tolerance
    ) -> Iterator[Comparison]:
        # The averages of the exit's channels may be few, and all near zero: they are as good as those of all channels.
        scale = oracle["average"].double().square().mean().sqrt().item()
        for name, result in results.items():
            yield compare(name, result, oracle[name], tolerance, scale=scale if name == "exit" else 0.0)


def produced_cases(problem: Problem) -> list[Case]:
    """Every route that a beta makes, and that of the last block, whose exit trains everything.

    And every reader, and every tensor that wants a gradient, alone.
    """
    routes = {(0, 0): "last block"}
    for beta in BETAS:
        parts = Partition(problem.num_channels, beta)
        for exit_gradient in ("own", "whole"):
            route = parts.num_shared, parts.exit_live(exit_gradient).start
            routes.setdefault(route, f"beta={beta} {exit_gradient}")
    cases = [
        ProducedCase(name, num_shared, exit_start, training, layout)
        for ((num_shared, exit_start), name), training, layout in itertools.product(
            routes.items(), (True, False), problem.layouts
        )
    ]
    # What the gradient of the other reader's channels is then does not depend on strides.
    dense = [case for case in cases if case.layout == problem.layouts[0]]
    read_alone = [replace(case, reader=reader) for case in dense for reader in ("shared", "exit")]
    return [*cases, *read_alone, *_alone(problem, cases)]


def few_produced_cases(problem: Problem) -> list[Case]:
    """For a problem that takes long: one partition, in train and eval mode."""
    num_shared = Partition(problem.num_channels, 0.7).num_shared
    return [
        ProducedCase("beta=0.7 own", num_shared, num_shared, training, layout)
        for training, layout in itertools.product((True, False), problem.layouts[:2])
    ]


def _route_traits(num_shared: int, exit_start: int, num_channels: int) -> tuple[str, str]:
    """Whether the exit trains the shared channels too, and how many are shared."""
    amount = "none" if num_shared == 0 else "all" if num_shared == num_channels else "some"
    return "own" if exit_start == num_shared else "whole", f"{amount} shared"


@dataclass(frozen=True)
class PartitionCase(Case):
    """Of `partition`: beta, what the exit trains, and which reader sends a gradient."""

    beta: float
    exit_gradient: str
    reference: bool
    layout: str
    reader: str = "both"

    def __str__(self) -> str:
        referencing = "referencing" if self.reference else "no referencing"
        return f"beta={self.beta} {self.exit_gradient}, {referencing}, {self.reader} read, {self.layout}"

    def canonical(self) -> "PartitionCase":
        return replace(self, layout=layout_of_values(self.layout))

    def traits(self, problem: Problem) -> tuple[str, ...]:
        parts = Partition(problem.num_channels, self.beta)
        route = parts.num_shared, parts.exit_live(self.exit_gradient, self.reference).start
        return (*_route_traits(*route, problem.num_channels), f"{self.reader} read", self.layout)

    def call(self, function: Callable, problem: Problem, tensors: Results) -> tuple[Results, Results]:
        leaves = as_leaves(tensors, self.alone)
        routing = {"exit_gradient": self.exit_gradient, "reference": self.reference}
        parts = function(leaves["input"], self.beta, **problem.options, **routing)
        return dict(zip(("full", "shared", "exit"), parts, strict=True)), leaves


def partition_cases(problem: Problem) -> list[Case]:
    """Every beta, for both readers and for each alone."""
    routes = (("own", True), ("whole", True), ("whole", False))
    return [
        PartitionCase(beta, *route, layout, reader)
        for beta, route, reader, layout in itertools.product(BETAS, routes, ("both", "shared", "exit"), problem.layouts)
    ]


@dataclass(frozen=True)
class FixedCase(Case):
    """Of a convolution for evaluation alone: whether a ReLU follows, and the averages too; there is no gradient."""

    relu: bool
    averages: bool
    layout: str

    def __str__(self) -> str:
        return ", ".join(self._modes())

    def _modes(self) -> tuple[str, str, str]:
        return "ReLU" if self.relu else "no ReLU", "averages" if self.averages else "no averages", self.layout

    def canonical(self) -> "FixedCase":
        return replace(self, layout=layout_of_values(self.layout))

    def traits(self, problem: Problem) -> tuple[str, ...]:
        return self._modes()

    def run(
        self, function: Callable, problem: Problem, tensors: dict[str, Tensor | None], make_grad: MakeGrad
    ) -> Results:
        given = {name: lay_out(tensor, self.layout) for name, tensor in tensors.items() if tensor is not None}
        vectors = (given.get(name) for name in ("bias", "scale", "shift"))
        conv = FixedConv(given["weight"], problem.options["geometry"], *vectors)
        asked = {"relu": self.relu, "pool": problem.options["pool"], "averages": self.averages}
        with torch.no_grad():
            feature, average = function(given["input"], conv, given.get("residual"), **asked)
        return {"feature": feature} | ({} if average is None else {"average": average})


def fixed_cases(problem: Problem) -> list[Case]:
    """With and without ReLU and averages, in every layout."""
    modes = itertools.product((True, False), (True, False), problem.layouts)
    return [FixedCase(relu, averages, layout) for relu, averages, layout in modes]


def _compare_zeros(name: str, tensor: Tensor, mask: Tensor) -> Comparison:
    if tensor.shape != mask.shape:
        return failure(name, f"shape {tuple(tensor.shape)}, expected {tuple(mask.shape)}")
    outside = tensor[mask]
    return compare(name, outside, torch.zeros_like(outside), EXACT)
