"""Dropout: the mask against a plain Philox4x32-10 and its statistics, the values and gradients against the mask."""

import pytest
import torch
import torch.nn.functional as F

from dfs_engine.ops import dropout
from dfs_engine.runtime.backend import unavailable_reason

needs_kernel = pytest.mark.skipif(unavailable_reason("cpp") is not None, reason=str(unavailable_reason("cpp")))

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
WORD = 0xFFFFFFFF


def philox(seed: int, counter: int) -> list[int]:
    """Four random words of 32 bits (Salmon et al., 2011), from the paper's definition."""
    words, key = [counter & WORD, counter >> 32, 0, 0], [seed & WORD, seed >> 32]
    for _ in range(10):
        first, second = 0xD2511F53 * words[0], 0xCD9E8D57 * words[2]
        words = [(second >> 32) ^ words[1] ^ key[0], second & WORD, (first >> 32) ^ words[3] ^ key[1], first & WORD]
        key = [(key[0] + 0x9E3779B9) & WORD, (key[1] + 0xBB67AE85) & WORD]
    return words


def kept(seed: int, p: float, count: int) -> torch.Tensor:
    words = {}
    for place in range(count):
        group, within = divmod(place, 64)
        words[place] = philox(seed, 16 * group + within % 16)[within // 16]
    return torch.tensor([words[place] >= round(p * 2**32) for place in range(count)])


def test_philox_is_the_published_one():
    """Known answers of Random123's own tests."""
    assert philox(0, 0) == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]


@needs_kernel
@DTYPES
@pytest.mark.parametrize("shape", [(1,), (16,), (63,), (3, 5, 71), (2, 0, 3), ()], ids=str)
def test_mask_and_values(shape, dtype):
    seed, p = int(torch.randint(2**62, ())), 0.3
    input = torch.rand(shape).add(0.5).to(dtype)
    output = torch.ops.dfs_engine.dropout(input, torch.tensor(seed), p)
    mask = kept(seed, p, input.numel()).reshape(shape)
    assert output.dtype == dtype
    torch.testing.assert_close(
        output.double(), mask * input.double() / (1 - p), rtol=4e-3 if dtype.itemsize == 2 else 1e-6, atol=0
    )


@needs_kernel
def test_places_beyond_four_billion_counters_differ():
    """The counter has 64 bits; a task in the middle starts at its own."""
    seed = torch.tensor(5)
    output = torch.ops.dfs_engine.dropout(torch.ones(1 << 17), seed, 0.5)
    start = (1 << 16) + 64
    assert torch.equal(
        output[start : start + 64] != 0,
        torch.tensor([philox(5, start // 4 + place % 16)[place // 16] >= 2**31 for place in range(64)]),
    )


@DTYPES
@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_rate_and_mean(p, dtype):
    count = 1 << 20
    output = dropout(torch.ones(count, dtype=dtype), p)
    rate = (output == 0).double().mean().item()
    assert abs(rate - p) < 6 * (p * (1 - p) / count) ** 0.5
    assert abs(output.double().mean().item() - 1) < 6 * (p / (1 - p) / count) ** 0.5 + 4e-3 * (dtype is torch.bfloat16)


@needs_kernel
@DTYPES
def test_gradient_has_the_same_mask(dtype):
    input = torch.rand(7, 301).add(0.5).to(dtype).requires_grad_()
    output = dropout(input, 0.4)
    grad = torch.rand(301, 7, dtype=dtype).t()
    (actual,) = torch.autograd.grad(output, input, grad)
    expected = grad.double() * (output.detach() != 0) / 0.6
    assert actual.dtype == dtype
    torch.testing.assert_close(actual.double(), expected, rtol=4e-3 if dtype.itemsize == 2 else 1e-6, atol=0)


@needs_kernel
def test_gradients_can_be_differentiated_again():
    input = torch.rand(100).add(0.5).requires_grad_()
    output = dropout(input, 0.4)
    (grad,) = torch.autograd.grad(output.square().sum(), input, create_graph=True)
    (second,) = torch.autograd.grad(grad.sum(), input)
    torch.testing.assert_close(second, 2 * (output.detach() != 0) / 0.36)


@needs_kernel
def test_manual_seed_repeats_for_every_number_of_threads_and_for_strides():
    input, threads = torch.rand(3, 257, 129), torch.get_num_threads()
    outputs = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        torch.manual_seed(3)
        outputs.append(dropout(input, 0.2))
    torch.set_num_threads(threads)
    torch.manual_seed(3)
    outputs.append(dropout(input.transpose(0, 2).contiguous().transpose(0, 2), 0.2))
    for output in outputs[1:]:
        assert torch.equal(output, outputs[0])
    assert not torch.equal(dropout(input, 0.2), outputs[0])


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("p", [0.0, 1.0])
def test_ends_are_atens(p, training):
    input = torch.rand(65)
    assert torch.equal(dropout(input, p, training), F.dropout(input, p, training))
    assert torch.equal(dropout(input, 0.5, False), input)


@pytest.mark.parametrize(("dtype", "backend"), [(torch.float64, None), (torch.float16, None), (torch.float32, "aten")])
def test_elsewhere_it_is_atens(dtype, backend):
    input = torch.rand(65, dtype=dtype)
    torch.manual_seed(1)
    output = dropout(input, 0.5, backend=backend)
    torch.manual_seed(1)
    assert torch.equal(output, F.dropout(input, 0.5))


@needs_kernel
def test_a_dropped_nan_does_not_vanish():
    output = dropout(torch.tensor([torch.nan, torch.inf, -torch.inf]).repeat(100), 0.999999)
    assert output.isnan().all()


def test_bad_arguments():
    with pytest.raises(ValueError, match=r"expected 0 <= p <= 1, got p=1\.5"):
        dropout(torch.rand(3), 1.5)
    with pytest.raises(TypeError, match=r"input\.float\(\)"):
        dropout(torch.arange(3), 0.5)


@needs_kernel
@DTYPES
def test_opcheck(dtype):
    input = torch.rand(3, 129, dtype=dtype).t()
    torch.library.opcheck(torch.ops.dfs_engine.dropout, (input, torch.tensor(3), 0.25))
    torch.library.opcheck(torch.ops.dfs_engine.dropout, (input.requires_grad_(), torch.tensor(3), 0.25))


@needs_kernel
def test_compiled_draws_anew_each_call():
    function = torch.compile(lambda x: dropout(x, 0.5), fullgraph=True)
    input = torch.rand(1000).add(0.5).requires_grad_()
    first, second = function(input), function(input)
    assert not torch.equal(first, second)
    for output in (first, second):
        (grad,) = torch.autograd.grad(output.sum(), input)
        assert torch.equal(grad != 0, output != 0)
