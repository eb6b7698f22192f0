"""What `attach_exits` has to know of a backbone: what runs, and who reads what. Learned from a copy of it."""

import contextlib
import copy
import difflib
import inspect
import operator
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn

from dfs_engine.nn.partitioned import Partitioned


class Consumers(NamedTuple):
    """What reads one feature.

    Attributes:
        partitioned: paths of the `nn.Conv2d` and `nn.Linear` that read the feature itself, and run once.
        detached: whatever else does: paths of modules, names of functions.
        writes: whether one of the latter writes into the feature.
    """

    partitioned: tuple[str, ...]
    detached: tuple[str, ...]
    writes: bool


class Observation(NamedTuple):
    """What one forward pass shows.

    Attributes:
        features: name -> output of the module of that name, without gradient, in the order of the pass.
        reached: for each of them, the names of the parameters that it depends on.
        classifier: path of the convolution or linear that ran last.
        input_shape: of one sample.
        output: of the backbone, (N, num_classes).
    """

    features: dict[str, Tensor]
    reached: list[list[str]]
    classifier: str
    input_shape: tuple[int, ...]
    output: Tensor


def check_names(backbone: nn.Module, at: Sequence[str]) -> list[str]:
    """`at` as a list, if it names modules of `backbone`.

    Raises:
        TypeError: one string. ValueError: none, one twice, or one that is not there, with the nearest that is.
    """
    if isinstance(at, str):
        raise TypeError(f"at: expected a list of module names, got {at!r}. Write at=[{at!r}].")
    names = list(at)
    known = [name for name, _ in backbone.named_modules() if name]
    for name in names:
        if name not in known:
            nearest = difflib.get_close_matches(str(name), known, n=3)
            hint = f" Did you mean {' or '.join(map(repr, nearest))}?" if nearest else ""
            raise ValueError(f"at: expected names as in backbone.named_modules(), got {name!r}.{hint}")
    if not names or len(set(names)) < len(names):
        raise ValueError(f"at: expected one or more modules, each once, got {names}.")
    return names


def copy_to_try(backbone: nn.Module) -> nn.Module:
    """A copy with buffers of its own, whose parameters share memory with the originals and all ask for gradient."""
    memo = {
        id(parameter): nn.Parameter(parameter.detach(), requires_grad=parameter.is_floating_point())
        for parameter in backbone.parameters()
    }
    return copy.deepcopy(backbone, memo)


def image_for(backbone: nn.Module) -> Tensor:
    """A black image of 224 x 224 with the channels that the first convolution reads."""
    for module in backbone.modules():
        if isinstance(module, nn.Conv2d):
            return module.weight.new_zeros(1, module.in_channels, 224, 224)
    raise ValueError("example_input: expected an input of a backbone without nn.Conv2d, got none. Give a small one.")


def observe(backbone: nn.Module, names: Sequence[str], input: Tensor) -> Observation:
    """Runs `backbone`, in evaluation mode.

    Raises:
        TypeError: a named module, or the backbone, that returns no tensor. ValueError: one that does not run exactly
            once, another order, an output that is not (N, num_classes).
    """
    features: dict[str, Tensor] = {}
    reached: list[list[str]] = []
    layers: list[str] = []
    parameter_names: dict[Tensor, str] = {parameter: name for name, parameter in backbone.named_parameters()}

    def see(name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
            if not isinstance(output, Tensor):
                raise TypeError(
                    f"at: expected modules that return a tensor, got {name!r}, which returns {type(output).__name__}. "
                    "Name a module inside it, or one that reads it."
                )
            if name in features:
                raise ValueError(
                    f"at: expected modules that run once in a forward pass, got {name!r}, which runs more often. "
                    "Name a module around its calls."
                )
            features[name] = output.detach()
            # Now, before anybody writes into the output.
            reached.append([parameter_names[p] for p in _leaves_of(output) if p in parameter_names])

        return hook

    with contextlib.ExitStack() as hooks:
        for name in names:
            hooks.enter_context(backbone.get_submodule(name).register_forward_hook(see(name)))
        for path, module in backbone.named_modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                hooks.enter_context(module.register_forward_hook(lambda *_, path=path: layers.append(path)))
        with torch.enable_grad():
            output = backbone.eval()(input)

    _check_pass(names, features, layers, output)
    return Observation(features, reached, layers[-1], tuple(input.shape[1:]), output.detach())


def _check_pass(names: Sequence[str], features: dict[str, Tensor], layers: list[str], output: Any) -> None:
    silent = [name for name in names if name not in features]
    if silent:
        raise ValueError(f"at: expected modules that run in a forward pass, got {', '.join(silent)}, which do not.")
    if list(features) != list(names):
        raise ValueError(f"at: expected modules in the order of the forward pass, {list(features)}, got {list(names)}.")
    if not isinstance(output, Tensor):
        raise TypeError(f"backbone: expected one whose output is a tensor, got a {type(output).__name__}.")
    if output.dim() != 2 or not layers:
        raise ValueError(
            f"backbone: expected logits (N, num_classes) that an nn.Linear or nn.Conv2d makes, got an output of shape "
            f"{tuple(output.shape)}."
        )


def _leaves_of(tensor: Tensor) -> list[Tensor]:
    """The leaf tensors that autograd would bring gradient to."""
    stack, seen, leaves = [tensor.grad_fn], set(), []
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):  # an AccumulateGrad
            leaves.append(node.variable)
        stack.extend(parent for parent, _ in node.next_functions)
    return leaves


def find_consumers(backbone: nn.Module, names: Iterable[str]) -> dict[str, Consumers]:
    """Who reads the outputs of the named modules, by torch.fx.

    Runs the code of `backbone` on proxies, once in each mode, since what runs may depend on it; buffers may change.

    Raises:
        Exception: of any type, where that code cannot be traced.
    """
    names = list(names)
    training, evaluation = (_trace(backbone.train(mode), names) for mode in (True, False))
    return {name: _merge(training[name], evaluation[name]) for name in names}


def _merge(first: Consumers, second: Consumers) -> Consumers:
    detached = tuple(dict.fromkeys(first.detached + second.detached))
    layers = dict.fromkeys(first.partitioned + second.partitioned)
    return Consumers(tuple(name for name in layers if name not in detached), detached, first.writes or second.writes)


def _feature(output: Any, name: str) -> Any:
    """Stands in the graph where the module of that name hands over its output."""
    return output


class _Proxy(fx.Proxy):
    """Tells `x += y`, which writes into x, from `x + y`."""


def _augmented(name: str) -> Callable[[_Proxy, Any], Any]:
    target = getattr(operator, name)
    return lambda self, other: self.tracer.create_proxy("call_function", target, (self, other), {})


_AUGMENTED = ("iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "iand", "ior", "ixor")
for _name in _AUGMENTED:
    setattr(_Proxy, f"__{_name}__", _augmented(_name))


class _Tracer(fx.Tracer):
    """Marks the outputs of some modules, also of those that the graph does not keep whole."""

    def __init__(self, names: dict[nn.Module, str]) -> None:
        super().__init__()
        self.names = names

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, Partitioned) or super().is_leaf_module(m, module_qualified_name)

    def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        output = super().call_module(m, forward, args, kwargs)
        name = self.names.get(m)
        return output if name is None else self.create_proxy("call_function", _feature, (output, name), {})


def find_cuts(backbone: nn.Module, names: Iterable[str]) -> frozenset[str]:
    """Those of the named modules behind which an evaluation pass reads their output and nothing that was made before.

    Raises as `find_consumers`.
    """
    graph, _ = _graph(backbone.eval(), list(names))
    position = {node: index for index, node in enumerate(graph.nodes)}
    made = [node for node in graph.nodes if node.op not in ("get_attr", "output")]
    last_read = {node: max((position[user] for user in node.users), default=-1) for node in made}
    return frozenset(
        str(feature.args[1])
        for feature in made
        if feature.target is _feature and not any(position[node] < position[feature] < last_read[node] for node in made)
    )


def find_units(backbone: nn.Module) -> list[tuple[str, str, str | None]]:
    """Paths of a convolution, the batch normalisation that alone reads it and the `nn.ReLU` that alone reads that, if
    there is one, of those that run once in an evaluation pass.

    Raises as `find_consumers`.
    """
    twin = copy_to_try(backbone).eval()
    for module in twin.modules():
        module._forward_hooks.clear()
        module._forward_pre_hooks.clear()
    graph, num_calls = _graph(twin, [])

    def alone(node: fx.Node, kind: Any) -> bool:
        is_call = node.op == "call_module" and num_calls[node.target] == 1
        return is_call and isinstance(twin.get_submodule(str(node.target)), kind)

    units = []
    for bn in graph.nodes:
        conv = bn.args[0] if bn.args else None
        if not alone(bn, nn.BatchNorm2d) or not isinstance(conv, fx.Node) or not alone(conv, nn.Conv2d):
            continue
        if len(conv.users) == 1:
            reader = next(iter(bn.users), None)
            has_relu = reader is not None and len(bn.users) == 1 and alone(reader, nn.ReLU)
            units.append(
                (str(conv.target), str(bn.target), str(reader.target) if reader is not None and has_relu else None)
            )
    return units


def next_partitionable(backbone: nn.Module, name: str, kind: type[nn.Module]) -> str | None:
    """The module nearest behind `name` whose output a layer of `kind` reads itself; None: there is none.

    Raises as `find_consumers`.
    """
    graph, num_calls = _graph(backbone.train(), [name])
    queue = [node for node in graph.nodes if node.target is _feature]
    for node in queue:  # grows: breadth first
        if node.op == "call_module" and num_calls[node.target] == 1:
            readers = _consumers(node, backbone, num_calls).partitioned
            if any(isinstance(backbone.get_submodule(reader), kind) for reader in readers):
                return str(node.target)
        queue.extend(user for user in node.users if user not in queue)
    return None


def _trace(backbone: nn.Module, names: list[str]) -> dict[str, Consumers]:
    graph, num_calls = _graph(backbone, names)
    found = {
        str(node.args[1]): _consumers(node, backbone, num_calls) for node in graph.nodes if node.target is _feature
    }
    for name in names:
        if name not in found:
            raise LookupError(f"{name!r} is inside a module that torch.fx does not look into")
    return found


def _graph(backbone: nn.Module, names: list[str]) -> tuple[fx.Graph, Counter[Any]]:
    """The graph with the outputs of the named modules marked, and how often each module is called in it."""
    # The first argument is the input; the others keep their defaults, as in `backbone(input)`.
    _, *others = inspect.signature(backbone.forward).parameters.values()
    defaults = {argument.name: argument.default for argument in others if argument.default is not argument.empty}
    tracer = _Tracer({backbone.get_submodule(name): name for name in names})
    graph = tracer.trace(backbone, concrete_args=defaults or None)
    return graph, Counter(node.target for node in graph.nodes if node.op == "call_module")


def _consumers(feature: fx.Node, backbone: nn.Module, num_calls: Counter[Any]) -> Consumers:
    partitioned, detached, writes = [], [], False
    for node in feature.users:
        name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", repr(node.target))
        layer = backbone.get_submodule(name) if node.op == "call_module" else None
        # Exactly these types: a subclass may compute something else.
        is_stock = type(layer) in (nn.Conv2d, nn.Linear) and node.args == (feature,) and not node.kwargs
        if is_stock and num_calls[node.target] == 1:
            partitioned.append(name)
            continue
        detached.append(name)
        if layer is not None:
            in_place = getattr(layer, "inplace", False)
        else:
            in_place = name in _AUGMENTED or name.endswith("_") or node.kwargs.get("inplace", False)
        writes = writes or (bool(in_place) and node.args[:1] == (feature,))
    return Consumers(tuple(partitioned), tuple(detached), writes)
