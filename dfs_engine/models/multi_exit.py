"""The contract of every multi-exit model."""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from dfs_engine.checks import check_choice
from dfs_engine.models.variants import check_same_outputs, zero_unread_columns
from dfs_engine.nn.convert import to_stock
from dfs_engine.nn.fork import SLICED_VARIANTS, VARIANTS, Fork
from dfs_engine.nn.linear import PartitionedLinear
from dfs_engine.nn.reading import Reading, flat, readings, select_rows, select_samples
from dfs_engine.partition import ChannelSlice

FEATURES = ("blocks", "exits")

OnExit: TypeAlias = Callable[[int, Tensor], Tensor | None]
"""What `MultiExitModel.forward` calls behind each exit, with its index and its logits (n, num_classes) of the n samples
that are still there. It returns which of them go on, int64 row numbers; None: all. Behind the last exit nobody does."""


class Distillation(NamedTuple):
    """What feature distillation compares in a family (`methods.BYOT`).

    Attributes:
        features: "exits" or "blocks", as in `MultiExitModel.forward`.
        size: a block's feature is pooled to so many pixels a side.
        bias: whether the adapters have one.
    """

    features: str = "exits"
    size: int = 1
    bias: bool = True


class Block(nn.Module):
    """Makes a feature from what it reads; a family overrides `make`, and `produce` where it has a fused form.

    Where the deeper path reads more than the feature that is split (MSDNet: other scales), what `make` makes is what
    `route` and `feature_of` know to take apart.
    """

    def forward(self, *input: Any, fork: Fork, is_last: bool, return_feature: bool = False, **context: Any) -> tuple:
        """What the deeper path and the exit read of this block's feature, one reading after the other.

        Args:
            input: a reading, the arguments that a layer is called with (see `nn.reading`), or several.
            is_last: the last feature is not split.
            return_feature: also return the feature, whole and with full gradient.
            context: what else `make` takes, the same for all blocks.
        """
        if not return_feature:
            return flat(self.produce(input, fork, is_last, **context))
        made = self.make(*input, **context)
        return (*flat(self.route(made, fork, is_last)), self.feature_of(made))

    def make(self, *input: Any, **context: Any) -> Any:
        """The feature, of a reading."""
        raise NotImplementedError

    def produce(self, input: tuple, fork: Fork, is_last: bool, **context: Any) -> tuple[Reading, ...]:
        """What the deeper path reads, and last what the exit does."""
        return self.route(self.make(*input, **context), fork, is_last)

    def route(self, made: Any, fork: Fork, is_last: bool) -> tuple[Reading, ...]:
        """The same, of what `make` made."""
        return ((made,), (made,)) if is_last else fork(made)

    def feature_of(self, made: Any) -> Tensor:
        """The feature that the exit reads, of what `make` made."""
        return made


def run_model(model: nn.Module, input: Tensor | Mapping[str, Tensor], **options: Any) -> Any:
    """Calls a multi-exit model, or what wraps one, on a batch: a tensor, or a mapping of its keyword arguments."""
    return model(**input, **options) if isinstance(input, Mapping) else model(input, **options)


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Puts modules in training mode into evaluation mode for a block, and back."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


def check_no_features(on_exit: OnExit | None) -> None:
    """That `on_exit` is not asked for together with features."""
    if on_exit is not None:
        raise ValueError(
            "on_exit: expected return_features=False beside it, since samples leave. Leave out one of both."
        )


def _select_context(value: Any, num_samples: int, rows: Tensor) -> Any:
    has_rows = isinstance(value, Tensor) and value.dim() > 0 and value.size(0) == num_samples
    return select_rows(value, rows) if has_rows else value


class MultiExitModel(nn.Module):
    """A chain of blocks, each feeding one exit; every feature but the last is forked by Deep Feature Surgery.

    Block k makes feature f_k; exit k and block k + 1 read it through `fork`. A family passes its blocks and exits.

    Args:
        blocks: block k maps what it reads of f_{k-1} (an image tensor for k = 0) to the tensor f_k.
        exits: module k maps a `Reading` of f_k to logits (N, num_classes).
        fork: routes the features.
        num_classes: width of the logits.
        input_shape: (C, H, W) of one image, as published; (T,) of a model that reads at most T tokens.
        others: what a base class beside this one takes.
    """

    # Set by `create_model`, for `get_config` and `to_variant`.
    name: str = ""
    options: dict[str, Any]
    create: "Callable[..., MultiExitModel] | None" = None
    # A family with a published form of its own says so.
    distillation = Distillation()
    # What stands for an argument of `forward` that is not given, where all of them have to be.
    input_defaults: ClassVar[dict[str, int]] = {}

    def __init__(
        self,
        blocks: list[Block],
        exits: list[nn.Module],
        fork: Fork,
        *,
        num_classes: int,
        input_shape: tuple[int, ...],
        **others: Any,
    ) -> None:
        super().__init__(**others)
        assert len(blocks) == len(exits)
        self.blocks, self.exits, self.fork = nn.ModuleList(blocks), nn.ModuleList(exits), fork
        self.num_classes, self.input_shape, self.options = num_classes, input_shape, {}

    @property
    def num_exits(self) -> int:
        return len(self.exits)

    @property
    def variant(self) -> str:
        return self.fork.variant

    def forward(self, input: Tensor, *, return_features: bool | str = False, on_exit: OnExit | None = None) -> Any:
        """Returns every exit's logits, shallow to deep.

        Args:
            input: images (N, C, H, W).
            return_features: "exits": also return each exit's own last feature (N, D_k), which its last layer reads:
                gradient that comes in there goes where the exit's goes. "blocks", or True: also return what the blocks
                make, f_k, whole and with full gradient; a `dfs` model computes without its fused blocks then.
            on_exit: says behind each exit which samples go on. The others leave the batch, and where none goes on, the
                pass ends. See `dfs_engine.inference.EarlyExit`.

        Returns:
            list of num_exits tensors (N, num_classes); with `return_features`, a pair of that and a list of features;
            with `on_exit`, as many tensors as exits have run, each of the samples that reached it.

        Raises:
            ValueError: `return_features` and `on_exit` together.
        """
        # The kernels behind it want that, and it is small.
        if self.fork.variant == "dfs" and self.fork.dim == 1 and not torch.compiler.is_exporting():
            input = input.contiguous(memory_format=torch.channels_last)
        return self._run((input,), return_features, on_exit)

    def _run(self, deeper: tuple, return_features: bool | str, on_exit: OnExit | None = None, **context: Any) -> Any:
        """`forward` of the first block's arguments; `context` is what all blocks are called with besides.

        A tensor of `context` has a row for each sample, or one for all.
        """
        if return_features is not False:
            check_choice("return_features", "blocks" if return_features is True else return_features, FEATURES)
            check_no_features(on_exit)
        wants_blocks, wants_exits = return_features in (True, "blocks"), return_features == "exits"
        logits, features = [], []
        last = self.num_exits - 1
        for index, (block, exit) in enumerate(zip(self.blocks, self.exits, strict=True)):
            made = block(*deeper, fork=self.fork, is_last=index == last, return_feature=wants_blocks, **context)
            if wants_blocks:
                made, feature = made[:-1], made[-1]
                features.append(feature)
            *others, reading = readings(made)
            deeper = flat(others)
            if wants_exits:
                exit_logits, feature = exit(*reading, return_feature=True)
                features.append(feature)
            else:
                exit_logits = exit(*reading)
            logits.append(exit_logits)
            kept = None if on_exit is None else on_exit(index, exit_logits)
            if kept is None or index == last:
                continue
            if len(kept) == 0:
                break
            deeper = select_samples(deeper, kept)
            context = {name: _select_context(value, len(exit_logits), kept) for name, value in context.items()}
        return (logits, features) if return_features else logits

    def to_variant(self, variant: str) -> "MultiExitModel":
        """A copy in another variant: the same weights, the same logits in evaluation mode, other gradients.

        Without referencing (`reference=False`), weight columns outside the slices are zeroed in a "dense" copy.

        Args:
            variant: "dense", which is stock PyTorch throughout, "detach", "split" or "dfs".

        Raises:
            ValueError: an unknown variant; or, between "dense" and the others without referencing, a model that cannot
                compute the same there, for the reason named. TypeError: a model that `create_model` did not build.
        """
        check_choice("variant", variant, VARIANTS)
        other = self._copy_as(variant)
        if not self.fork.reference and variant != self.variant and "dense" in (variant, self.variant):
            inputs = self.example_inputs(2)
            if variant == "dense":
                sliced = self if self.variant in SLICED_VARIANTS else self._copy_as("dfs")
                with evaluating(sliced):
                    zero_unread_columns(sliced, other, inputs)
            check_same_outputs(self, other, inputs)
        return other

    def _copy_as(self, variant: str) -> "MultiExitModel":
        if self.create is None:
            raise TypeError(
                f"to_variant: expected a model of create_model or attach_exits, got a {type(self).__name__} made "
                "otherwise. Build it anew in that variant, and load its state_dict."
            )
        first = next(self.parameters())
        config = {**self.get_config(), "variant": variant}
        with torch.random.fork_rng():  # whose numbers the copy's own weights, which go, would take
            other = self.create(**config, device=first.device, dtype=first.dtype)
        other.load_state_dict(self.state_dict())
        for name, parameter in other.named_parameters():
            parameter.requires_grad_(self.get_parameter(name).requires_grad)
        for name, module in other.named_modules():
            module.training = self.get_submodule(name).training
        return other

    def example_input(self, batch: int = 1) -> Any:
        """A random batch of what `forward` takes, where the model is and in its dtype."""
        parameter = next(self.parameters())
        return torch.randn(batch, *self.input_shape, device=parameter.device, dtype=parameter.dtype)

    def example_inputs(self, batch: int = 1) -> dict[str, Tensor]:
        """A random batch of every tensor that `forward` takes for inference, by the names of its arguments."""
        return {"input": self.example_input(batch)}

    @property
    def max_tokens(self) -> int | None:
        """What it reads are sentences of any length up to this; None: samples of one shape."""
        return None

    def exit_parameters(self, index: int) -> Iterator[nn.Parameter]:
        """Parameters of exit `index`'s classifier alone."""
        return self.exits[index].parameters()

    def reached_parameters(self, index: int) -> Iterator[nn.Parameter]:
        """Parameters that exit `index` runs through: its classifier, and the blocks up to it."""
        for block in self.blocks[: index + 1]:
            yield from block.parameters()
        yield from self.exit_parameters(index)

    def idle_columns(self) -> Iterator[tuple[nn.Parameter, ChannelSlice]]:
        """Columns (dimension 1) of weights that no exit's loss reaches and that weight decay is not to touch either.

        None but where the published code has them as layers of their own, which it leaves alone: VGG without
        referencing.
        """
        yield from ()

    def for_inference(self) -> "MultiExitModel":
        """What `dfs_engine.inference.prepare` does to the copy that it makes, before it comes to the parts.

        Images' features are read whole, since nothing needs a gradient for a part of them; without referencing each
        reader gets zeros in the other's part. Of tokens the sliced form stays, which leaves out what no exit reads.
        """
        fork = self.fork
        if fork.dim == 1 and fork.variant != "dense":
            variant = "dense" if fork.reference else "detach"
            self.fork = Fork(fork.beta, variant, reference=fork.reference, exit_gradient=fork.exit_gradient)
            for module in self.modules():
                if type(module) is PartitionedLinear and module.stop - module.start == module.in_features:
                    to_stock(module)  # the same product; asking which kernel is to compute it costs as much, of one row
        return self

    def get_config(self) -> dict[str, Any]:
        """JSON-able arguments that rebuild this model: `create_model(**model.get_config())`.

        Of a model that `create_model` did not build, "name" is its class, which tells it from others.
        """
        fork = self.fork
        return {
            "name": self.name or path_of(type(self)),
            "num_classes": self.num_classes,
            "beta": fork.beta,
            "variant": fork.variant,
            "reference": fork.reference,
            "exit_gradient": fork.exit_gradient,
            "backend": fork.backend,
            **self.options,
        }


def path_of(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"
