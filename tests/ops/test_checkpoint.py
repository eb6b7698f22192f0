"""Every op and a model of each family under activation checkpointing, with gradients as without."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from dfs_engine import ops
from dfs_engine.models import create_model
from dfs_engine.nn import Dropout, Fork, add, concat, global_avg_pool, multiply
from dfs_engine.partition import partition

SLICE = {"start": 1, "stop": 4}
IMAGE = (2, 6, 5, 4)
ROUTE = {"num_shared": 4, "exit_start": 2}


def produce(z: Tensor, weight: Tensor, bias: Tensor, backend: str, **options) -> list[Tensor]:
    produced = ops.norm_act(z, weight, bias, None, None, **ROUTE, **options, backend=backend)
    return [produced.shared, produced.exit]


def read(function: Callable) -> Callable:
    """What the deeper path makes of a feature and of a branch beside it."""
    return lambda feature, branch, backend: function(Fork(backend=backend)(feature)[0], branch)


# name -> the differentiable arguments' shapes, and the call
CALLS: dict[str, tuple[list[tuple[int, ...]], Callable]] = {
    "conv2d": (
        [IMAGE, (3, 6, 3, 3), (3,)],
        lambda *args, backend: ops.partitioned_conv2d(*args, **SLICE, backend=backend),
    ),
    "linear": ([(4, 6), (5, 6), (5,)], lambda *args, backend: ops.partitioned_linear(*args, **SLICE, backend=backend)),
    "norm_linear": (
        [(4, 6), (6,), (6,), (5, 6), (5,)],
        lambda *args, backend: ops.partitioned_norm_linear(*args, **SLICE, backend=backend),
    ),
    "norm_act": ([IMAGE, (6,), (6,)], produce),
    "norm_act, pool": ([IMAGE, (6,), (6,)], lambda *args, backend: produce(*args, backend, pool=True)),
    "norm_act, residual": (
        [IMAGE, (6,), (6,), IMAGE],
        lambda z, weight, bias, residual, backend: produce(
            z, weight, bias, backend, residual=residual, relu_first=False
        ),
    ),
    "norm_act, one reader": ([IMAGE, (6,), (6,)], lambda *args, backend: produce(*args, backend)[:1]),
    "norm_relu": ([IMAGE, (6,), (6,)], lambda *args, backend: ops.norm_relu(*args, None, None, backend=backend)),
    "dropout": ([IMAGE], lambda input, backend: Dropout(0.5, backend=backend)(input)),
    "partition": ([IMAGE], lambda input, backend: list(partition(input, 0.4)[1:])),
    "live mean": ([IMAGE], lambda input, backend: global_avg_pool(Fork(backend=backend)(input)[0])[0]),
    "add": ([IMAGE, IMAGE], read(lambda reading, branch: add(reading, branch))),
    "multiply": ([IMAGE, IMAGE], read(lambda reading, branch: multiply(reading, branch))),
    "concat": ([IMAGE, IMAGE], read(lambda reading, branch: concat(reading, (branch,))[0])),
}  # fmt: skip


def gradients(call: Callable, leaves: list[Tensor], seed: int = 0) -> list[Tensor]:
    torch.manual_seed(seed)  # of what dropout draws
    made = call(*leaves)
    live = [made] if isinstance(made, Tensor) else made
    loss = sum((output * torch.linspace(-1, 2, output.numel()).view_as(output)).sum() for output in live)
    return list(torch.autograd.grad(loss, leaves, materialize_grads=True))


@pytest.mark.parametrize("name", CALLS)
def test_an_op(name, backend):
    shapes, call = CALLS[name]
    leaves = [torch.randn(shape, requires_grad=True) for shape in shapes]
    expected = gradients(lambda *args: call(*args, backend=backend), leaves)

    def checkpointed(*args: Tensor):
        return checkpoint(lambda *inner: call(*inner, backend=backend), *args, use_reentrant=False)

    for found, wanted in zip(gradients(checkpointed, leaves), expected, strict=True):
        assert torch.equal(found, wanted)


@pytest.mark.parametrize("name", [name for name in CALLS if "linear" in name or name == "conv2d"])
def test_an_op_that_is_differentiated_twice(name, backend):
    shapes, call = CALLS[name]
    leaves = [torch.randn(shape, requires_grad=True) for shape in shapes]

    def second(wrap: Callable) -> list[Tensor]:
        output = wrap(lambda *args: call(*args, backend=backend), *leaves)
        first = torch.autograd.grad(output.square().sum(), leaves, create_graph=True)
        return list(torch.autograd.grad(sum(grad.square().sum() for grad in first), leaves))

    expected = second(lambda function, *args: function(*args))
    found = second(lambda function, *args: checkpoint(function, *args, use_reentrant=False))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)


MODELS = {
    "vgg7_64": {"width": 4},
    "resnet18": {"width": 4},
    "msdnet_cifar_lin_grow": {"num_exits": 3},
    "vit_tiny_patch16_224": {
        "img_size": 16, "patch_size": 8, "depth": 4, "embed_dim": 18, "num_heads": 3, "start_block": 1,
    },
}  # fmt: skip


def step(model: torch.nn.Module, call: Callable) -> list[Tensor]:
    """Gradients of all parameters after a step through `call`."""
    model.zero_grad()
    torch.manual_seed(0)
    sum(logits.square().sum() for logits in call()).backward()
    return [parameter.grad for parameter in model.parameters()]


@pytest.mark.parametrize("use_reentrant", [True, False], ids=["reentrant", "non-reentrant"])
@pytest.mark.parametrize("name", MODELS)
def test_a_model(name, use_reentrant, backend):
    if name.startswith("vit"):
        pytest.importorskip("timm")
    model = create_model(name, num_classes=3, backend=backend, **MODELS[name]).train()
    # Of a leaf that needs a gradient, because re-entry asks for one.
    input = torch.randn(4, 3, model.input_shape[-1], model.input_shape[-1], requires_grad=True)

    def checkpointed():
        return checkpoint(lambda input: tuple(model(input)), input, use_reentrant=use_reentrant)

    for found, wanted in zip(step(model, checkpointed), step(model, lambda: model(input)), strict=True):
        assert torch.equal(found, wanted)


def test_a_bert(backend):
    pytest.importorskip("transformers")
    config = {"vocab_size": 30, "hidden_size": 15, "num_hidden_layers": 3, "num_attention_heads": 3}
    config |= {"intermediate_size": 22, "max_position_embeddings": 11}
    model = create_model("bert", num_classes=3, backend=backend, config=config).train()
    tokens = torch.randint(30, (3, 7))

    def run(tokens: Tensor) -> tuple[Tensor, ...]:
        return tuple(model(input_ids=tokens))

    found = step(model, lambda: checkpoint(run, tokens, use_reentrant=False))
    for one, other in zip(found, step(model, lambda: run(tokens)), strict=True):
        assert torch.equal(one, other)
