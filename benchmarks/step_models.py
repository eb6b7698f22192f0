"""The training steps that are timed on a GPU, and tuned for: the families at real sizes, and their layers' shapes."""

import importlib.util
from dataclasses import dataclass, field, replace
from typing import Any

from torch.overrides import TorchFunctionMode

from dfs_engine.benchmarks.shapes import BlockShape, ConvShape, LinearShape, Shape
from dfs_engine.models import MultiExitModel, create_model

# Layers that read fewer channels read the image: they need no grad_input, and no kernel is chosen for them.
_LEAST_CHANNELS = 16
# FLOPs that a GPU does in the time in which it moves one number.
_FLOPS_PER_ELEMENT = 300
# Layers that take a smaller part of what the longest one takes are left out: nothing of a step hangs on them.
_LEAST_PART = 0.02


@dataclass(frozen=True, slots=True)
class StepModel:
    """A model as it is trained.

    Attributes:
        name: as of `create_model`, with its `options`.
        batch: images, or texts of 128 tokens, of a step.
        package: what it needs beside torch; "": nothing.
        image_size: height and width of the images; None: what the model was made for.
    """

    name: str
    batch: int = 256
    num_classes: int = 1000
    options: dict[str, Any] = field(default_factory=dict)
    package: str = ""
    image_size: int | None = None

    def missing(self) -> str | None:
        """Why it cannot be built here, or None."""
        is_there = not self.package or importlib.util.find_spec(self.package) is not None
        return None if is_there else f"the package {self.package} is not installed"

    def shapes(self) -> list[Shape]:
        """Of the layers that a kernel can be chosen for, each once; those that take longest first."""
        model = create_model(self.name, num_classes=self.num_classes, backend="aten", device="meta", **self.options)
        return recorded_shapes(self.name, model, self.batch, self.image_size)


# Most wanted first.
STEP_MODELS = {
    model.name: model
    for model in (
        StepModel("vgg16_64"),
        StepModel("resnet50", options={"stem": "imagenet"}),
        StepModel("vit_base_patch16_224", package="timm"),
        StepModel("msdnet_imagenet"),
        StepModel("bert", batch=64, num_classes=2, package="transformers"),
    )
}


def scale_batches(factor: float) -> None:
    """Of all steps from now on: for a GPU that is smaller than they were made for."""
    for name, model in STEP_MODELS.items():
        STEP_MODELS[name] = replace(model, batch=max(1, round(factor * model.batch)))


def recorded_shapes(family: str, model: MultiExitModel, batch: int, image_size: int | None = None) -> list[Shape]:
    """The shapes that a `dfs` model on the meta device, where nothing is computed, calls its layers with."""
    input = model.example_input(batch)
    if image_size is not None:
        input = input.new_empty((*input.shape[:2], image_size, image_size))
    with _Recorder(family) as recorder:
        model.train()(input)
    shapes = sorted(dict.fromkeys(recorder.shapes), key=_cost, reverse=True)
    return [shape for shape in shapes if _cost(shape) >= _LEAST_PART * _cost(shapes[0])]


def _cost(shape: Shape) -> float:
    """About in what proportion of time: whichever is the more, arithmetic or memory."""
    return max(shape.flops / _FLOPS_PER_ELEMENT, shape.elements)


class _Recorder(TorchFunctionMode):
    """Notes convolutions, linear layers and normalisations of images, in the order in which they are called."""

    def __init__(self, family: str) -> None:
        super().__init__()
        self.family = family
        self.shapes: list[Shape] = []

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        note = getattr(self, f"_note_{getattr(function, '__name__', '')}", None)
        if note is not None:
            note(*args)
        return function(*args, **(kwargs or {}))

    def _note_conv2d(self, input: Any, weight: Any, bias: Any, stride: Any, *_: Any) -> None:
        batch, channels, size, width = input.shape
        out_channels, fan_in, kernel, _ = weight.shape
        if channels >= _LEAST_CHANNELS:
            assert size == width  # the shapes that are measured are square
            groups = channels // fan_in
            self.shapes.append(ConvShape(self.family, batch, channels, out_channels, size, kernel, stride[0], groups))

    def _note_linear(self, input: Any, weight: Any, *_: Any) -> None:
        tokens = input.shape[1:-1].numel()
        out_features, in_features = weight.shape
        self.shapes.append(LinearShape(self.family, input.size(0), tokens, in_features, out_features))

    def _note_batch_norm(self, input: Any, *_: Any) -> None:
        if input.dim() == 4:
            self.shapes.append(self._block(input, pool=False))

    def _note_max_pool2d(self, input: Any, kernel: Any, *_: Any) -> None:
        if kernel == 2 and self.shapes[-1:] == [self._block(input, pool=False)]:  # it ends the same block
            self.shapes[-1] = self._block(input, pool=True)

    def _block(self, input: Any, pool: bool) -> BlockShape:
        batch, channels, size, _ = input.shape
        return BlockShape(self.family, batch, channels, size, pool)
