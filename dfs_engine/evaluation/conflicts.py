"""How far the exits' gradients pull in different directions: their cosines, layer by layer (paper section 3.1)."""

import contextlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from dfs_engine.gradients import gramian, rows_by_block
from dfs_engine.models.multi_exit import MultiExitModel, run_model
from dfs_engine.nn import exit_loss

LEVELS = ("network", "block", "parameter")
KINDS = ("shared", "disjoint")


@dataclass(frozen=True, slots=True)
class PairConflict:
    """Two exits' gradients by the same weights.

    Attributes:
        level: "parameter", "block" (all parameters of one as one vector) or "network" (all that the exits share).
        block: its name, "block 3"; "" of the network. parameter: its name; "" above that level.
        exit, other: the exits' numbers, from 1, the shallower first.
        kind: "disjoint": no element gets gradient from both, so that they cannot be in conflict. That is what surgery
            makes of its parts; a net without surgery has it where an exit does not read what its block makes (MSDNet's
            finest scales). "shared": some elements do.
        cosine: mean over the batches.
        negative: share of the batches in which it is negative.
        overlap: share of the elements with gradient from both among those with gradient from either, in the batch where
            it is largest.
    """

    level: str
    block: str
    parameter: str
    exit: int
    other: int
    kind: str
    cosine: float
    negative: float
    overlap: float


@dataclass(slots=True)
class _Sums:
    """Of one vector of weights, over the batches; (K, K) each."""

    cosine: Tensor
    negative: Tensor
    count: Tensor
    overlap: Tensor

    @classmethod
    def zeros(cls, num_exits: int) -> "_Sums":
        return cls(*(torch.zeros(num_exits, num_exits, dtype=torch.float64) for _ in range(4)))

    def add(self, products: "_Products") -> None:
        squares = products.gramian.diagonal()
        norms = (squares[:, None] * squares[None, :]).sqrt()
        # A gradient of zeros where the exit runs through is what surgery makes of it: no conflict either.
        cosine = torch.where(norms > 0, products.gramian / norms.where(norms > 0, 1), 0).clamp(-1, 1)
        sizes = products.both.diagonal()
        either = sizes[:, None] + sizes[None, :] - products.both
        self.cosine += cosine
        self.negative += cosine < 0
        reaching = products.reaching[:, None] & products.reaching[None, :]
        self.count += reaching & ((squares[:, None] > 0) | (squares[None, :] > 0))
        self.overlap = torch.maximum(self.overlap, products.both / either.clamp(min=1))


@dataclass(slots=True)
class _Products:
    """Of one batch: inner products, how many elements get gradient from both, (K, K) float64 each; who reaches them."""

    gramian: Tensor
    both: Tensor
    reaching: Tensor

    @classmethod
    def of(cls, column: Sequence[Tensor | None], reaching: Tensor) -> "_Products":
        nonzero = [None if gradient is None else (gradient != 0).to(gradient.dtype) for gradient in column]
        products, both = (gramian([[one] for one in rows]).cpu() for rows in (column, nonzero))
        return cls(products, both, reaching)

    def __add__(self, other: "_Products") -> "_Products":
        return _Products(self.gramian + other.gramian, self.both + other.both, self.reaching | other.reaching)


@dataclass(slots=True)
class _Measured:
    """(level, block, parameter) -> its sums, in the order of the network."""

    sums: dict[tuple[str, str, str], _Sums] = field(default_factory=dict)

    def add(self, key: tuple[str, str, str], products: _Products) -> None:
        self.sums.setdefault(key, _Sums.zeros(len(products.both))).add(products)


def check_has_conflicts(model: MultiExitModel) -> None:
    """Raises ValueError for a model with one exit."""
    if model.num_exits < 2:
        raise ValueError(
            f"model: expected one with two exits or more, whose gradients can be compared, got {model.name or 'one'} "
            f"with {model.num_exits}."
        )


def measure_conflicts(
    model: MultiExitModel,
    batches: Iterable[tuple[Tensor | Mapping[str, Tensor], Tensor]],
    on_batch: Callable[[], object] = lambda: None,
) -> list[PairConflict]:
    """Cosines between the gradients of the exits' own losses (`exit_loss`), in training mode.

    Leaves the model as it was, running statistics, gradients and torch's random numbers too.

    Args:
        model: whole gradients are compared, whatever its variant: what surgery leaves out shows as elements that get
            gradient from one exit alone.
        batches: of input and target, on the model's device.
        on_batch: called after each.

    Returns:
        By level, in the order of the network: every pair of exits that both run through it. An exit's own
        classifier has no pair.

    Raises:
        ValueError: one exit alone, no batch, or nothing that two exits run through and one trains.
    """
    check_has_conflicts(model)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    reached = [set(map(id, model.reached_parameters(index))) for index in range(model.num_exits)]
    reaching = {parameter: torch.tensor([parameter in own for own in reached]) for parameter in names}
    measured = _Measured()
    num_batches = 0
    with _as_it_was(model):
        for input, target in batches:
            _add_batch(measured, model, input, target, names, reaching)
            num_batches += 1
            on_batch()
    if num_batches == 0:
        raise ValueError("batches: expected one or more batches to measure conflicts on, got none.")
    pairs = list(_pairs(measured, list(names.values())))
    if not pairs:
        raise ValueError("model: expected exits that share trainable weights, got none that two exits train.")
    return pairs


def _add_batch(
    measured: _Measured,
    model: MultiExitModel,
    input: Any,
    target: Tensor,
    names: dict[int, str],
    reaching: dict[int, Tensor],
) -> None:
    def run() -> list[Tensor]:
        # Off bf16, as trainers do.
        logits = [one.to(torch.promote_types(one.dtype, torch.float32)) for one in run_model(model, input)]
        return [exit_loss(one, target) for one in logits]

    network: _Products | None = None
    blocks: dict[str, _Products] = {}
    for parameters, rows in rows_by_block(model, run):
        for index, parameter in enumerate(parameters):
            products = _Products.of([row[index] for row in rows], reaching[id(parameter)])
            name = names[id(parameter)]
            measured.add(("parameter", block_of(name), name), products)
            before = blocks.get(block_of(name))
            blocks[block_of(name)] = products if before is None else before + products
            network = products if network is None else network + products
    for block, products in blocks.items():
        measured.add(("block", block, ""), products)
    if network is not None:
        measured.add(("network", "", ""), network)


def _pairs(measured: _Measured, names: list[str]) -> Iterator[PairConflict]:
    place = {name: index for index, name in enumerate(names)}
    first: dict[str, int] = {}
    for name, index in place.items():
        first.setdefault(block_of(name), index)

    def order(key: tuple[str, str, str]) -> tuple[int, int]:
        level, block, parameter = key
        return LEVELS.index(level), place[parameter] if parameter else first.get(block, 0)

    for key in sorted(measured.sums, key=order):
        sums = measured.sums[key]
        for index, other in itertools.combinations(range(len(sums.count)), 2):
            count = sums.count[index, other].item()
            if count == 0:
                continue
            overlap = sums.overlap[index, other].item()
            yield PairConflict(
                *key,
                exit=index + 1,
                other=other + 1,
                kind="shared" if overlap > 0 else "disjoint",
                cosine=sums.cosine[index, other].item() / count,
                negative=sums.negative[index, other].item() / count,
                overlap=overlap,
            )


def block_of(parameter: str) -> str:
    """A parameter's block, by its name: "block 1" of "blocks.0.bn.weight"; of others what is before the last dot."""
    first, *rest = parameter.split(".")
    if first == "blocks" and rest and rest[0].isdigit():
        return f"block {int(rest[0]) + 1}"
    return parameter.rpartition(".")[0] or parameter


@contextlib.contextmanager
def _as_it_was(model: MultiExitModel) -> Iterator[None]:
    """In training mode within; then modes, buffers and random numbers are as before."""
    modes = {module: module.training for module in model.modules()}
    buffers = {buffer: buffer.clone() for buffer in model.buffers()}
    with torch.random.fork_rng(), torch.enable_grad():
        model.train()
        try:
            yield
        finally:
            for module, training in modes.items():
                module.training = training
            with torch.no_grad():
                for buffer, before in buffers.items():
                    buffer.copy_(before)


@dataclass(frozen=True, slots=True)
class ConflictSummary:
    """What a table says of some weights.

    Attributes:
        name: of a block, or "network".
        num_shared, num_disjoint: (parameter, pair of exits) whose gradients meet in some element, and in none.
        negative: share of negative cosines among the former, over all batches; NaN where there is none.
        cosine: the mean of theirs. lowest: the least of theirs, with its `exit` and `other`; None: none.
    """

    name: str
    num_shared: int
    num_disjoint: int
    negative: float
    cosine: float
    lowest: PairConflict | None


def summarise(pairs: Sequence[PairConflict]) -> list[ConflictSummary]:
    """One of each block, in order, and last one of the network, of the pairs of the parameters."""
    parameters = [pair for pair in pairs if pair.level == "parameter"]
    blocks = dict.fromkeys(pair.block for pair in parameters)
    groups = {block: [pair for pair in parameters if pair.block == block] for block in blocks}
    return [_summary(name, found) for name, found in [*groups.items(), ("network", parameters)]]


def _summary(name: str, pairs: Sequence[PairConflict]) -> ConflictSummary:
    shared = [pair for pair in pairs if pair.kind == "shared"]
    count = len(shared)
    return ConflictSummary(
        name,
        count,
        len(pairs) - count,
        sum(pair.negative for pair in shared) / count if count else float("nan"),
        sum(pair.cosine for pair in shared) / count if count else float("nan"),
        min(shared, key=lambda pair: pair.cosine, default=None),
    )
