"""Gradients of LayerNorm and linear: of a slice of the input, from row sums of the output; and of x_hat's weight.

With D = grad_output, C channels, x_hat = (input - mean) * rstd, S the slice:

    m1 = D (W norm_weight) / C,  m2 = sum_o D * (output - bias - W norm_bias) / C
    grad_input = rstd * ((D W[:, S]) * norm_weight[S] - m1 - x_hat[:, S] * m2)

Columns of the output that have lost digits of the product beside a large bias or W norm_bias (by which bound, see
`dfs_engine.ops.norm_linear`) are multiplied anew.

Any strides. float32, float16 and bfloat16, accumulated in float32; input and the normalisation's tensors may be wider
than the linear's. Deterministic.
"""

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from dfs_engine.kernels import config
from dfs_engine.kernels.config import Compilation, Config
from dfs_engine.kernels.linear import _constants, _rows, _step, _tile, linear_grad_weight

_OP = "norm_linear_grad_input"
# Of the kernels that are bound by memory: rows and columns of a tile.
_TILE = {"BLOCK_M": 16, "BLOCK_N": 128, **config.PLAIN}

# Of the product that replaces lost digits, columns and reduced axis: small, as its registers count where none is lost.
_DOT = {"BLOCK_L": 32, "BLOCK_K": 32}
# Of loops that wait for memory: the tile that is computed with and those that are on their way to shared memory.
_NUM_STAGES = tl.constexpr(3)

# The input's tile takes registers that a matrix product's tile of 128 x 128 does not leave on sm_90.
config.define(
    _OP,
    half=(Config(64, 128, 64, 4, 3), Config(64, 64, 64, 4, 3)),
    tf32=(Config(64, 128, 32, 4, 3), Config(64, 64, 32, 4, 3)),
)


@triton.jit
def _weight_sums_kernel(
    weight,  # (out, channels)
    bias,  # (out,) or None
    norm_weight,  # (channels,) or None
    norm_bias,  # (channels,) or None
    sums,  # (3, out) float32: W norm_weight; bias + W norm_bias; 1 where the output has lost digits beside it, else 0
    out,
    channels,
    stride_wo,
    stride_wc,
    stride_b,
    stride_nw,
    stride_nb,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    o_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    m_m = o_m < out
    b_gain = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    b_shift = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    b_gains = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    b_shifts = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for first in tl.range(0, channels, BLOCK_N, num_stages=_NUM_STAGES):
        o_n = first + tl.arange(0, BLOCK_N).to(tl.int64)
        m_n = o_n < channels
        p_weight = weight + o_m[:, None] * stride_wo + o_n[None, :] * stride_wc
        b_weight = tl.load(p_weight, mask=m_m[:, None] & m_n[None, :], other=0.0).to(tl.float32)
        b_scaled = b_weight
        if norm_weight is not None:
            b_scaled *= tl.load(norm_weight + o_n * stride_nw, mask=m_n, other=0.0).to(tl.float32)[None, :]
        b_gain += b_scaled
        b_gains += b_scaled * b_scaled
        if norm_bias is not None:
            b_weight *= tl.load(norm_bias + o_n * stride_nb, mask=m_n, other=0.0).to(tl.float32)[None, :]
            b_shift += b_weight
            b_shifts += b_weight * b_weight
    b_sum = tl.sum(b_shift, axis=1)
    b_size = tl.abs(b_sum) + tl.sqrt(tl.sum(b_shifts, axis=1))
    if bias is not None:
        b_bias = tl.load(bias + o_m * stride_b, mask=m_m, other=0.0).to(tl.float32)
        b_sum += b_bias
        b_size += tl.abs(b_bias)
    tl.store(sums + o_m, tl.sum(b_gain, axis=1), mask=m_m)
    tl.store(sums + out + o_m, b_sum, mask=m_m)
    # |c| + |W b| + |W_o * b| > sqrt(C) |W_o * g|
    b_lossy = b_size > tl.sqrt(tl.sum(b_gains, axis=1) * channels)
    tl.store(sums + 2 * out + o_m, b_lossy.to(tl.float32), mask=m_m)


@triton.jit
def _row_sums_kernel(
    grad_output,  # (rows, out)
    output,  # (rows, out)
    input,  # (rows, channels)
    mean,  # (rows,) float32
    rstd,  # (rows,) float32
    weight,  # (out, channels)
    norm_weight,  # (channels,) or None
    weight_sums,  # (3, out) float32
    sums,  # (2, rows) float32: m1 and m2
    rows,
    out,
    channels,
    stride_gm,
    stride_go,
    stride_om,
    stride_oo,
    stride_im,
    stride_ic,
    stride_wo,
    stride_wc,
    stride_nw,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_L: tl.constexpr,  # of out, as BLOCK_N, where it has lost digits
    BLOCK_K: tl.constexpr,
):
    """m1 beside m2, which reads grad_output anyway: as one more column of the product it would cost every tile."""
    o_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    m_m = o_m < rows
    b_1 = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    b_2 = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    b_num_lossy = tl.zeros((BLOCK_N,), dtype=tl.float32)
    for first in tl.range(0, out, BLOCK_N, num_stages=_NUM_STAGES):
        o_n = first + tl.arange(0, BLOCK_N).to(tl.int64)
        m_n = o_n < out
        m_tile = m_m[:, None] & m_n[None, :]
        p_grad = grad_output + o_m[:, None] * stride_gm + o_n[None, :] * stride_go
        p_output = output + o_m[:, None] * stride_om + o_n[None, :] * stride_oo
        b_grad = tl.load(p_grad, mask=m_tile, other=0.0).to(tl.float32)
        b_output = tl.load(p_output, mask=m_tile, other=0.0).to(tl.float32)
        b_1 += b_grad * tl.load(weight_sums + o_n, mask=m_n, other=0.0)[None, :]
        b_product = b_output - tl.load(weight_sums + out + o_n, mask=m_n, other=0.0)[None, :]
        b_lossy = tl.load(weight_sums + 2 * out + o_n, mask=m_n, other=0.0)
        b_2 += b_grad * tl.where(b_lossy[None, :] > 0, 0.0, b_product)
        b_num_lossy += b_lossy
    b_sum = tl.sum(b_2, axis=1)
    tl.store(sums + o_m, tl.sum(b_1, axis=1) / channels, mask=m_m)
    # Apart from the others, which leave it the registers.
    if tl.max(b_num_lossy, axis=0) > 0:
        b_mean, b_rstd = tl.load(mean + o_m, mask=m_m, other=0.0), tl.load(rstd + o_m, mask=m_m, other=0.0)
        for first in range(0, out, BLOCK_L):
            o_n = first + tl.arange(0, BLOCK_L).to(tl.int64)
            m_n = o_n < out
            b_lossy = tl.load(weight_sums + 2 * out + o_n, mask=m_n, other=0.0)
            if tl.max(b_lossy, axis=0) > 0:
                b_product = tl.zeros((BLOCK_M, BLOCK_L), dtype=tl.float32)
                for done in range(0, channels, BLOCK_K):
                    o_k = done + tl.arange(0, BLOCK_K).to(tl.int64)
                    m_k = o_k < channels
                    p_input = input + o_m[:, None] * stride_im + o_k[None, :] * stride_ic
                    p_weight = weight + o_k[:, None] * stride_wc + o_n[None, :] * stride_wo
                    b_hat = tl.load(p_input, mask=m_m[:, None] & m_k[None, :], other=0.0).to(tl.float32)
                    b_hat = (b_hat - b_mean[:, None]) * b_rstd[:, None]
                    if norm_weight is not None:
                        b_hat *= tl.load(norm_weight + o_k * stride_nw, mask=m_k, other=0.0).to(tl.float32)[None, :]
                    b_weight = tl.load(p_weight, mask=m_k[:, None] & m_n[None, :], other=0.0).to(tl.float32)
                    b_product = tl.dot(b_hat, b_weight, b_product, input_precision="ieee", out_dtype=tl.float32)
                p_grad = grad_output + o_m[:, None] * stride_gm + o_n[None, :] * stride_go
                b_grad = tl.load(p_grad, mask=m_m[:, None] & m_n[None, :], other=0.0).to(tl.float32)
                b_sum += tl.sum(b_grad * b_product * b_lossy[None, :], axis=1)
    tl.store(sums + rows + o_m, b_sum / channels, mask=m_m)


@triton.jit
def _grad_input_kernel(
    grad_output,  # (rows, out)
    weight,  # (out, columns): the slice's and, before and behind them, others, as in the next two
    input,  # (rows, columns)
    norm_weight,  # (columns,) or None
    mean,  # (rows,) float32
    rstd,  # (rows,) float32
    sums,  # (2, rows) float32: m1 and m2
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
    stride_im,
    stride_in,
    stride_nw,
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
    m_m, m_n = o_m < rows, o_n < columns
    p_grad = grad_output + o_m[:, None] * stride_gm + o_k[None, :] * stride_go
    p_weight = weight + o_k[:, None] * stride_wo + o_n[None, :] * stride_wn
    step_grad, step_weight = _step(stride_go, BLOCK_K), _step(stride_wo, BLOCK_K)
    b_sum = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for done in range(0, out, BLOCK_K):
        m_k = o_k < out - done
        b_grad = tl.load(p_grad, mask=m_m[:, None] & m_k[None, :], other=0.0)
        b_weight = tl.load(p_weight, mask=m_k[:, None] & m_n[None, :], other=0.0)
        b_sum = tl.dot(b_grad, b_weight, b_sum, input_precision=PRECISION, out_dtype=tl.float32)
        p_grad += step_grad
        p_weight += step_weight
    if norm_weight is not None:
        b_sum *= tl.load(norm_weight + o_n * stride_nw, mask=m_n, other=0.0).to(tl.float32)[None, :]
    b_mean, b_rstd = tl.load(mean + o_m, mask=m_m, other=0.0), tl.load(rstd + o_m, mask=m_m, other=0.0)
    b_1, b_2 = tl.load(sums + o_m, mask=m_m, other=0.0), tl.load(sums + rows + o_m, mask=m_m, other=0.0)
    m_tile = m_m[:, None] & m_n[None, :]
    p_input = input + o_m[:, None] * stride_im + o_n[None, :] * stride_in
    b_input = tl.load(p_input, mask=m_tile, other=0.0).to(tl.float32)
    b_sum -= b_1[:, None] + (b_input - b_mean[:, None]) * (b_rstd * b_2)[:, None]
    b_sum *= b_rstd[:, None]
    p_sum = grad_input + o_m[:, None] * (stop - start) + (o_n - start)[None, :]
    m_n = (o_n >= start) & (o_n < stop)
    tl.store(p_sum, b_sum.to(grad_input.dtype.element_ty), mask=m_m[:, None] & m_n[None, :])


@triton.jit
def _normalize_kernel(
    input,  # (rows, channels)
    mean,  # (rows,) float32
    rstd,  # (rows,) float32
    normalized,  # (rows, channels), contiguous
    rows,
    channels,
    stride_im,
    stride_ic,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    o_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    m_m = o_m < rows
    b_mean, b_rstd = tl.load(mean + o_m, mask=m_m, other=0.0), tl.load(rstd + o_m, mask=m_m, other=0.0)
    for first in range(0, channels, BLOCK_N):
        o_n = first + tl.arange(0, BLOCK_N).to(tl.int64)
        m_tile = m_m[:, None] & (o_n < channels)[None, :]
        p_input = input + o_m[:, None] * stride_im + o_n[None, :] * stride_ic
        b_input = tl.load(p_input, mask=m_tile, other=0.0).to(tl.float32)
        b_input = (b_input - b_mean[:, None]) * b_rstd[:, None]
        p_sum = normalized + o_m[:, None] * channels + o_n[None, :]
        tl.store(p_sum, b_input.to(normalized.dtype.element_ty), mask=m_tile)


def norm_linear_grad_input(
    grad_output: Tensor,
    output: Tensor,
    input: Tensor,
    mean: Tensor,
    rstd: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    start: int,
    stop: int,
) -> Tensor:
    """`dfs_engine::norm_linear_grad_input`.

    Args:
        grad_output, output: (..., out_features).
        input: (..., C). mean, rstd: (..., 1), float32, contiguous.
        norm_weight, norm_bias: (C,) or None.
        weight: (out_features, C), of grad_output's dtype. bias: (out_features,) or None.
        start, stop: the slice of channels.

    Returns:
        (..., stop - start), contiguous, dtype of input.

    Raises:
        NoConfigFits: none of the configurations fits the GPU.
    """
    grad_input = input.new_empty((*input.shape[:-1], stop - start))
    if grad_input.numel() == 0 or grad_output.numel() == 0:
        return grad_input.zero_()
    grad_output, output, input = _rows(grad_output), _rows(output), _rows(input)
    (num_rows, out), num_channels = grad_output.shape, input.size(1)
    weight_sums, row_sums = mean.new_empty((3, out)), mean.new_empty((2, num_rows))
    first, last = config.aligned(start, stop)
    columns, live = weight[:, first:last], input[:, first:last]
    gain, num_columns = None if norm_weight is None else norm_weight[first:last], columns.size(1)

    def run(chosen: Config) -> None:
        tiles = triton.cdiv(num_rows, chosen.block_m) * triton.cdiv(num_columns, chosen.block_n)
        _grad_input_kernel[(tiles,)](
            grad_output, columns, live, gain, mean, rstd, row_sums, grad_input,
            num_rows, num_columns, start - first, stop - first, out,
            *grad_output.stride(), *columns.stride(), *live.stride(), _stride(gain), **_constants(_OP, chosen),
        )  # fmt: skip

    with torch.cuda.device_of(grad_output):
        _weight_sums_kernel[_tiles(out)](
            weight, bias, norm_weight, norm_bias, weight_sums, out, num_channels,
            *weight.stride(), _stride(bias), _stride(norm_weight), _stride(norm_bias), **_TILE,
        )  # fmt: skip
        _row_sums_kernel[_tiles(num_rows)](
            grad_output, output, input, mean, rstd, weight, norm_weight, weight_sums, row_sums,
            num_rows, out, num_channels, *grad_output.stride(), *output.stride(), *input.stride(), *weight.stride(),
            _stride(norm_weight), **_TILE, **_DOT,
        )  # fmt: skip
        config.launch(_OP, config.candidates(_OP, num_rows, stop - start, out, grad_output.dtype), run)
    return grad_input


def norm_linear_grad_weight(grad_output: Tensor, input: Tensor, mean: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    """`dfs_engine::norm_linear_grad_weight`: grad_output^T @ x_hat, and the sums of grad_output's columns.

    Args:
        grad_output: (..., out_features). input: (..., C). mean, rstd: (..., 1), float32, contiguous.

    Returns:
        (out_features, C) and (out_features,), float32.

    Raises:
        NoConfigFits: none of the configurations fits the GPU.
    """
    rows = _rows(input)
    normalized = grad_output.new_empty(input.shape)
    if normalized.numel() > 0:
        with torch.cuda.device_of(input):
            _normalize_kernel[_tiles(len(rows))](rows, mean, rstd, normalized, *rows.shape, *rows.stride(), **_TILE)
    return linear_grad_weight(grad_output, normalized, True, mean.dtype)


def _stride(vector: Tensor | None) -> int:
    return 0 if vector is None else vector.stride(0)


def _tiles(num_rows: int) -> tuple[int]:
    return (triton.cdiv(num_rows, _TILE["BLOCK_M"]),)


def compilations() -> Iterator[Compilation]:
    """Every kernel of this file as it is launched on contiguous tensors, for tests without a GPU."""
    for dtype, precision, chosen in config.variants(_OP):
        tile = {**_constants(_OP, chosen), "PRECISION": precision}
        for name, types, given in _given(dtype):
            yield config.compilation(f"{_OP}-{name}-{precision}", _grad_input_kernel, types, tile | given, chosen)
    for dtype in config.TYPE_NAMES.values():
        for name, types, given in _given(dtype):
            for kernel in (_weight_sums_kernel, _row_sums_kernel, _normalize_kernel):
                constants = {**_TILE, **_DOT, **given}
                yield config.compilation(f"norm_linear{kernel.__name__}-{name}", kernel, types, constants)


def _given(dtype: str) -> Iterator[tuple[str, dict[str, str], dict[str, Any]]]:
    """(name, types, constants): as under autocast, the normalisation in float32; and of one dtype, without affine."""
    strides = dict.fromkeys(("stride_go", "stride_oo", "stride_ic", "stride_in", "stride_wc", "stride_wn"), 1)
    types = dict.fromkeys(("weight", "bias", "grad_output", "output", "normalized", "input", "grad_input"), f"*{dtype}")
    types |= dict.fromkeys(("mean", "rstd", "sums", "weight_sums"), "*fp32")
    wide = dict.fromkeys(("input", "norm_weight", "norm_bias", "grad_input"), "*fp32")
    yield f"{dtype}-autocast", types | wide, strides | dict.fromkeys(("stride_nw", "stride_nb", "stride_b"), 1)
    yield f"{dtype}-plain", types, strides | dict.fromkeys(("norm_weight", "norm_bias", "bias"))
