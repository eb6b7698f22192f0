"""The fused producer of a feature: ReLU and batch normalisation in either order, 2x2 max pool, the exit's average.

Forward: one pass of partial statistics, merged in fixed order; one pass that normalises, pools, writes the feature and
sums per image. Backward: one pass of sums over the shared channels alone (the exit's gradient is one number per image
and channel, so its sums need no pixels), one pass that writes grad_z.
"""

import itertools
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from dfs_engine.kernels import config
from dfs_engine.kernels import norm_act_kernels as kernels
from dfs_engine.kernels.config import Compilation

# Of a tile. 64 channels are a full 128-byte line in half precision, of which each thread loads 16 bytes at a time. More
# rows would take registers, hence warps, that hide memory's latency better than a longer tile does.
_BLOCK_C, _BLOCK_P, _STATISTICS_ROWS = 64, 16, 32
# (channels, their partial sums) that one program merges at a time, for few partial sums and for many.
_MERGES = ((32, 32), (1, 1024))
# Programs of a large launch: some waves on the largest GPU, so that the last one does not leave it idle.
_PROGRAMS = 8192

Forward = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]
Backward = tuple[Tensor, Tensor, Tensor, Tensor]


def _chunks(num_images: int, num_pixels: int, num_channels: int, block: int) -> tuple[int, int]:
    """(pixels of a chunk, a multiple of the tile; chunks of an image): from the shape alone, so that sums repeat."""
    wanted = math.ceil(_PROGRAMS / (num_images * math.ceil(num_channels / _BLOCK_C)))
    tiles = math.ceil(num_pixels / block)
    per_chunk = math.ceil(tiles / min(wanted, tiles))
    return per_chunk * block, math.ceil(tiles / per_chunk)


def _merge(num_parts: int) -> dict[str, int]:
    channels, parts = next((tile for tile in _MERGES if num_parts <= tile[1]), _MERGES[-1])
    return {"CHANNELS": channels, "PARTS": parts}


def _rows_of(tensor: Tensor) -> Tensor:
    """Dense channels_last; a copy only if it is not."""
    return tensor.contiguous(memory_format=torch.channels_last)


def _empty_rows(z: Tensor, height: int, width: int) -> Tensor:
    shape = (z.size(0), z.size(1), height, width)
    return torch.empty(shape, dtype=z.dtype, device=z.device, memory_format=torch.channels_last)


def _statistics(z: Tensor, eps: float, relu_first: bool) -> tuple[Tensor, Tensor, Tensor]:
    """(mean in float64, inverse_std, biased variance) per channel of dense channels_last z."""
    num_channels, num_rows = z.size(1), z.numel() // z.size(1)
    rows_per_part, num_parts = _chunks(1, num_rows, num_channels, _STATISTICS_ROWS)
    means = z.new_empty((num_channels, num_parts), dtype=torch.float64)
    deviations = z.new_empty((num_channels, num_parts), dtype=torch.float32)
    kernels.statistics_kernel[(num_parts * math.ceil(num_channels / _BLOCK_C),)](
        z, means, deviations, num_rows, num_channels, rows_per_part, num_parts,
        FIRST=relu_first, BLOCK_R=_STATISTICS_ROWS, BLOCK_C=_BLOCK_C, **config.PLAIN,
    )  # fmt: skip
    mean = z.new_empty(num_channels, dtype=torch.float64)
    inverse_std, variance = (z.new_empty(num_channels, dtype=torch.float32) for _ in range(2))
    merge = _merge(num_parts)
    kernels.merge_statistics_kernel[(math.ceil(num_channels / merge["CHANNELS"]),)](
        means, deviations, mean, inverse_std, variance, num_rows, num_channels, rows_per_part, num_parts, eps,
        **merge, **config.PLAIN,
    )  # fmt: skip
    return mean, inverse_std, variance


def norm_act(
    z: Tensor,
    gamma: Tensor,
    beta: Tensor,
    residual: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    eps: float,
    pool: bool,
    relu_first: bool,
    averages: bool,
) -> Forward:
    """`dfs_engine::norm_act`.

    Args:
        z: (N, C, H, W), fp32, fp16 or bf16.
        gamma, beta: (C,).
        residual: as z, added before the last ReLU; with relu_first=False and pool=False only.
        running_mean, running_var: (C,), used instead of the batch's statistics; None when training.
        averages: whether the averages are wanted; else average, average_hat and passed are empty, (0, C).

    Returns:
        feature (N, C, H', W') channels_last and average (N, C), in z's dtype; average_hat (N, C), of x_hat; mean (C,)
        in float64, inverse_std and biased variance (C,) in float32; passed (N, C), the share of the pixels that
        average_hat counts: with the ReLU last, those that it let through.
    """
    z = _rows_of(z)
    num_images, num_channels, height, width = z.shape
    out_height, out_width = (height // 2, width // 2) if pool else (height, width)
    average = z.new_empty((num_images if averages else 0, num_channels))
    average_hat, passed = (z.new_empty(average.shape, dtype=torch.float32) for _ in range(2))
    feature = _empty_rows(z, out_height, out_width)
    if z.numel() == 0:
        zeros = z.new_zeros(num_channels, dtype=torch.float32)
        per_image = (average.zero_(), average_hat.zero_())
        return feature, *per_image, zeros.double(), zeros.clone(), zeros, passed.zero_()
    with torch.cuda.device_of(z):
        if running_mean is None or running_var is None:
            mean, inverse_std, variance = _statistics(z, eps, relu_first)
        else:
            mean, variance = running_mean.to(torch.float64, copy=True), running_var.to(torch.float32, copy=True)
            inverse_std = (variance + eps).rsqrt()
        gamma, beta = gamma.contiguous(), beta.contiguous()
        residual = None if residual is None else _rows_of(residual)
        num_pixels = out_height * out_width
        flags = {"FIRST": relu_first, "RESIDUAL": residual is not None, "BLOCK_C": _BLOCK_C}
        per_chunk, num_chunks = _chunks(num_images, num_pixels, num_channels, _BLOCK_P)
        kinds = 1 if relu_first else 2 + (residual is not None)
        sums = z.new_empty((num_images, num_chunks, kinds, num_channels), dtype=torch.float32)
        num_blocks = math.ceil(num_channels / _BLOCK_C)
        kernels.normalise_kernel[(num_images * num_chunks * num_blocks,)](
            z, z if residual is None else residual, mean, inverse_std, gamma, beta, feature, sums,
            num_channels, height, width, out_height, out_width, per_chunk, num_chunks,
            POOL=pool, BLOCK_P=_BLOCK_P, **flags, **config.PLAIN,
        )  # fmt: skip
        if averages:
            kernels.average_kernel[(num_images * num_blocks,)](
                sums, gamma, beta, average, average_hat, passed, num_channels, num_chunks, num_pixels,
                **flags, **config.PLAIN,
            )  # fmt: skip
    return feature, average, average_hat, mean, inverse_std, variance, passed


def norm_act_backward(
    grad_shared: Tensor,
    grad_average: Tensor | None,
    z: Tensor,
    gamma: Tensor,
    beta: Tensor,
    feature: Tensor | None,
    average_hat: Tensor,
    mean: Tensor,
    inverse_std: Tensor,
    passed: Tensor,
    training: bool,
    pool: bool,
    relu_first: bool,
) -> Backward:
    """`dfs_engine::norm_act_backward`.

    Args:
        grad_shared: (N, num_shared, H', W'), of the first channels; any strides, and never widened.
        grad_average: (N, C), zero where the exit trains nothing; any strides. None: there were no averages.
        feature: the forward's output, where it had a residual: what is above zero passed the last ReLU.
        average_hat, mean, inverse_std, passed: as the forward returned them.

    Returns:
        grad_z (N, C, H, W) channels_last, grad_gamma and grad_beta (C,), grad_residual as grad_z (empty without one).
    """
    z = _rows_of(z)
    num_images, num_channels, height, width = z.shape
    num_shared, out_height, out_width = grad_shared.shape[1:]
    if grad_average is None:
        grad_average = z.new_zeros((num_images, num_channels))
        average_hat = passed = grad_average.float()
    grad_z = _empty_rows(z, height, width)
    grad_residual = z.new_empty(0) if feature is None else _empty_rows(z, height, width)
    grad_gamma, grad_beta = torch.empty_like(gamma), torch.empty_like(beta)
    if z.numel() == 0:
        return grad_z, grad_gamma.zero_(), grad_beta.zero_(), grad_residual
    with torch.cuda.device_of(z):
        gamma, beta, feature = gamma.contiguous(), beta.contiguous(), z if feature is None else _rows_of(feature)
        blocks = {"BLOCK_P": _BLOCK_P, "BLOCK_C": _BLOCK_C}
        flags = {"FIRST": relu_first, "POOL": pool, "RESIDUAL": feature is not z, **blocks}
        per_image, num_rows = height * width, num_images * height * width
        per_chunk, num_chunks = _chunks(num_images, out_height * out_width, max(num_shared, 1), _BLOCK_P)
        num_parts = num_images * num_chunks
        sums, products = (z.new_empty((num_shared, num_parts), dtype=torch.float32) for _ in range(2))
        if num_shared:
            kernels.reduce_kernel[(num_parts * math.ceil(num_shared / _BLOCK_C),)](
                grad_shared, z, feature, mean, inverse_std, gamma, beta, sums, products,
                num_shared, num_channels, height, width, out_height, out_width, per_chunk, num_chunks, num_parts,
                *grad_shared.stride(), **flags, **config.PLAIN,
            )  # fmt: skip
        slope, offset = (z.new_empty(num_channels, dtype=torch.float32) for _ in range(2))
        merge = _merge(max(num_parts, num_images))
        kernels.merge_gradients_kernel[(math.ceil(num_channels / merge["CHANNELS"]),)](
            sums, products, grad_average, average_hat, passed, grad_gamma, grad_beta, slope, offset,
            num_shared, num_channels, num_parts, num_images, num_rows, *grad_average.stride(),
            TRAINING=training, **merge, **config.PLAIN,
        )  # fmt: skip
        # With a pool a window that an odd size cuts off has pixels, too.
        per_image = math.ceil(height / 2) * math.ceil(width / 2) if pool else per_image
        per_chunk, num_chunks = _chunks(num_images, per_image, num_channels, _BLOCK_P)
        kernels.gradient_kernel[(num_images * num_chunks * math.ceil(num_channels / _BLOCK_C),)](
            grad_shared, grad_average, z, feature, mean, inverse_std, gamma, beta, slope, offset, grad_z, grad_residual,
            num_shared, num_channels, height, width, out_height, out_width, per_chunk, num_chunks,
            *grad_shared.stride(), *grad_average.stride(), **flags, **config.PLAIN,
        )  # fmt: skip
    return grad_z, grad_gamma, grad_beta, grad_residual


# Pointers that have another type than float32: the mean, and what has z's.
_FLOAT64 = {"means_ptr", "mean_ptr"}
_AS_Z = {
    "z_ptr", "residual_ptr", "feature_ptr", "average_ptr",
    "grad_ptr", "grad_average_ptr", "grad_z_ptr", "grad_residual_ptr",
}  # fmt: skip
# Of the flags (FIRST, POOL, RESIDUAL), what the op allows.
_MODES = ((True, False, False), (True, True, False), (False, False, False), (False, True, False), (False, False, True))


def compilations() -> Iterator[Compilation]:
    """Every kernel in every way that it is launched on channels_last gradients and float32 parameters."""
    blocks = {"BLOCK_P": _BLOCK_P, "BLOCK_C": _BLOCK_C, "BLOCK_R": _STATISTICS_ROWS}
    for dtype, (first, pool, residual) in itertools.product(config.TYPE_NAMES.values(), _MODES):
        names = ["normalise", "reduce", "gradient"]
        if not pool:
            names += ["average"] if residual else ["average", "statistics"]
        for name in names:
            yield _compilation(name, dtype, {"FIRST": first, "POOL": pool, "RESIDUAL": residual, **blocks})
    for channels, parts in _MERGES:
        merge = {"CHANNELS": channels, "PARTS": parts}
        yield _compilation("merge_statistics", "fp32", merge)
        for dtype, training in itertools.product(config.TYPE_NAMES.values(), (True, False)):
            yield _compilation("merge_gradients", dtype, {"TRAINING": training, **merge})


def _compilation(name: str, dtype: str, constants: dict[str, Any]) -> Compilation:
    kernel = getattr(kernels, f"{name}_kernel")

    def type_of(pointer: str) -> str:
        return "*fp64" if pointer in _FLOAT64 else f"*{dtype if pointer in _AS_Z else 'fp32'}"

    types = {argument: type_of(argument) for argument in kernel.arg_names if argument.endswith("_ptr")}
    modes = [flag for flag, value in constants.items() if value is True]
    modes += [f"{constants['PARTS']} parts"] if "PARTS" in constants else []
    label = " ".join([f"norm_act.{name}", dtype, *modes])
    strides = {"stride_c": 1, "stride_average_c": 1}
    return config.compilation(label, kernel, types | {"eps": "fp32"}, constants | strides)
