"""A model as a graph of ATen operators, whole or cut behind each of its exits.

torch.export records what a model computes of one batch. A stage is what an exit needs and no exit before it does: the
nodes that its logits depend on and that no earlier stage has. So whatever torch.export can trace can be cut, and what
only deeper exits read is computed behind the exit. What passes from one stage to later ones is its *state*.
"""

import operator
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import Dim, ExportedProgram

from dfs_engine.checks import one_line


@dataclass(frozen=True)
class Graph:
    """One exported graph.

    Attributes:
        program: takes tensors by position, one for each of `inputs`, and returns as many as `outputs`, in a tuple.
        inputs, outputs: names. Of a stage, outputs are its logits and then the state that it makes, and inputs are what
            it reads of the state and of the model's inputs.
        dims: of each input, the dimensions of any size, and what they are called.
    """

    program: ExportedProgram
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    dims: tuple[dict[int, str], ...]


def trace(model: nn.Module, inputs: Mapping[str, Tensor], dims: Mapping[int, Dim], num_exits: int) -> Graph:
    """The graph of a whole model: functional, of ATen operators, attention and its like in one piece.

    Args:
        model: in evaluation mode.
        inputs: a batch, by the names of the arguments of `model.forward`, in their order; 2 samples or more.
        dims: dimension -> what stands for its size, of every input; the others keep the batch's sizes.

    Raises:
        ValueError: torch.export cannot trace the model, or its graph has other operators.
    """
    shapes = [dims for _ in inputs]
    program = _program(model, tuple(inputs.values()), shapes, "the model")
    outputs = tuple(f"logits_{index}" for index in range(1, num_exits + 1))
    return Graph(program, tuple(inputs), outputs, _names(shapes))


def _names(shapes: Sequence[Mapping[int, Dim]]) -> tuple[dict[int, str], ...]:
    return tuple({dim: symbol.__name__ for dim, symbol in shape.items()} for shape in shapes)


def _program(
    module: nn.Module, inputs: tuple[Tensor, ...], shapes: Sequence[Mapping[int, Dim]], what: str
) -> ExportedProgram:
    try:
        with torch.no_grad():
            program = torch.export.export(module, inputs, dynamic_shapes=tuple(map(dict, shapes)))
            program = program.run_decompositions({})  # makes it functional, and takes nothing apart
    except Exception as error:  # of any type: the model's code runs on tensors without values
        raise ValueError(
            f"export: expected {what} to be one that torch.export can trace, got {type(error).__name__}: "
            f"{one_line(error, 400)}"
        ) from error
    check_aten(program)
    for symbol in program.range_constraints.keys() - _symbols(program):
        del program.range_constraints[symbol]  # equal to another one; whoever loads the file would be warned of it
    return program


def _symbols(program: ExportedProgram) -> set[Any]:
    """Those in the sizes of a graph's tensors."""
    tensors = (node.meta.get("val") for node in program.graph.nodes)
    sizes: Iterator[Any] = (size for tensor in tensors if isinstance(tensor, Tensor) for size in tensor.shape)
    return {symbol for size in sizes if isinstance(size, torch.SymInt) for symbol in size.node.expr.free_symbols}


def check_aten(program: ExportedProgram) -> None:
    """That every node of a graph is an ATen operator, takes one of several results, or computes with sizes.

    Raises:
        ValueError: naming the others.
    """
    others = sorted(
        {
            str(node.target)
            for node in program.graph.nodes
            if node.op == "call_function" and not _is_aten(node.target) and not _is_size(node)
        }
    )
    if others:
        raise ValueError(
            f"export: expected ATen operators alone, which every runtime has, got {', '.join(others)}. Another layer "
            "of the model has to compute this in stock PyTorch."
        )


def _is_aten(target: Any) -> bool:
    return target is operator.getitem or (isinstance(target, torch._ops.OpOverload) and target.namespace == "aten")


def _is_size(node: fx.Node) -> bool:
    """Whether a node is a number, e.g. how many samples there are."""
    return isinstance(node.meta.get("val"), (int, torch.SymInt, torch.SymBool, torch.SymFloat))


def cut(whole: Graph, inputs: Mapping[str, Tensor], dims: Mapping[int, Dim]) -> list[Graph]:
    """One graph for each exit, shallow to deep.

    Args:
        whole: see `trace`. inputs, dims: what it was traced with.

    Raises:
        ValueError: what passes between two stages has no row for each sample, so that none could leave.
    """
    values = dict(inputs)
    named = _Stages(whole)
    graphs = []
    for index in range(named.num_stages):
        module, reads, makes = named.module(index)
        names = tuple(named.names[node] for node in reads)
        given = tuple(values[name] for name in names)
        shapes = [named.dims_of(node, dims) for node in reads]
        program = _program(module, given, shapes, f"stage {index + 1}")
        outputs = ("logits", *(named.names[node] for node in makes))
        graphs.append(Graph(program, names, outputs, _names(shapes)))
        with torch.no_grad():
            _, *made = module(*given)
        values.update(zip(graphs[-1].outputs[1:], made, strict=True))
    return graphs


class _Stages:
    """Which node of a graph belongs to which stage, and what passes between them.

    Attributes:
        names: of the model's inputs, and of every node whose value a later stage reads.
    """

    def __init__(self, whole: Graph) -> None:
        self.program = whole.program
        nodes = self.program.graph.nodes
        signature = self.program.graph_signature
        self.parameters = {
            **signature.inputs_to_parameters,
            **signature.inputs_to_buffers,
            **signature.inputs_to_lifted_tensor_constants,
        }
        given = [node for node in nodes if node.op == "placeholder" and node.name not in self.parameters]
        (output,) = self.program.graph.find_nodes(op="output")
        self.logits: list[fx.Node] = list(output.args[0])
        self.num_stages = len(self.logits)
        self.varies = set(given)
        """Nodes that depend on the input."""
        for node in nodes:
            if any(other in self.varies for other in node.all_input_nodes):
                self.varies.add(node)
        self.stage = self._assign(dict.fromkeys(given, -1))
        self.batch = given[0].meta["val"].shape[0]
        self.names = dict(zip(given, whole.inputs, strict=True))
        for number, node in enumerate(self._crossing(), start=1):
            self._check_rows(node)
            self.names[node] = f"state_{number}"

    def _assign(self, stage: dict[fx.Node, int]) -> dict[fx.Node, int]:
        """The stage of each node that some logits depend on; sizes and what does not vary belong to none."""
        for index, logits in enumerate(self.logits):
            stack = [logits]
            while stack:
                node = stack.pop()
                if node not in stage and node in self.varies and not _is_size(node):
                    stage[node] = index
                    stack.extend(node.all_input_nodes)
        for node in self.program.graph.nodes:  # a tuple passes nowhere: whoever makes it takes it apart
            if node.target is operator.getitem and node.args[0] in stage:
                stage[node] = stage[node.args[0]]
        return stage

    def _reads(self, index: int) -> list[fx.Node]:
        """What stage `index` reads of earlier ones and of the input."""
        mine = [node for node, stage in self.stage.items() if stage == index]
        read = {other for node in mine for other in node.all_input_nodes if self.stage.get(other, index) < index}
        return [node for node in self.program.graph.nodes if node in read]

    def _crossing(self) -> list[fx.Node]:
        read = {node for index in range(self.num_stages) for node in self._reads(index)}
        return [node for node in self.program.graph.nodes if node in read and self.stage[node] >= 0]

    def _check_rows(self, node: fx.Node) -> None:
        shape = node.meta["val"].shape
        if not shape or shape[0] != self.batch:
            raise ValueError(
                f"staged: expected what passes behind exit {self.stage[node] + 1} to have a row for each sample, got "
                f"{node.name} ({node.target}) of shape {tuple(map(str, shape))}. Put the exit elsewhere, or export the "
                "whole model."
            )

    def dims_of(self, node: fx.Node, dims: Mapping[int, Dim]) -> dict[int, Dim]:
        """Which dimensions of a stage's input are those of the model's inputs that vary."""
        first = next(iter(self.names)).meta["val"].shape
        by_size = {str(first[dim]): symbol for dim, symbol in dims.items()}
        shape = node.meta["val"].shape
        return {dim: by_size[str(size)] for dim, size in enumerate(shape) if str(size) in by_size}

    def module(self, index: int) -> tuple[fx.GraphModule, list[fx.Node], list[fx.Node]]:
        """Stage `index`, with what it reads and what of its state it makes."""
        graph, reads = fx.Graph(), self._reads(index)
        copied = {node: graph.placeholder(self.names[node]) for node in reads}
        root: dict[str, Tensor] = {}

        def copy(node: fx.Node) -> fx.Node:
            if node not in copied:
                copied[node] = self._size(node, reads, graph, copied, copy) or self._constant(node, graph, root, copy)
            return copied[node]

        for node in self.program.graph.nodes:
            if self.stage.get(node) == index:
                copied[node] = graph.node_copy(node, copy)
        makes = [node for node in self.names if self.stage[node] == index]
        graph.output((copied[self.logits[index]], *(copied[node] for node in makes)))
        return fx.GraphModule(root, graph), reads, makes

    def _size(self, node: fx.Node, reads: list[fx.Node], graph: fx.Graph, copied: Any, copy: Any) -> fx.Node | None:
        """A number that follows from the input's sizes: asked of what the stage reads."""
        if not _is_size(node) or node not in self.varies:
            return None
        for tensor in reads:
            for dim, size in enumerate(tensor.meta["val"].shape):
                if str(size) == str(node.meta["val"]):
                    return graph.call_function(torch.ops.aten.sym_size.int, (copied[tensor], dim))
        return graph.node_copy(node, copy)

    def _constant(self, node: fx.Node, graph: fx.Graph, root: dict[str, Tensor], copy: Any) -> fx.Node:
        """A parameter, or what is made of parameters alone: every stage has its own."""
        if node.op != "placeholder":
            return graph.node_copy(node, copy)
        path = self.parameters[node.name]
        tensors: Any = self.program.state_dict if path in self.program.state_dict else self.program.constants
        root[path] = tensors[path]
        return graph.get_attr(path)
