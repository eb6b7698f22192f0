"""Every form of attention against its definition in float64, with the mask that the dropout kernel drew."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dfs_engine.nn import Dropout, attend
from dfs_engine.runtime import choice
from dfs_engine.runtime.backend import unavailable_reason
from dfs_engine.validate.tolerances import assert_close

needs_kernel = pytest.mark.skipif(unavailable_reason("cpp") is not None, reason=str(unavailable_reason("cpp")))


def heads(tokens: int, channels: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(3, tokens, 4, channels).to(dtype).transpose(1, 2).requires_grad_()


@needs_kernel
@pytest.mark.parametrize("p", [0.3, 0.0])
@pytest.mark.parametrize(
    ("dtype", "emulated"), [(torch.float32, False), (torch.bfloat16, False), (torch.bfloat16, True)], ids=str
)
@pytest.mark.parametrize("queries", [1, 19])
@pytest.mark.parametrize("masked", [True, False])
def test_attention_is_its_definition(queries, masked, dtype, emulated, p, monkeypatch):
    monkeypatch.setattr(choice, "_bfloat16_is_emulated", emulated)
    inputs = heads(queries, 8, dtype), heads(19, 8, dtype), heads(19, 6, dtype)
    mask = (torch.arange(19) < torch.tensor([19, 7, 1])[:, None])[:, None, None] if masked else None
    seed = int(torch.randint(2**31, ()))
    drop = Dropout(p).train()
    torch.manual_seed(seed)
    with torch.autocast("cpu", enabled=dtype == torch.bfloat16):
        output = attend(*inputs, drop, mask)
    assert output.dtype == dtype
    torch.manual_seed(seed)
    factors = drop(torch.ones(3, 4, queries, 19)).double()
    assert 0 < (factors == 0).sum() < factors.numel() or p == 0

    query, key, value = (tensor.detach().double().requires_grad_() for tensor in inputs)
    scores = query @ key.transpose(-2, -1) / 8**0.5
    scores = scores if mask is None else scores.masked_fill(~mask, -torch.inf)
    expected = (scores.softmax(-1) * factors) @ value
    grad = torch.randn(output.shape)
    actual_grads = torch.autograd.grad(output, inputs, grad.to(dtype), retain_graph=True)
    again = torch.autograd.grad(output, inputs, grad.to(dtype))
    assert all(torch.equal(one, other) for one, other in zip(actual_grads, again, strict=True))
    expected_grads = torch.autograd.grad(expected, (query, key, value), grad.to(dtype).double())
    assert_close("output", output, expected)
    for name, *pair in zip(("query", "key", "value"), actual_grads, expected_grads, strict=True):
        assert_close(f"grad_{name}", *pair)


@needs_kernel
def test_a_row_that_may_read_nothing_is_zero_as_in_stock_attention():
    inputs = [heads(5, 8, torch.float32) for _ in range(3)]
    mask = torch.tensor([True, False, True])[:, None, None, None].expand(3, 1, 1, 5)
    output = attend(*inputs, Dropout(0.5).train(), mask)
    assert not output[1].any()
    assert output[0].any()
    assert not F.scaled_dot_product_attention(*inputs, mask)[1].any()
    for grad in torch.autograd.grad(output.sum(), inputs):
        assert grad.isfinite().all()
        assert not grad[1].any()


@pytest.mark.parametrize("drop", [Dropout(0.5).eval(), Dropout(0.0), nn.Dropout(0.5), nn.Identity()], ids=str)
def test_otherwise_it_is_stock_attention(drop):
    inputs, seed = [heads(5, 8, torch.float32) for _ in range(3)], 3
    p = 0.5 if type(drop) is nn.Dropout else 0.0
    torch.manual_seed(seed)
    output = attend(*inputs, drop)
    torch.manual_seed(seed)
    assert torch.equal(output, F.scaled_dot_product_attention(*inputs, dropout_p=p))


@needs_kernel
@pytest.mark.parametrize(
    ("tokens", "training", "emulated", "expected"),
    [
        (512, True, False, "plain"),
        (513, True, False, "fused"),
        (512, False, False, "fused"),
        (512, True, True, "float"),
        (513, False, True, "float"),
    ],
)
def test_the_form_in_bf16_depends_on_length_and_machine(tokens, training, emulated, expected, monkeypatch):
    monkeypatch.setattr(choice, "_bfloat16_is_emulated", emulated)
    inputs = [torch.empty(1, 2, tokens, 4, dtype=torch.bfloat16, requires_grad=training) for _ in range(3)]
    assert choice.attention(*inputs) == expected
    assert choice.attention(*(tensor.float() for tensor in inputs)) == "fused"
    with torch.no_grad():
        assert choice.attention(*inputs) == ("float" if emulated else "fused")


def test_whoever_asks_for_plain_products_gets_them(monkeypatch):
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *args: pytest.fail("was fused"))
    inputs = [heads(5, 8, torch.float32) for _ in range(3)]
    output = attend(*inputs, nn.Dropout(0.0), plain=True)
    (first,) = torch.autograd.grad(output.square().sum(), inputs[:1], create_graph=True)
    assert torch.autograd.grad(first.sum(), inputs[0])[0].any(), "the second derivative"
