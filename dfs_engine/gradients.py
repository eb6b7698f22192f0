"""Each exit's own gradient of a multi-exit model, their inner products, and weighted sums of them.

For methods that combine gradients instead of adding losses (PCGrad, CAGrad, Nash-MTL). Exit k of K has the row
g_k = d l_k / d theta: a list with one entry a parameter, None where the exit does not reach it. That is K truncated
backwards over one graph, which together cost (K + 1) / 2 whole ones where all blocks cost the same.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from dfs_engine.models import MultiExitModel

Row = list[Tensor | None]


def exit_gradients(
    losses: Sequence[Tensor],
    parameters: Sequence[nn.Parameter],
    reached: Sequence[Iterable[nn.Parameter]] | None = None,
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


def weighted_sum(rows: Sequence[Row], weights: Sequence[float], parameters: Sequence[nn.Parameter]) -> Row:
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


class ExitGradients:
    """The gradients of a model's exits for one optimizer step, summed over the pieces of its batch.

    Args:
        routing: of each exit, the parameters that its loss trains. None: all that it reaches.

    Attributes:
        parameters: the model's trainable ones.
        is_head: of each, whether it belongs to one exit's classifier; the others are what the exits share.
        rows: see `exit_gradients`; empty before the first `add`.
    """

    def __init__(self, model: MultiExitModel, routing: Sequence[Iterable[nn.Parameter]] | None = None) -> None:
        exits = range(model.num_exits)
        heads = {id(parameter) for index in exits for parameter in model.exit_parameters(index)}
        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.is_head = [id(parameter) in heads for parameter in self.parameters]
        self.rows: list[Row] = []
        if routing is None:
            routing = [model.reached_parameters(index) for index in exits]
        self._reached = [list(dict.fromkeys(parameters)) for parameters in routing]

    def clear(self) -> None:
        """Forgets the rows, before a step, or after it to free their memory."""
        self.rows = []

    def add(self, losses: Sequence[Tensor]) -> None:
        """Adds the gradients of these losses to the rows.

        Args:
            losses: as in `exit_gradients`, one of each exit, shallow to deep; of any other number, always the same one,
                each may reach everything.
        """
        reached = self._reached if len(losses) == len(self._reached) else None
        rows = exit_gradients(losses, self.parameters, reached)
        if not self.rows:
            self.rows = rows
            return
        for row, more in zip(self.rows, rows, strict=True):
            for column, gradient in enumerate(more):
                before = row[column]
                row[column] = gradient if before is None else before if gradient is None else before + gradient

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
        for column, (parameter, is_head) in enumerate(zip(self.parameters, self.is_head, strict=True)):
            rows = [[row[column]] for row in self.rows]
            (parameter.grad,) = weighted_sum(rows, heads if is_head else shared, [parameter])

    def num_reaching(self) -> list[int]:
        """Of each parameter, how many rows reach it."""
        return [sum(gradient is not None for gradient in column) for column in zip(*self.rows, strict=True)]

    def _chosen(self, row: Row, include_heads: bool) -> Row:
        pairs = zip(row, self.is_head, strict=True)
        return [gradient for gradient, is_head in pairs if include_heads or not is_head]
