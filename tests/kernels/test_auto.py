"""What `auto` asks the tuned table on CUDA is what the kernels are then launched for, and tuning writes under."""

import contextlib

import pytest
import torch
from torch import Tensor

from dfs_engine import ops
from dfs_engine.kernels import config
from dfs_engine.runtime import backend as backends
from dfs_engine.runtime import choice
from dfs_engine.validate.tolerances import assert_close


def leaf(*size: int) -> Tensor:
    return torch.randn(size).requires_grad_()


def last(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous(memory_format=torch.channels_last).requires_grad_()


# op -> its leaves
CALLS = {
    "partitioned_linear": lambda: [leaf(9, 5, 40), leaf(23, 40)],
    "partitioned_norm_linear": lambda: [leaf(9, 40), leaf(40), leaf(40), leaf(23, 40)],
    "partitioned_conv2d": lambda: [last(leaf(2, 20, 9, 7)), leaf(6, 20, 3, 1)],
}


def call(op: str, leaves: list[Tensor], **options) -> Tensor:
    geometry = {"stride": (2, 1), "padding": (1, 0)} if op == "partitioned_conv2d" else {}
    return getattr(ops, op)(*leaves, start=3, stop=19, **geometry, **options)


@contextlib.contextmanager
def table(monkeypatch, answer: bool = True):
    """`auto` on this device is as on CUDA, and its table says `answer`; gives what it was asked."""
    asked: set[tuple] = set()

    def prefers(*question, device: torch.device) -> bool:
        assert isinstance(device, torch.device)
        asked.add(question)
        return answer

    with monkeypatch.context() as patch:
        patch.setattr(choice, "prefers_triton", prefers)
        patch.setattr(backends, "_automatic", lambda _, wins: "triton" if wins("triton") else "aten")
        yield asked


@pytest.mark.parametrize("op", CALLS)
@pytest.mark.parametrize("referencing", [True, False], ids=["reference", "no-reference"])
def test_it_asks_about_what_is_launched(op, referencing, device, monkeypatch):
    launched: set[tuple] = set()
    candidates = config.candidates

    def record(*question) -> tuple:
        launched.add(question)
        return candidates(*question)

    monkeypatch.setattr(config, "candidates", record)
    make = CALLS[op]
    with torch.device(device), table(monkeypatch) as asked:
        call(op, make(), reference=referencing).sum().backward()
    assert backends.last_used(op) == "triton"
    assert asked == launched


@pytest.mark.parametrize("op", CALLS)
def test_a_slower_kernel_is_not_taken(op, monkeypatch):
    make = CALLS[op]
    with table(monkeypatch, answer=False) as asked:
        call(op, make())
    assert asked
    assert backends.last_used(op) == "aten"


@pytest.mark.parametrize("op", CALLS)
@pytest.mark.parametrize("wins", [True, False])
def test_it_asks_while_torch_compile_traces(op, wins, monkeypatch):
    """On the CPU, whose kernels stand in for Triton's."""
    if config.INTERPRETED:
        pytest.skip("torch.compile does not trace kernels that the interpreter runs")
    make = CALLS[op]
    leaves = make()
    with table(monkeypatch) as asked:
        expected = call(op, leaves)
    entry = {"config": [16, 16, 16, 4, 1, 1], "triton_us": 1.0, "aten_us": 2.0 if wins else 0.5}
    monkeypatch.setattr(config, "_tables", {"GPU": {config.table_key(*question): entry for question in asked}})
    monkeypatch.setattr(config, "gpu_name", torch.compiler.assume_constant_result(lambda device: "GPU"))
    monkeypatch.setattr(backends, "_automatic", lambda _, wins: "triton" if wins("triton") else "aten")
    torch._dynamo.reset()
    compiled = torch.compile(lambda *leaves: call(op, leaves), fullgraph=True, backend="aot_eager")
    found = compiled(*leaves)
    grad_output = torch.randn_like(expected)
    assert_close("output", found, expected)
    for one, other in zip(*(torch.autograd.grad(out, leaves, grad_output) for out in (found, expected)), strict=True):
        assert_close("gradient", one, other)


def convolve(input: Tensor, groups: int = 1) -> None:
    ops.partitioned_conv2d(input, leaf(4, 4 // groups, 3, 3), groups=groups, start=0, stop=2)


def produce(z: Tensor, **options) -> None:
    ops.norm_act(z, leaf(4), leaf(4), None, None, num_shared=2, exit_start=2, **options)


def test_the_table_knows_channels_last_and_one_group_alone(monkeypatch):
    image = leaf(2, 4, 6, 6)
    # For `aten` whatever it answers; what it is not asked, it does not decide.
    for run, is_asked in (
        (lambda: convolve(last(image)), True),
        (lambda: convolve(image), False),
        (lambda: convolve(last(image), groups=2), False),
        (lambda: produce(last(image)), True),
        (lambda: produce(image), False),
        (lambda: produce(last(image), residual=last(image), relu_first=False), False),
    ):
        with table(monkeypatch, answer=False) as asked:
            run()
        assert bool(asked) is is_asked


@pytest.mark.parametrize("pool", [False, True])
def test_a_producer_asks_for_its_own_class(pool, monkeypatch):
    with table(monkeypatch, answer=False) as asked:
        produce(last(leaf(2, 4, 6, 5)), pool=pool)
    assert asked == {("norm_act_pool" if pool else "norm_act", 60, 4, 1, torch.float32)}
