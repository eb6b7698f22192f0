"""The ops inside what PyTorch users put them in: compile, autocast, checkpointing, DDP, functional_call."""

import copy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

from dfs_engine import create_model, ops, partition, reference
from dfs_engine.models import VARIANTS
from dfs_engine.nn import PartitionedConv2d, PartitionedLinear
from dfs_engine.runtime import backend as backends
from dfs_engine.validate.tolerances import TOLERANCES, Tolerance, assert_close


class Net(nn.Module):
    """Both layers, both ops' internal form, a partition, a concatenated gradient."""

    def __init__(self, backend: str | None, referencing: bool = True, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        options = {"backend": backend, "reference": referencing, "dtype": dtype}
        self.backend, self.referencing = backend, referencing
        self.conv = PartitionedConv2d(3, 6, 3, padding=1, start=1, stop=3, **options)
        self.inner = nn.Conv2d(6, 4, 3, dtype=dtype)
        self.linear = PartitionedLinear(10, 5, start=2, stop=9, **options)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        full, shared, exit = partition(self.conv(input).relu(), 0.5)
        options = {"full": full, "reference": self.referencing, "backend": self.backend}
        inner = ops.partitioned_conv2d(shared, self.inner.weight, self.inner.bias, start=0, stop=3, **options)
        tokens = torch.cat([inner.mean((2, 3)), full.mean((2, 3)), exit.mean((2, 3))], 1)[:, :10]
        return self.linear(tokens)


def gradients(function, module: nn.Module, input: torch.Tensor) -> dict[str, torch.Tensor]:
    """Output and gradients of the input and of every parameter."""
    module.zero_grad()
    input = input.detach().clone().requires_grad_()
    output = function(input)
    output.float().square().sum().backward()
    named = {name: parameter.grad.clone() for name, parameter in module.named_parameters()}
    return {"output": output.detach(), "grad_input": input.grad, **named}


def assert_same(actual: dict, expected: dict, tolerance: Tolerance | None = None) -> None:
    assert list(actual) == list(expected)
    for name, value in actual.items():
        assert_close(name, value, expected[name], tolerance)


# Gradients that pass through float32 (the loss of `gradients`), in a float64 net.
THROUGH_FP32 = TOLERANCES[torch.float32]
IMAGES = (2, 3, 7, 6)
REFERENCE = pytest.mark.parametrize("referencing", [True, False], ids=["reference", "no-reference"])


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()


@REFERENCE
def test_compile_of_ops_and_layers(referencing, backend, exact_dtype):
    net, input = Net(backend, referencing, exact_dtype), torch.randn(IMAGES, dtype=exact_dtype)
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    assert_same(gradients(compiled, net, input), gradients(net, net, input), THROUGH_FP32)


DEEPER = [pytest.param(*case, marks=pytest.mark.slow) for case in (("vgg16_64", "dfs"), ("resnet18", "dfs"))]


@pytest.mark.parametrize(("name", "variant"), [*(("vgg7_64", variant) for variant in VARIANTS), *DEEPER])
def test_compile_of_models(name, variant):
    # float64, so that nothing but the compiler is between the two.
    model = create_model(name, width=2, num_classes=3, variant=variant, dtype=torch.float64)
    input = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    compiled = torch.compile(lambda images: torch.cat(model(images), 1), fullgraph=True, backend="aot_eager")
    eager = gradients(lambda images: torch.cat(model(images), 1), model, input)
    assert_same(gradients(compiled, model, input), eager, THROUGH_FP32)


@pytest.mark.slow
def test_compile_with_inductor(backend, exact_dtype):
    net, input = Net(backend, dtype=exact_dtype), torch.randn(IMAGES, dtype=exact_dtype)
    compiled = torch.compile(net, fullgraph=True)
    assert_same(gradients(compiled, net, input), gradients(net, net, input), THROUGH_FP32)


CALLS = {
    "partitioned_conv2d": ((2, 6, 5, 5), (4, 6, 3, 3)),
    "partitioned_linear": ((3, 2, 6), (4, 6)),
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("inside", [True, False], ids=["backward-inside", "backward-outside"])
@pytest.mark.parametrize("op", CALLS)
@REFERENCE
def test_autocast(op, dtype, inside, referencing, backend):
    tensors = [torch.randn(shape, requires_grad=True) for shape in (*CALLS[op], (4,))]
    options = {"start": 1, "stop": 4, "reference": referencing}
    with torch.autocast("cpu", dtype=dtype):
        output = getattr(ops, op)(*tensors, **options, backend=backend)
        grad_output = torch.randn_like(output)
        if inside:
            output.backward(grad_output)
    if not inside:
        output.backward(grad_output)
    assert backends.last_used(op).partition(":")[0] == backend
    assert output.dtype is dtype
    rounded = [tensor.detach().to(dtype).double().requires_grad_() for tensor in tensors]
    expected = getattr(reference, op)(*rounded, **options)
    grads = torch.autograd.grad(expected, rounded, grad_output.double())
    assert_close("output", output, expected)
    for name, tensor, grad in zip(("input", "weight", "bias"), tensors, grads, strict=True):
        assert tensor.grad.dtype is torch.float32
        assert_close(f"grad_{name}", tensor.grad, grad, TOLERANCES[dtype])


def test_autocast_leaves_float64_alone():
    net, input = Net(None), torch.randn(IMAGES, dtype=torch.float64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert (
            ops.partitioned_linear(torch.randn(2, 4).double(), torch.randn(3, 4).double(), start=0, stop=2).dtype
            is torch.float64
        )
        assert net.conv(input).dtype is torch.float64


def test_autocast_of_a_model_trains_in_bf16_with_fp32_gradients(backend):
    model = create_model("vgg7_64", width=4, num_classes=3, backend=backend)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(torch.randn(4, 3, 16, 16))
        loss = torch.stack([F.cross_entropy(value, torch.tensor([0, 1, 2, 0])) for value in logits]).sum()
    loss.backward()
    assert all(value.dtype is torch.bfloat16 for value in logits)
    assert all(p.grad.dtype is torch.float32 and p.grad.isfinite().all() for p in model.parameters())


def test_grad_scaler(backend):
    """A scaled fp16 step moves the weights as an unscaled one in float32 does; an overflow skips the step."""
    layers = [PartitionedLinear(6, 4, start=0, stop=3, backend=backend) for _ in range(2)]
    layers[1].load_state_dict(layers[0].state_dict())
    input = torch.randn(5, 6)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    optimizers = [torch.optim.SGD(layer.parameters(), lr=0.1) for layer in layers]
    with torch.autocast("cpu", dtype=torch.float16):
        loss = layers[0](input).float().square().mean()
    scaler.scale(loss).backward()
    scaler.step(optimizers[0])
    scaler.update()
    layers[1](input).square().mean().backward()
    optimizers[1].step()
    for name, parameter in layers[0].named_parameters():
        assert_close(name, parameter, dict(layers[1].named_parameters())[name].double(), TOLERANCES[torch.float16])
    before = copy.deepcopy(layers[0].state_dict())
    optimizers[0].zero_grad()
    scaler.scale(layers[0](input).sum() * float("inf")).backward()
    scaler.step(optimizers[0])
    scaler.update()
    assert all(torch.equal(value, before[name]) for name, value in layers[0].state_dict().items())
    assert scaler.get_scale() == 2.0**9


@pytest.mark.parametrize("use_reentrant", [True, False], ids=["reentrant", "non-reentrant"])
@REFERENCE
def test_gradient_checkpointing(use_reentrant, referencing, backend, exact_dtype):
    net, input = Net(backend, referencing, exact_dtype), torch.randn(IMAGES, dtype=exact_dtype)
    recomputed = gradients(lambda images: checkpoint(net, images, use_reentrant=use_reentrant), net, input)
    plain = gradients(net, net, input)
    assert all(torch.equal(value, plain[name]) for name, value in recomputed.items())


def test_functional_call(backend, exact_dtype):
    net, other = Net(backend, dtype=exact_dtype), Net(backend, dtype=exact_dtype)
    input = torch.randn(IMAGES, dtype=exact_dtype)
    parameters = dict(other.named_parameters())
    actual = gradients(lambda images: torch.func.functional_call(net, parameters, (images,)), other, input)
    expected = gradients(other, other, input)
    assert all(torch.equal(value, expected[name]) for name, value in actual.items())
    assert all(parameter.grad is None for parameter in net.parameters())


def test_weight_shared_by_two_calls_gets_both_gradients(backend, exact_dtype):
    weight = torch.randn(4, 6, dtype=exact_dtype, requires_grad=True)
    inputs = torch.randn(2, 3, 6, dtype=exact_dtype)
    calls = [(inputs[0], {"start": 0, "stop": 2}), (inputs[1], {"start": 2, "stop": 6, "reference": False})]
    sum(ops.partitioned_linear(x, weight, backend=backend, **o).square().sum() for x, o in calls).backward()
    loss = sum(reference.partitioned_linear(x, weight, **o).square().sum() for x, o in calls)
    assert_close("grad_weight", weight.grad, torch.autograd.grad(loss, weight)[0])


@pytest.mark.parametrize("op", CALLS)
def test_strided_gradient_from_cat(op, backend, exact_dtype):
    """The gradient of `cat` is a strided view; a contiguous one hides a kernel that ignores strides."""
    shapes = CALLS[op]
    input, weight = (torch.randn(shape, dtype=exact_dtype, requires_grad=True) for shape in shapes)
    factor = None
    grads = []
    for function, options in ((getattr(ops, op), {"backend": backend}), (getattr(reference, op), {})):
        outputs = [function(input, weight, start=lo, stop=hi, **options) for lo, hi in ((0, 3), (3, 6))]
        joined = torch.cat(outputs, 1)
        factor = torch.randn_like(joined) if factor is None else factor
        grads.append(torch.autograd.grad((joined * factor).sum(), [input, weight]))
    for name, actual, expected in zip(("input", "weight"), *grads, strict=True):
        assert_close(name, actual, expected)


def test_distributed_data_parallel(tmp_path):
    script = Path(__file__).with_name("distributed_parity.py")
    command = [sys.executable, str(script)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    ranks = [subprocess.Popen([*command, str(rank), str(tmp_path / "store")], **pipes) for rank in range(2)]
    try:
        said = [rank.communicate(timeout=120)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [0, 0], "\n".join(said)


@pytest.mark.parametrize(("family", "num_compiled"), [("vgg7_64", 3), ("bert", 2)])
def test_batches_of_many_sizes_compile_a_few_times(family, num_compiled):
    """One size, any size, and for images once more because torch guards on the strides of batches up to 15.

    The choice of a kernel, which depends on the batch, is made when an op runs: it adds no guards.
    """
    if family == "bert":
        pytest.importorskip("transformers")
        sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
        model = create_model("bert", num_classes=2, config={"vocab_size": 50, "max_position_embeddings": 8, **sizes})
        batches = [{"input_ids": torch.randint(0, 50, (size, 8))} for size in range(2, 22)]
    else:
        model = create_model(family, width=16)
        batches = [{"input": torch.randn(size, 3, 16, 16)} for size in range(2, 22)]
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter)
    for batch in batches:
        output = compiled(**batch)
        sum(exit.sum() for exit in output).backward()
    assert counter.frame_count <= num_compiled
