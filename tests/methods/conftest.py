"""A net of three exits, one optimizer step by a method, and each exit's gradient by a backward of its own."""

import contextlib
import copy
import itertools

import pytest
import torch
import torch.nn.functional as F

from dfs_engine.models import MultiExitModel, create_model
from dfs_engine.models.multi_exit import Block
from dfs_engine.nn import Fork
from dfs_engine.training.config import OptimConfig, TrainConfig
from dfs_engine.training.step import OptimizerStep


class ToyBlock(Block):
    def __init__(self, in_features, out_features):
        super().__init__()
        self.linear = torch.nn.Linear(in_features, out_features)

    def make(self, feature):
        return torch.tanh(self.linear(feature))


class Accelerator:
    """As much of accelerate's as a step needs."""

    process_index = 0

    def unwrap_model(self, model):
        return model

    def no_sync(self, module):
        return contextlib.nullcontext()

    def backward(self, loss):
        loss.backward()

    def reduce(self, tensor, reduction):
        return tensor


@pytest.fixture
def toy():
    """(model, inputs, target) in float64; widths 5 -> 6 -> 7 -> 8, 4 classes."""

    def make(variant="dense"):
        widths = (5, 6, 7, 8)
        blocks = [ToyBlock(*pair) for pair in itertools.pairwise(widths)]
        exits = [torch.nn.Linear(width, 4) for width in widths[1:]]
        fork = Fork(0.5, variant)
        model = MultiExitModel(blocks, exits, fork, num_classes=4, input_shape=(5,)).double()
        return model, torch.randn(9, 5, dtype=torch.float64), torch.randint(4, (9,))

    return make


@pytest.fixture
def vgg():
    """The same of a VGG7 of width 4."""

    def make(variant="dense", **options):
        model = create_model("vgg7_64", num_classes=5, width=4, variant=variant, dtype=torch.float64, **options)
        return model, torch.randn(6, 3, 8, 8, dtype=torch.float64), torch.randint(5, (6,))

    return make


@pytest.fixture(params=["toy", "vgg-dense", "vgg-dfs"])
def example(request, toy, vgg):
    return toy() if request.param == "toy" else vgg(request.param.removeprefix("vgg-"))


@pytest.fixture
def update():
    """By how much one step of SGD with learning rate 1 lowers each parameter: {name: tensor}."""

    def step(model, method, inputs, target, **config):
        model = model.train()
        before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        OptimizerStep(TrainConfig(**config), Accelerator(), model, method, optimizer)(inputs, target, 0)
        return {name: before[name] - parameter.detach() for name, parameter in model.named_parameters()}

    return step


@pytest.fixture
def make_step():
    """A step of SGD with these options of `OptimConfig`."""

    def make(model, method, config=None, **optim):
        config = config or TrainConfig(optim=OptimConfig(**optim))
        names = ("lr", "momentum", "weight_decay", "nesterov")
        options = {name: getattr(config.optim, name) for name in names}
        optimizer = torch.optim.SGD(model.train().parameters(), **options)
        return OptimizerStep(config, Accelerator(), model, method, optimizer)

    return make


@pytest.fixture
def rows_of():
    """Each exit's gradient, by a forward and a backward of its own: [{name: tensor}], zeros where it has none."""

    def read(model, inputs, target):
        rows = []
        for index in range(model.num_exits):
            twin = copy.deepcopy(model).train()
            twin.zero_grad()
            logits = twin(**inputs) if isinstance(inputs, dict) else twin(inputs)
            F.cross_entropy(logits[index], target).backward()
            rows.append(
                {
                    name: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                    for name, parameter in twin.named_parameters()
                }
            )
        return rows

    return read


def is_head(name):
    return name.startswith("exits.")


@pytest.fixture
def flattened():
    """The rows as vectors (K, P), of the blocks alone or of everything."""

    def flatten(rows, include_heads=False):
        return torch.stack(
            [torch.cat([g.flatten() for name, g in row.items() if include_heads or not is_head(name)]) for row in rows]
        )

    return flatten


@pytest.fixture
def assert_update_is():
    """That the blocks move by `vector`, and the heads by the sum of the rows, or by `heads`: {name: tensor}."""

    def check(update, vector, rows, include_heads=False, heads=None):
        start = 0
        for name, moved in update.items():
            if include_heads or not is_head(name):
                expected = vector[start : start + moved.numel()].view_as(moved)
                start += moved.numel()
            else:
                expected = sum(row[name] for row in rows) if heads is None else heads[name]
            torch.testing.assert_close(moved, expected, rtol=1e-5, atol=1e-9, msg=lambda text, n=name: f"{n}: {text}")
        assert start == len(vector)

    return check
