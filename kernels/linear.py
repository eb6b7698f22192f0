"""Gradients of a linear layer: of a slice of its input, and of weight and bias in one pass over grad_output.

Any strides. float32, float16 and bfloat16, accumulated in float32. Deterministic: partial sums go to a workspace and
are added in fixed order.
"""

import math
from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from dfs_engine.kernels import config
from dfs_engine.kernels.config import Compilation, Config

# Tiles in a column of this many share their columns of the second operand while those are still in the L2 cache.
_GROUP = 8
# Of the kernel that adds up partial sums: outputs of a program, and its launch.
_REDUCE = {"BLOCK": 1024, **config.PLAIN}

# The column sums take registers that the matrix product's largest tile does not leave.
config.define(
    "linear_grad_weight",
    half=(
        Config(128, 256, 32, 8, 4),
        Config(128, 128, 64, 8, 3),
        Config(64, 128, 64, 4, 3),
        Config(64, 64, 64, 4, 3),
    ),
)


@triton.jit
def _tile(i_tile, num_rows, num_columns, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP: tl.constexpr):
    """Which tile a program computes: GROUP rows of tiles, column by column, then the next rows."""
    num_m = tl.cdiv(num_rows, BLOCK_M)
    num_n = tl.cdiv(num_columns, BLOCK_N)
    i_group = i_tile // (GROUP * num_n)
    first_m = i_group * GROUP
    size = min(num_m - first_m, GROUP)
    return first_m + i_tile % (GROUP * num_n) % size, i_tile % (GROUP * num_n) // size


@triton.jit
def _step(stride, BLOCK: tl.constexpr):
    """From one block to the next along the reduced axis, in elements; a long stride times a block overflows 32 bits."""
    return tl.cast(stride, tl.int64) * BLOCK


@triton.jit
def _grad_input_kernel(
    grad_output,  # (rows, out)
    weight,  # (out, columns): the slice's and, before and behind them, others
    grad_input,  # (rows, stop - start), contiguous
    rows,
    columns,
    start,  # the slice of the columns
    stop,
    out,
    stride_gm,
    stride_go,
    stride_wo,
    stride_wn,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):
    i_m, i_n = _tile(tl.program_id(0), rows, columns, BLOCK_M, BLOCK_N, GROUP)
    o_m = i_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    o_n = i_n.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    o_k = tl.arange(0, BLOCK_K).to(tl.int64)
    m_m, m_n = (o_m < rows)[:, None], (o_n < columns)[None, :]
    p_grad = grad_output + o_m[:, None] * stride_gm + o_k[None, :] * stride_go
    p_weight = weight + o_k[:, None] * stride_wo + o_n[None, :] * stride_wn
    step_grad, step_weight = _step(stride_go, BLOCK_K), _step(stride_wo, BLOCK_K)
    b_sum = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for done in range(0, out, BLOCK_K):
        m_k = o_k < out - done
        b_grad = tl.load(p_grad, mask=m_m & m_k[None, :], other=0.0)
        b_weight = tl.load(p_weight, mask=m_k[:, None] & m_n, other=0.0)
        b_sum = tl.dot(b_grad, b_weight, b_sum, input_precision=PRECISION, out_dtype=tl.float32)
        p_grad += step_grad
        p_weight += step_weight
    p_sum = grad_input + o_m[:, None] * (stop - start) + (o_n - start)[None, :]
    m_n = ((o_n >= start) & (o_n < stop))[None, :]
    tl.store(p_sum, b_sum.to(grad_input.dtype.element_ty), mask=m_m & m_n)


@triton.jit
def _grad_weight_kernel(
    grad_output,  # (rows, out)
    input,  # (rows, columns)
    grad_weight,  # (out, columns), contiguous; with several splits the first one's, in the workspace
    grad_bias,  # (out,), likewise
    rows,
    columns,
    out,
    rows_per_split,  # a multiple of BLOCK_K
    stride_gm,
    stride_go,
    stride_im,
    stride_in,
    stride_split,  # of the workspace
    BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,  # of out
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,  # of rows
    GROUP: tl.constexpr,
):
    i_m, i_n = _tile(tl.program_id(0), out, columns, BLOCK_M, BLOCK_N, GROUP)
    i_split = tl.program_id(1).to(tl.int64)
    first = i_split * rows_per_split
    last = min(first + rows_per_split, rows)
    o_m = i_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    o_n = i_n.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    o_k = first + tl.arange(0, BLOCK_K)
    m_m, m_n = o_m < out, (o_n < columns)[None, :]
    p_grad = grad_output + o_m[:, None] * stride_go + o_k[None, :] * stride_gm
    p_input = input + o_k[:, None] * stride_im + o_n[None, :] * stride_in
    step_grad, step_input = _step(stride_gm, BLOCK_K), _step(stride_im, BLOCK_K)
    b_sum = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    # Every column of tiles reads grad_output; the first one adds it up, in a loop of its own: a condition inside would
    # keep the others from multiplying straight out of shared memory.
    if BIAS and i_n == 0:
        b_bias = tl.zeros((BLOCK_M,), dtype=tl.float32)
        for done in range(first, last, BLOCK_K):
            m_k = tl.arange(0, BLOCK_K) < last - done
            b_grad = tl.load(p_grad, mask=m_m[:, None] & m_k[None, :], other=0.0)
            b_input = tl.load(p_input, mask=m_k[:, None] & m_n, other=0.0)
            b_sum = tl.dot(b_grad, b_input, b_sum, input_precision=PRECISION, out_dtype=tl.float32)
            b_bias += tl.sum(b_grad.to(tl.float32), axis=1)
            p_grad += step_grad
            p_input += step_input
        tl.store(grad_bias + i_split * stride_split + o_m, b_bias.to(grad_bias.dtype.element_ty), mask=m_m)
    else:
        for done in range(first, last, BLOCK_K):
            m_k = tl.arange(0, BLOCK_K) < last - done
            b_grad = tl.load(p_grad, mask=m_m[:, None] & m_k[None, :], other=0.0)
            b_input = tl.load(p_input, mask=m_k[:, None] & m_n, other=0.0)
            b_sum = tl.dot(b_grad, b_input, b_sum, input_precision=PRECISION, out_dtype=tl.float32)
            p_grad += step_grad
            p_input += step_input
    p_sum = grad_weight + i_split * stride_split + o_m[:, None] * columns + o_n[None, :]
    tl.store(p_sum, b_sum.to(grad_weight.dtype.element_ty), mask=m_m[:, None] & m_n)


@triton.jit
def _reduce_kernel(
    workspace,  # (splits, weight_size + bias_size) float32
    grad_weight,  # (weight_size,)
    grad_bias,  # (bias_size,)
    weight_size,
    size,  # weight_size + bias_size
    splits,
    BLOCK: tl.constexpr,
):
    o_sum = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    m_sum = o_sum < size
    b_sum = tl.zeros((BLOCK,), dtype=tl.float32)
    for _ in range(splits):
        b_sum += tl.load(workspace + o_sum, mask=m_sum, other=0.0)
        workspace += size
    b_sum = b_sum.to(grad_weight.dtype.element_ty)
    is_weight = o_sum < weight_size
    tl.store(grad_weight + o_sum, b_sum, mask=is_weight)
    tl.store(grad_bias + (o_sum - weight_size), b_sum, mask=m_sum & (o_sum >= weight_size))


def _rows(tensor: Tensor) -> Tensor:
    """(..., features) as (rows, features): a view where the strides allow it."""
    return tensor.reshape(math.prod(tensor.shape[:-1]), tensor.size(-1))


def linear_grad_input(grad_output: Tensor, weight: Tensor, start: int, stop: int) -> Tensor:
    """`dfs_engine::linear_grad_input`: grad_output @ weight[:, start:stop], the weight read in place.

    Args:
        grad_output: (..., out_features).
        weight: (out_features, in_features), of the same dtype: float32, float16 or bfloat16.
        start, stop: the slice of in_features.

    Returns:
        (..., stop - start), contiguous.

    Raises:
        NoConfigFits: none of the configurations fits the GPU.
    """
    grad_input = grad_output.new_empty((*grad_output.shape[:-1], stop - start))
    if grad_input.numel() == 0 or grad_output.numel() == 0:
        return grad_input.zero_()
    first, last = config.aligned(start, stop)
    grad_output, columns = _rows(grad_output), weight[:, first:last]
    (num_rows, out), num_columns = grad_output.shape, columns.size(1)

    def run(chosen: Config) -> None:
        tiles = triton.cdiv(num_rows, chosen.block_m) * triton.cdiv(num_columns, chosen.block_n)
        _grad_input_kernel[(tiles,)](
            grad_output,
            columns,
            grad_input,
            num_rows,
            num_columns,
            start - first,
            stop - first,
            out,
            *grad_output.stride(),
            *columns.stride(),
            **_constants(op, chosen),
        )

    op = "linear_grad_input"
    with torch.cuda.device_of(grad_output):
        config.launch(op, config.candidates(op, num_rows, stop - start, out, grad_output.dtype), run)
    return grad_input


def linear_grad_weight(
    grad_output: Tensor, input: Tensor, bias: bool, dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """`dfs_engine::linear_grad_weight`: grad_output^T @ input, and the sums of grad_output's columns.

    Args:
        grad_output: (..., out_features).
        input: (..., in_features), of the same dtype: float32, float16 or bfloat16.
        bias: whether to compute the second result.
        dtype: of the results, to which the float32 sums are rounded; None: grad_output's.

    Returns:
        (out_features, in_features), contiguous, and (out_features,), the latter empty without `bias`.

    Raises:
        NoConfigFits: none of the configurations fits the GPU.
    """
    grad_output, input = _rows(grad_output), _rows(input)
    (num_rows, out), num_columns = grad_output.shape, input.size(1)
    grad_weight = grad_output.new_empty((out, num_columns), dtype=dtype)
    grad_bias = grad_output.new_empty(out if bias else 0, dtype=dtype)
    if num_rows == 0 or out == 0:
        return grad_weight.zero_(), grad_bias.zero_()
    if num_columns == 0:
        return grad_weight, grad_output.sum(0, dtype=dtype) if bias else grad_bias

    def run(chosen: Config) -> None:
        tiles = triton.cdiv(out, chosen.block_m) * triton.cdiv(num_columns, chosen.block_n)
        rows_per_split = triton.cdiv(triton.cdiv(num_rows, chosen.split), chosen.block_k) * chosen.block_k
        splits = triton.cdiv(num_rows, rows_per_split)
        sums, bias_sums = grad_weight, grad_bias
        size = grad_weight.numel() + grad_bias.numel()
        if splits > 1:
            workspace = grad_output.new_empty((splits, size), dtype=torch.float32)
            sums, bias_sums = workspace, workspace[:, grad_weight.numel() :]
        _grad_weight_kernel[(tiles, splits)](
            grad_output,
            input,
            sums,
            bias_sums,
            num_rows,
            num_columns,
            out,
            rows_per_split,
            *grad_output.stride(),
            *input.stride(),
            size,
            BIAS=bias,
            **_constants(op, chosen),
        )
        if splits > 1:
            _reduce_kernel[(triton.cdiv(size, _REDUCE["BLOCK"]),)](
                workspace, grad_weight, grad_bias, grad_weight.numel(), size, splits, **_REDUCE
            )

    op = "linear_grad_weight"
    with torch.cuda.device_of(grad_output):
        config.launch(op, config.candidates(op, out, num_columns, num_rows, grad_output.dtype), run)
    return grad_weight, grad_bias


def _constants(op: str, chosen: Config) -> dict[str, Any]:
    return {
        "PRECISION": config.precision(op),
        "BLOCK_M": chosen.block_m,
        "BLOCK_N": chosen.block_n,
        "BLOCK_K": chosen.block_k,
        "GROUP": _GROUP,
        "num_warps": chosen.num_warps,
        "num_stages": chosen.num_stages,
        "enable_fp_fusion": True,
    }


def compilations() -> Iterator[Compilation]:
    """Every kernel of this file as it is launched on contiguous tensors, for tests without a GPU."""
    unit = dict.fromkeys(("stride_go", "stride_wn", "stride_in"), 1)
    for op, kernel in (("linear_grad_input", _grad_input_kernel), ("linear_grad_weight", _grad_weight_kernel)):
        for dtype, precision, chosen in config.variants(op):
            # What a weight gradient writes: partial sums, or a parameter's gradient in float32; or one in its dtype.
            results = dict.fromkeys(("fp32", dtype)) if kernel is _grad_weight_kernel else [dtype]
            for result in results:
                types = dict.fromkeys(("grad_output", "weight", "input"), f"*{dtype}")
                types |= dict.fromkeys(("grad_input", "grad_weight", "grad_bias"), f"*{result}")
                constants = {**_constants(op, chosen), **unit, "PRECISION": precision, "BIAS": result == "fp32"}
                yield config.compilation(f"{op}-{dtype}-{precision}-{result}", kernel, types, constants, chosen)
    for dtype in config.TYPE_NAMES.values():
        types = {"workspace": "*fp32", "grad_weight": f"*{dtype}", "grad_bias": f"*{dtype}"}
        yield config.compilation(f"linear_reduce-{dtype}", _reduce_kernel, types, _REDUCE)
