"""Exits on a backbone that was written without them."""

import copy
import functools
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, cast

from torch import Tensor, nn

from dfs_engine.checks import check_choice, one_line
from dfs_engine.models.backbone import (
    Consumers,
    Observation,
    check_names,
    copy_to_try,
    find_consumers,
    find_cuts,
    find_units,
    image_for,
    next_partitionable,
    observe,
)
from dfs_engine.models.leaving import AllLeftError, Leaving, say_where_all_wait
from dfs_engine.models.multi_exit import Distillation, MultiExitModel, OnExit, check_no_features, path_of
from dfs_engine.nn import (
    SLICED_VARIANTS,
    ConvAct,
    ExitHead,
    Fork,
    Reading,
    TokenHead,
    can_fix,
    convert_layers,
    layers_to_stock,
    partition_layer,
    to_stock,
    whole,
)
from dfs_engine.partition import ChannelSlice, Partition

logger = logging.getLogger(__name__)


def attach_exits(
    backbone: nn.Module,
    at: Sequence[str],
    *,
    beta: float = 0.5,
    head: Callable[[int, int], nn.Module] | None = None,
    num_classes: int | None = None,
    variant: str = "dfs",
    reference: bool = True,
    exit_gradient: str = "own",
    backend: str | None = None,
    example_input: Tensor | None = None,
) -> "AttachedModel":
    """A multi-exit model of a backbone: an exit at the output of each named module, the backbone's own output the last.

    The backbone is used, not copied. Until `to_backbone()`, each named module has a forward hook, and each `nn.Conv2d`
    or `nn.Linear` that reads a named module's output directly computes grad_input for its slice alone: the same object
    with the same Parameters and state_dict keys, of the class `PartitionedConv2d` or `PartitionedLinear`. Whatever else
    reads a feature (a sum, a concatenation, a normalisation, a pool) gets the published `cat` + `detach`: the same
    gradients, no work saved. Where torch.fx cannot trace the backbone, everything gets that. The log says which and
    why, and warns where nothing is saved; `model.consumers` holds it.

    Args:
        backbone: input -> logits (N, num_classes).
        at: names as in `backbone.named_modules()`, shallow to deep, of modules that run once in a forward pass and
            return images (N, C, H, W) or tokens (N, T, C).
        beta, variant, reference, exit_gradient, backend: as `create_model`.
        head: (channels, num_classes) -> module from a feature to logits (N, num_classes). None: `ExitHead` with a bias
            for images, `TokenHead` for tokens.
        num_classes: None: as many as the backbone's output has.
        example_input: an input of the backbone, on which a copy of it runs once. None: one image of 224 x 224 pixels
            with the channels that the first convolution reads.

    Raises:
        ValueError: an unknown name, a module that does not run exactly once, names in another order than the forward
            pass, an output that is not (N, num_classes), an unknown option. TypeError: a named module that returns no
            tensor. The backbone is unchanged then.
    """
    make_fork = functools.partial(
        Fork, beta, variant, reference=reference, exit_gradient=exit_gradient, backend=backend
    )
    fork = make_fork()
    names = check_names(backbone, at)
    twin = copy_to_try(backbone)
    seen = _observe(twin, names, example_input)
    width = seen.output.size(1)
    if num_classes not in (None, width):
        raise ValueError(
            f"num_classes: expected {width}, the width of the backbone's output, got {num_classes}. "
            "Replace the backbone's last layer first, or leave num_classes out."
        )
    exits = []
    for name, feature in seen.features.items():
        dim = 1 if feature.dim() > 3 else -1
        classifier = _default_head(name, feature, width) if head is None else head(feature.size(dim), width)
        classifier.to(feature.device, feature.dtype)
        exits.append(AttachedExit(name, classifier, make_fork(dim=dim), feature.size(dim)))
    try:
        consumers, cuts, reason = find_consumers(twin, names), find_cuts(twin, names), None
    except Exception as error:  # the backbone's code runs on proxies, and may raise anything there
        consumers, cuts = dict.fromkeys(names, Consumers((), ("whatever reads it",), writes=True)), frozenset()
        reason = f"{type(error).__name__}: {one_line(error)}"
    model = AttachedModel(backbone, exits, fork, seen, consumers, cuts)
    if variant in SLICED_VARIANTS:
        _log(model.consumers, reason, twin, seen)
    return model


def _observe(twin: nn.Module, names: list[str], example_input: Tensor | None) -> Observation:
    if example_input is not None:
        return observe(twin, names, example_input)
    image = image_for(twin)
    try:
        return observe(twin, names, image)
    except RuntimeError as error:
        raise ValueError(
            f"example_input: expected an input that the backbone takes, got none, and an image of shape "
            f"{tuple(image.shape)} does not fit ({one_line(error)}). Give one."
        ) from error


def _default_head(name: str, feature: Tensor, num_classes: int) -> nn.Module:
    if feature.dim() == 4:
        return ExitHead(feature.size(1), num_classes, bias=True)
    if feature.dim() == 3:
        return TokenHead(feature.size(-1), num_classes)
    raise ValueError(
        f"at: expected modules that return images (N, C, H, W) or tokens (N, T, C), got {name!r}, which returns shape "
        f"{tuple(feature.shape)}. Give a head for it."
    )


def _log(consumers: dict[str, Consumers], reason: str | None, twin: nn.Module, seen: Observation) -> None:
    if reason is not None:
        logger.warning(
            "attach_exits: torch.fx cannot trace the backbone (%s), so whatever reads %s gets the detach form: the "
            "same gradients, no work saved",
            reason,
            ", ".join(consumers),
        )
        return
    for name, (partitioned, detached, _) in consumers.items():
        if detached and not partitioned:
            better = next_partitionable(twin, name, nn.Conv2d if seen.features[name].dim() > 3 else nn.Linear)
            remedy = f"Put {better!r} into `at` in its place" if better else "Put another module into `at`"
            logger.warning(
                "attach_exits: no nn.Conv2d or nn.Linear reads %s itself, but %s: right gradients, no work saved. %s, "
                "whose output one reads, to save it.",
                name,
                ", ".join(detached),
                remedy,
            )
            continue
        rest = f"; in the detach form, which saves no work: {', '.join(detached)}" if detached else ""
        logger.info(
            "attach_exits: %s is read by partitioned layers: %s%s", name, ", ".join(partitioned) or "none", rest
        )


def _partition(layer: nn.Module, fork: Fork, columns: ChannelSlice) -> bool:
    """Lets a stock layer train through `columns` of its input alone; returns whether it can."""
    is_conv = isinstance(layer, nn.Conv2d)
    if fork.variant not in SLICED_VARIANTS or is_conv != (fork.dim == 1):  # a linear on the last axis of images
        return False
    if fork.variant == "split":  # what two stock calls can compute
        cuts = not isinstance(layer, nn.Conv2d) or (layer.groups == 1 and layer.padding_mode == "zeros")
        if not cuts or columns.width == 0:
            return False
    options: Any = {"reference": fork.reference, "variant": fork.variant, "backend": fork.backend}
    partition_layer(cast(Any, layer), *columns, **options)
    return True


class _Side(NamedTuple):
    """One of the two that read a feature: the rest of the backbone, or a head.

    Attributes:
        consumers: which of its layers are partitioned, and what else reads the feature. Both are empty where it trains
            the whole feature.
        keeps_slice: whether, given the feature itself, it sends gradient to its own channels alone.
    """

    consumers: Consumers
    keeps_slice: bool

    @classmethod
    def of(cls, root: nn.Module, found: Consumers, fork: Fork, columns: ChannelSlice, num_channels: int) -> "_Side":
        """Partitions the layers of `root` that read the feature."""
        if fork.variant == "dense" or columns.width == num_channels:
            return cls(Consumers((), (), found.writes), True)
        partitioned = [path for path in found.partitioned if _partition(root.get_submodule(path), fork, columns)]
        stock = [path for path in found.partitioned if path not in partitioned]
        detached = (*stock, *found.detached)
        return cls(Consumers(tuple(partitioned), detached, found.writes), not detached)

    def tensor(self, feature: Tensor, reading: Reading) -> Tensor:
        """What it reads, as one tensor that it may write into if it does."""
        if not self.keeps_slice:
            return whole(reading)
        return feature.clone() if self.consumers.writes else feature


class AttachedExit(nn.Module):
    """The fork of a feature, and the classifier behind it: a forward hook of the module that makes the feature.

    Args:
        name: of that module.
        head: a module on tensors, or an `ExitHead` or `TokenHead`, which take any `Reading`.
        fork: routes the feature.
        num_channels: of the feature.

    Attributes:
        is_cut: whether the rest of the backbone reads nothing but the feature, so that samples can leave here.
        leaving: of the forward pass that runs, if samples leave in it.
    """

    def __init__(self, name: str, head: nn.Module, fork: Fork, num_channels: int) -> None:
        super().__init__()
        self.name, self.head, self.fork = name, head, fork
        self.num_channels = num_channels
        self.takes_readings = isinstance(head, (ExitHead, TokenHead))
        self._head_side = None if self.takes_readings else self._side_of_head()
        if self.takes_readings:
            convert_layers(head, fork.variant, fork.backend)
        self._deeper_side: _Side | None = None
        self.is_cut = False
        self.leaving: Leaving | None = None
        self._kept: tuple[Tensor, Tensor] | None = None

    def _side_of_head(self) -> _Side:
        parts = Partition(self.num_channels, self.fork.beta)
        live = parts.exit_live(self.fork.exit_gradient, self.fork.reference)
        try:
            # What reads the identity's output is what reads the head's input.
            found = find_consumers(nn.Sequential(nn.Identity(), copy_to_try(self.head)), ["0"])["0"]
        except Exception as error:  # as in attach_exits
            logger.info("attach_exits: torch.fx cannot trace the head at %s: %s", self.name, error)
            found = Consumers((), ("whatever reads it",), writes=True)
        return _Side.of(nn.Sequential(nn.Identity(), self.head), found, self.fork, live, self.num_channels)

    def connect(self, backbone: nn.Module, found: Consumers) -> Consumers:
        """Takes the place of the feature in `backbone`; returns what reads it, and how."""
        shared = Partition(self.num_channels, self.fork.beta).shared
        self._deeper_side = _Side.of(backbone, found, self.fork, shared, self.num_channels)
        self._hook = backbone.get_submodule(self.name).register_forward_hook(self)
        return self._deeper_side.consumers

    def disconnect(self, backbone: nn.Module) -> None:
        """Undoes `connect`."""
        assert self._deeper_side is not None
        self._hook.remove()
        for path in self._deeper_side.consumers.partitioned:
            to_stock(backbone.get_submodule(path))

    def forward(self, _module: nn.Module, _inputs: Any, feature: Tensor) -> Tensor:
        """Keeps the logits and the feature for `take`; returns what the rest of the backbone reads in its place."""
        assert self._deeper_side is not None
        deeper, reading = self.fork(feature)
        if self._head_side is not None:
            reading = (self._head_side.tensor(feature, reading),)
        logits, output = self.head(*reading), self._deeper_side.tensor(feature, deeper)
        if self.leaving is not None:
            return self.leaving(logits, output, is_cut=self.is_cut)
        self._kept = logits, feature
        return output

    def take(self) -> tuple[Tensor, Tensor]:
        """(logits, feature) of the forward pass that has just ended."""
        kept, self._kept = self._kept, None
        if kept is None:
            raise RuntimeError(
                f"attach_exits: expected {self.name!r} to run in every forward pass, got one without it."
            )
        return kept


class _LastInput(nn.Module):
    """A forward hook that keeps what the backbone's last layer reads."""

    def __init__(self) -> None:
        super().__init__()
        self._kept: Tensor | None = None

    def forward(self, _module: nn.Module, inputs: tuple[Tensor], _output: Any) -> None:
        (self._kept,) = inputs

    def take(self) -> Tensor:
        kept, self._kept = self._kept, None
        assert kept is not None
        return kept

    def drop(self) -> None:
        self._kept = None


class AttachedModel(MultiExitModel):
    """What `attach_exits` returns: the `MultiExitModel` contract on a backbone of any kind.

    `features[k]` is the output of the k-th named module; the last feature is what the backbone's last linear or
    convolution reads, and that layer is the last exit's classifier.

    Attributes:
        backbone: the caller's module.
        consumers: name -> which layers read that module's output partitioned, and what reads it in the detach form.
            Both are empty where nothing is split: in variant "dense", and at beta = 1.
    """

    distillation = Distillation("blocks")

    def __init__(
        self,
        backbone: nn.Module,
        exits: list[AttachedExit],
        fork: Fork,
        seen: Observation,
        consumers: dict[str, Consumers],
        cuts: frozenset[str],
    ) -> None:
        super().__init__([], [], fork, num_classes=seen.output.size(1), input_shape=seen.input_shape)
        self.backbone, self.exits = backbone, nn.ModuleList(exits)
        self.consumers = {exit.name: exit.connect(backbone, consumers[exit.name]) for exit in exits}
        for exit in exits:
            exit.is_cut = exit.name in cuts
        self._reached, self._classifier = seen.reached, seen.classifier
        self._last_input = _LastInput()
        self._hook = backbone.get_submodule(seen.classifier).register_forward_hook(self._last_input)

    @property
    def num_exits(self) -> int:
        return len(self.exits) + 1

    def forward(self, input: Tensor, *, return_features: bool | str = False, on_exit: OnExit | None = None) -> Any:
        """As `MultiExitModel.forward`, on what the backbone takes; of the features it has the "blocks" alone.

        With `on_exit`, samples leave the batch at an exit behind which the backbone reads nothing but its feature, as
        torch.fx sees it. At another, and where torch.fx cannot trace the backbone, the pass ends when all have left.
        """
        if return_features not in (False, True):
            check_choice("return_features", return_features, ("blocks",))
        if return_features:
            check_no_features(on_exit)
        if on_exit is not None:
            return self._run_leaving(input, on_exit)
        output = self.backbone(input)
        taken = [cast(AttachedExit, exit).take() for exit in self.exits]
        last = self._last_input.take()
        logits = [*(exit_logits for exit_logits, _ in taken), output]
        return (logits, [*(feature for _, feature in taken), last]) if return_features else logits

    def _run_leaving(self, input: Tensor, on_exit: OnExit) -> list[Tensor]:
        exits = [cast(AttachedExit, exit) for exit in self.exits]
        say_where_all_wait([exit.name for exit in exits if not exit.is_cut])
        leaving = Leaving(on_exit)
        for exit in exits:
            exit.leaving = leaving
        try:
            leaving.end(self.backbone(input))
        except AllLeftError:
            pass
        finally:
            for exit in exits:
                exit.leaving = None
            self._last_input.drop()
        return leaving.logits

    def exit_parameters(self, index: int) -> Iterator[nn.Parameter]:
        """Parameters of exit `index`'s classifier alone; of the last exit: of the backbone's last layer."""
        is_last = index == len(self.exits)
        return (self.backbone.get_submodule(self._classifier) if is_last else self.exits[index]).parameters()

    def reached_parameters(self, index: int) -> Iterator[nn.Parameter]:
        """Parameters that exit `index` runs through: its classifier, and those that its feature depends on."""
        if index == len(self.exits):
            yield from self.backbone.parameters()
        else:
            yield from (self.backbone.get_parameter(name) for name in self._reached[index])
            yield from self.exit_parameters(index)

    def get_config(self) -> dict[str, Any]:
        """As `MultiExitModel.get_config`; "name" is the backbone's class, and "at" names the modules with exits.

        It does not rebuild somebody else's backbone: to load the weights, attach the same exits to such a backbone.
        """
        return {
            **super().get_config(),
            "name": path_of(type(self.backbone)),
            "at": [cast(AttachedExit, exit).name for exit in self.exits],
        }

    def _copy_as(self, variant: str) -> "AttachedModel":
        twin = copy.deepcopy(self)
        exits = [cast(AttachedExit, exit) for exit in twin.exits]
        backbone, heads = twin.to_backbone(), iter([exit.head for exit in exits])
        for exit in exits:
            layers_to_stock(exit.head)
        fork = self.fork
        other = attach_exits(
            backbone,
            [exit.name for exit in exits],
            beta=fork.beta,
            head=lambda *_: next(heads),
            variant=variant,
            reference=fork.reference,
            exit_gradient=fork.exit_gradient,
            backend=fork.backend,
            example_input=self.example_input(1),
        )
        other.training = self.training
        return other

    def for_inference(self) -> "AttachedModel":
        """Folds each batch normalisation, and the `nn.ReLU` behind it, into the convolution that it alone reads, as far
        as torch.fx shows it; see `MultiExitModel.for_inference`."""
        backbone = self.backbone
        try:
            units = find_units(backbone)
        except Exception as error:  # as in attach_exits
            logger.warning(
                "prepare: torch.fx cannot trace the backbone (%s), so its batch normalisations stay apart from the "
                "convolutions.",
                f"{type(error).__name__}: {one_line(error)}",
            )
            return self
        for conv_path, bn_path, relu_path in units:
            conv, bn = backbone.get_submodule(conv_path), backbone.get_submodule(bn_path)
            if not can_fix(conv, bn):
                continue
            relu = None if relu_path is None else backbone.get_submodule(relu_path)
            has_relu = type(relu) is nn.ReLU and not relu._forward_hooks and not relu._forward_pre_hooks
            backend: Any = getattr(conv, "backend", None)
            backbone.set_submodule(conv_path, ConvAct(conv, bn, relu=has_relu, backend=backend))
            backbone.set_submodule(bn_path, nn.Identity())
            if has_relu:
                backbone.set_submodule(cast(str, relu_path), nn.Identity())
        return self

    def to_backbone(self) -> nn.Module:
        """Gives the backbone back as it came, trained; this model is of no use afterwards.

        Raises:
            TypeError: a snapshot that `inference.prepare` made, whose layers are no longer the backbone's.
        """
        if any(isinstance(module, ConvAct) for module in self.modules()):
            raise TypeError(
                "to_backbone: expected a model with its backbone's own layers, got a snapshot that prepare() made. "
                "Call to_backbone() of the model that was given to prepare()."
            )
        self._hook.remove()
        for exit in self.exits:
            cast(AttachedExit, exit).disconnect(self.backbone)
        return self.backbone
