"""Each exit's own gradient of a multi-exit model, their inner products, and weighted sums of them.

For methods that combine gradients instead of adding losses (PCGrad, CAGrad, Nash-MTL). Exit k of K has the row
g_k = d l_k / d theta: a list with one entry a parameter, None where the exit does not reach it. That is K truncated
backwards over one graph, which together cost (K + 1) / 2 whole ones where all blocks cost the same.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dfs_engine.models import MultiExitModel
from dfs_engine.nn.apart import Leaves
from dfs_engine.partition import ChannelSlice

Row = list[Tensor | None]


def exit_gradients(
    losses: Sequence[Tensor],
    parameters: Sequence[Tensor],
    reached: Sequence[Iterable[Tensor]] | None = None,
) -> list[Row]:
    """The gradient of each loss; the graph is freed with the last one.

    Args:
        losses: scalars of one graph, never stacked: one tensor of them would send zeros through every exit.
        parameters: what to differentiate by.
        reached: of each loss, those it may depend on; nothing is computed for the others. None: all.

    Returns:
        For each loss a list of the length of `parameters`, tensors of their shape and dtype; None where the loss does
        not depend on the parameter.

    Raises:
        TypeError: `losses` is one tensor.
    """
    if isinstance(losses, Tensor):
        raise TypeError("exit_gradients: expected a sequence of scalars, got one tensor. Do not stack the losses.")
    columns = {id(parameter): column for column, parameter in enumerate(parameters)}
    rows: list[Row] = []
    for index, loss in enumerate(losses):
        row: Row = [None] * len(parameters)
        within = parameters if reached is None else reached[index]
        chosen = [parameter for parameter in within if id(parameter) in columns]
        if loss.requires_grad and chosen:
            keeps_graph = index + 1 < len(losses)
            found = torch.autograd.grad(loss, chosen, retain_graph=keeps_graph, allow_unused=True)
            for parameter, gradient in zip(chosen, found, strict=True):
                row[columns[id(parameter)]] = gradient
        rows.append(row)
    return rows


def gramian(rows: Sequence[Row]) -> Tensor:
    """Inner products of gradients: ``G[i, j] = sum_p <rows[i][p], rows[j][p]>``, absent ones counting as zero.

    Returns:
        (K, K) float64 on the gradients' device, exactly symmetric; on the CPU where there is no gradient.
    """
    total: Tensor | None = None
    for column in zip(*rows, strict=True):
        present = [index for index, gradient in enumerate(column) if gradient is not None]
        if not present:
            continue
        # One order of elements for all: the layouts of two exits' gradients may differ.
        flat = torch.stack([column[index].reshape(-1) for index in present]).double()
        if total is None:
            total = flat.new_zeros(len(rows), len(rows))
        where = torch.tensor(present, device=flat.device)
        total[where[:, None], where] += flat @ flat.T
    if total is None:
        return torch.zeros(len(rows), len(rows), dtype=torch.float64)
    return (total + total.T) / 2


def weighted_sum(rows: Sequence[Row], weights: Sequence[float], parameters: Sequence[Tensor]) -> Row:
    """``sum_k weights[k] * rows[k]``.

    Returns:
        One tensor a parameter, in its strides, which fused optimizers want; None where no exit reaches it.
    """
    total: Row = []
    for parameter, column in zip(parameters, zip(*rows, strict=True), strict=True):
        if all(gradient is None for gradient in column):
            total.append(None)
            continue
        combined = torch.zeros_like(parameter, requires_grad=False)
        for weight, gradient in zip(weights, column, strict=True):
            if gradient is not None:
                combined.add_(gradient, alpha=weight)
        total.append(combined)
    return total


def rows_by_block(
    model: MultiExitModel, run: Callable[[], Sequence[Tensor]]
) -> Iterator[tuple[list[nn.Parameter], list[Row]]]:
    """Every exit's gradient by what the exits share, block after block, the deepest first.

    One block's gradients are held at a time, and of each exit its gradient by what the block reads: so an inner product
    needs no K gradients of all parameters. What a model has outside its blocks (exits attached to a backbone), or in
    several of them, comes as one block of everything.

    Args:
        run: runs the model and returns the loss of each exit, shallow to deep.

    Yields:
        The trainable parameters of a block, and a row of each exit with an entry for each of them.
    """
    blocks = [[parameter for parameter in block.parameters() if parameter.requires_grad] for block in _blocks(model)]
    reads: dict[int, list[Tensor]] = {}

    def see(index: int) -> Callable[..., None]:
        def hook(_module: nn.Module, input: tuple[Any, ...]) -> None:
            reads[index] = [value for value in input if isinstance(value, Tensor) and value.requires_grad]

        return hook

    with contextlib.ExitStack() as hooks:
        for index, block in enumerate(_blocks(model)):
            if index > 0:
                hooks.callback(block.register_forward_pre_hook(see(index)).remove)
        losses: list[Any] = list(run())
    if not blocks:
        shared = _shared_parameters(model)
        yield shared, exit_gradients(losses, shared)
        return
    # Of each exit: (what the block above reads, gradient by it).
    arriving: list[list[tuple[Tensor, Tensor]]] = [[] for _ in losses]
    for index in reversed(range(len(blocks))):
        parameters, read = blocks[index], reads.get(index, [])
        rows: list[Row] = [[None] * len(parameters) for _ in losses]
        for exit in reversed(range(index, len(losses))):  # this block's own one frees the graph
            is_own = exit == index
            arrived = [(losses[exit], torch.ones_like(losses[exit]))] if is_own else arriving[exit]
            found: Sequence[Tensor | None] = []
            if arrived and arrived[0][0].requires_grad and (parameters or read):
                outputs, gradients = zip(*arrived, strict=True)
                wanted = [*parameters, *read]
                found = torch.autograd.grad(outputs, wanted, gradients, retain_graph=not is_own, allow_unused=True)
                rows[exit] = list(found[: len(parameters)])
            by_read = zip(read, found[len(parameters) :], strict=False)
            arriving[exit] = [(tensor, gradient) for tensor, gradient in by_read if gradient is not None]
        losses[index] = None
        yield parameters, rows


def _blocks(model: MultiExitModel) -> list[nn.Module]:
    """The blocks, if they hold what the exits share and each its own; else none."""
    blocks = list(getattr(model, "blocks", []))
    held = [id(parameter) for block in blocks for parameter in block.parameters()]
    return blocks if set(held) == set(map(id, _shared_parameters(model, False))) and len(held) == len(set(held)) else []


def _shared_parameters(model: MultiExitModel, trainable: bool = True) -> list[nn.Parameter]:
    heads = {id(parameter) for index in range(model.num_exits) for parameter in model.exit_parameters(index)}
    parameters = (parameter for parameter in model.parameters() if parameter.requires_grad or not trainable)
    return [parameter for parameter in parameters if id(parameter) not in heads]


def gramian_by_block(model: MultiExitModel, run: Callable[[], Sequence[Tensor]]) -> Tensor:
    """`gramian` of what the exits share, without ever holding all of their gradients.

    Args:
        run: as in `rows_by_block`.
    """
    return torch.stack([gramian(rows).cpu() for _, rows in rows_by_block(model, run)]).sum(0)


class Piece(NamedTuple):
    """What one entry of a row is the gradient of.

    Attributes:
        column: of the parameter, in `ExitGradients.parameters`.
        rows: those of it (dimension 0) that the entry is of; None: all.
    """

    column: int
    rows: ChannelSlice | None = None

    def of(self, tensor: Tensor) -> Tensor:
        return tensor if self.rows is None else self.rows.of(tensor, 0)


class ExitGradients:
    """The gradients of a model's exits for one optimizer step, summed over the pieces of its batch.

    Args:
        routing: of each exit, the parameters that its loss trains. None: all that it reaches.

    Attributes:
        parameters: the model's trainable ones.
        is_head: of each, whether it belongs to one exit's classifier; the others are what the exits share.
        pieces: what the entries of a row are of.
        rows: see `exit_gradients`, with an entry for each of `pieces`; empty before the first `add`.
    """

    def __init__(self, model: MultiExitModel, routing: Sequence[Iterable[nn.Parameter]] | None = None) -> None:
        exits = range(model.num_exits)
        heads = {id(parameter) for index in exits for parameter in model.exit_parameters(index)}
        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.is_head = [id(parameter) in heads for parameter in self.parameters]
        self.pieces: list[Piece] = []
        self.rows: list[Row] = []
        self._fork = model.fork
        self._leaves: Leaves | None = None
        if routing is None:
            routing = [model.reached_parameters(index) for index in exits]
        self._reached = [list(dict.fromkeys(parameters)) for parameters in routing]

    def clear(self) -> None:
        """Forgets the rows, before a step, or after it to free their memory."""
        self.rows = []

    @contextlib.contextmanager
    def apart(self) -> Iterator[None]:
        """Around a forward pass: what an exit does not train of a layer is no part of its gradient then.

        A `dfs` VGG makes both parts of each feature by calls of their own (see `nn.apart`), so that exit k's backward
        computes the rows of k's part alone, and the rows that the deeper path trains in the layers before. Elsewhere
        nothing changes. `add` has to follow before the next pass.
        """
        with self._fork.apart() as self._leaves:
            yield

    def add(self, losses: Sequence[Tensor]) -> None:
        """Adds the gradients of these losses to the rows.

        Args:
            losses: as in `exit_gradients`, one of each exit, shallow to deep; of any other number, always the same one,
                each may reach everything.

        Raises:
            RuntimeError: some passes were made `apart` and others not.
        """
        inputs = [self._inputs(parameter) for parameter in self.parameters]
        pieces = [Piece(column, rows) for column, found in enumerate(inputs) for rows, _ in found]
        if self.rows and pieces != self.pieces:
            raise RuntimeError("ExitGradients: expected all passes of a step within `apart()`, or none, got both.")
        self.pieces = pieces
        reached = None
        if len(losses) == len(self._reached):
            reached = [[leaf for parameter in own for _, leaf in self._inputs(parameter)] for own in self._reached]
        rows = exit_gradients(losses, [leaf for found in inputs for _, leaf in found], reached)
        self._leaves = None
        if not self.rows:
            self.rows = rows
            return
        for row, more in zip(self.rows, rows, strict=True):
            for index, gradient in enumerate(more):
                before = row[index]
                row[index] = gradient if before is None else before if gradient is None else before + gradient

    def _inputs(self, parameter: nn.Parameter) -> Sequence[tuple[ChannelSlice | None, Tensor]]:
        """What the last pass used of a parameter: itself, or leaves of its rows."""
        leaves = self._leaves.of(parameter) if self._leaves is not None else []
        return leaves or [(None, parameter)]

    def gramian(self, *, include_heads: bool = False) -> Tensor:
        """(num_rows, num_rows) float64 on the CPU, of what the exits share; `include_heads`: of all parameters."""
        return gramian([self._chosen(row, include_heads) for row in self.rows]).cpu()

    def write(self, weights: Tensor, head_weights: Tensor | None = None) -> None:
        """Puts ``sum_k weights[k] * rows[k]`` into `.grad`, which becomes None where no exit reaches a parameter.

        Args:
            weights: (num_rows,).
            head_weights: (num_rows,), of the exits' own classifiers. None: 1, their plain gradients.
        """
        shared = weights.tolist()
        heads = [1.0] * len(self.rows) if head_weights is None else head_weights.tolist()
        for parameter in self.parameters:
            parameter.grad = None
        for index, piece in enumerate(self.pieces):
            parameter, is_head = self.parameters[piece.column], self.is_head[piece.column]
            part = piece.of(parameter)
            (total,) = weighted_sum([[row[index]] for row in self.rows], heads if is_head else shared, [part])
            if piece.rows is None or total is None:
                parameter.grad = total if piece.rows is None else parameter.grad
                continue
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter, requires_grad=False)
            piece.of(parameter.grad).copy_(total)

    def num_reaching(self) -> list[int]:
        """Of each parameter, how many rows reach it."""
        reaching: list[set[int]] = [set() for _ in self.parameters]
        for number, row in enumerate(self.rows):
            for piece, gradient in zip(self.pieces, row, strict=True):
                if gradient is not None:
                    reaching[piece.column].add(number)
        return [len(numbers) for numbers in reaching]

    def _chosen(self, row: Row, include_heads: bool) -> Row:
        pairs = zip(self.pieces, row, strict=True)
        return [gradient for piece, gradient in pairs if include_heads or not self.is_head[piece.column]]
