"""Attention with dropout against its definition in float64, with the mask that the kernel drew."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dfs_engine.nn import Dropout, attend, convert_dropouts
from dfs_engine.runtime.backend import unavailable_reason
from dfs_engine.validate.tolerances import assert_close

needs_kernel = pytest.mark.skipif(unavailable_reason("cpp") is not None, reason=str(unavailable_reason("cpp")))


def heads(tokens: int, channels: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(3, tokens, 4, channels).to(dtype).transpose(1, 2).requires_grad_()


@needs_kernel
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("queries", [1, 19])
@pytest.mark.parametrize("masked", [True, False])
def test_attention_is_its_definition(queries, masked, dtype):
    inputs = heads(queries, 8, dtype), heads(19, 8, dtype), heads(19, 6, dtype)
    mask = (torch.arange(19) < torch.tensor([19, 7, 1])[:, None])[:, None, None] if masked else None
    seed = int(torch.randint(2**31, ()))
    drop = Dropout(0.3).train()
    torch.manual_seed(seed)
    output = attend(*inputs, drop, mask)
    torch.manual_seed(seed)
    factors = drop(torch.ones(3, 4, queries, 19)).double()
    assert 0 < (factors == 0).sum() < factors.numel()

    query, key, value = (tensor.detach().double().requires_grad_() for tensor in inputs)
    scores = query @ key.transpose(-2, -1) / 8**0.5
    scores = scores if mask is None else scores.masked_fill(~mask, -torch.inf)
    expected = (scores.softmax(-1) * factors) @ value
    grad = torch.randn(output.shape)
    actual_grads = torch.autograd.grad(output, inputs, grad.to(dtype))
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


def test_conversion_keeps_rates_modes_and_what_works_in_place():
    model = nn.Sequential(nn.Dropout(0.1), nn.Sequential(nn.Dropout(0.2).eval()), nn.Dropout(0.3, inplace=True))
    convert_dropouts(model, "aten")
    first, (second,), third = model
    assert type(first) is Dropout
    assert first.p == 0.1
    assert first.training
    assert first.backend == "aten"
    assert type(second) is Dropout
    assert second.p == 0.2
    assert not second.training
    assert type(third) is nn.Dropout
