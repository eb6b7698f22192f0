"""The Triton kernels of norm_act.py.

Tensors are rows of channels (channels_last). ReLU first (FIRST): r = max(z, 0), y = x_hat * gamma + beta. ReLU last:
r = z, y = max(x_hat * gamma + beta + residual, 0). x_hat = (r - mean) * inverse_std. The feature is y, or with POOL its
maximum over each 2x2 window. A NaN stays one throughout. A part is what one program sums up, a chunk one of an image.
"""

import triton
import triton.language as tl

# Of the loops over pixels: the tile that is computed with and those that are on their way to shared memory.
_NUM_STAGES = tl.constexpr(3)
# By these no load is aligned: to compile for each of their values would only cost time.
_COUNTS = [
    "num_images", "num_rows", "num_pixels", "num_parts", "num_chunks", "rows_per_part", "pixels_per_chunk",
    "height", "width", "out_height", "out_width",
]  # fmt: skip


@triton.jit
def _load(pointers, mask, FIRST: tl.constexpr):
    """What is normalised, in float32."""
    value = tl.load(pointers, mask, 0.0).to(tl.float32)
    return tl.where(value < 0, 0.0, value) if FIRST else value


@triton.jit
def _normaliser(mean_ptr, inverse_std_ptr, channels, is_channel):
    """(mean, rest, inverse_std) as rows. A mean large beside the deviation needs more digits than float32 has."""
    exact = tl.load(mean_ptr + channels, is_channel, 0.0)
    mean = exact.to(tl.float32)
    inverse_std = tl.load(inverse_std_ptr + channels, is_channel, 0.0)
    rest = (exact - mean.to(tl.float64)).to(tl.float32) * inverse_std
    return mean[None, :], rest[None, :], inverse_std[None, :]


@triton.jit
def _parameter(pointer, channels, is_channel):
    return tl.load(pointer + channels, is_channel, 0.0).to(tl.float32)[None, :]


@triton.jit
def _window(pointers, mask, has_right, has_below, next_row, next_pixel, FIRST: tl.constexpr, POOL: tl.constexpr):
    """What is normalised at the pixels of a window, row by row, or at the only one: each is read once."""
    here = _load(pointers, mask, FIRST)
    if POOL:
        right = _load(pointers + next_pixel, mask & has_right, FIRST)
        below = _load(pointers + next_row, mask & has_below, FIRST)
        diagonal = _load(pointers + next_row + next_pixel, mask & has_right & has_below, FIRST)
        return here, right, below, diagonal
    else:  # triton 3.6 would compile what follows a return
        return (here,)


@triton.jit
def _produce(window, mean, rest, inverse_std, gamma, beta, POOL: tl.constexpr):
    """(y without the last ReLU, x_hat, position) of the pixel that survives its window, or of the only one."""
    x_hat = (window[0] - mean) * inverse_std - rest
    y = x_hat * gamma + beta
    position = tl.zeros_like(y).to(tl.int32)
    if POOL:
        for index in tl.static_range(1, 4):
            other = (window[index] - mean) * inverse_std - rest
            value = other * gamma + beta
            # The first of equal values, and a NaN before all, as torch's max_pool2d.
            is_larger = (value > y) | (value != value)
            y = tl.where(is_larger, value, y)
            x_hat = tl.where(is_larger, other, x_hat)
            position = tl.where(is_larger, index, position)
    return y, x_hat, position


@triton.jit
def _place(num_channels, num_chunks, BLOCK_C: tl.constexpr):
    """(image, chunk of its pixels, channels) of this program. Neighbouring programs share rows."""
    pid = tl.program_id(0)
    num_blocks = tl.cdiv(num_channels, BLOCK_C)
    i_part = pid // num_blocks
    channels = (pid % num_blocks) * BLOCK_C + tl.arange(0, BLOCK_C)
    return (i_part // num_chunks).to(tl.int64), i_part % num_chunks, channels


@triton.jit(do_not_specialize=_COUNTS)
def statistics_kernel(
    z_ptr, means_ptr, deviations_ptr, num_rows, num_channels, rows_per_part, num_parts,
    FIRST: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Mean and sum of squared deviations of r over each part of the rows, as (channels, parts)."""
    _, i_part, channels = _place(num_channels, num_parts, BLOCK_C)
    is_channel = channels < num_channels
    first = i_part.to(tl.int64) * rows_per_part
    last = tl.minimum(first + rows_per_part, num_rows)
    rows = first + tl.arange(0, BLOCK_R)
    # Sums are taken around the mean of the first tile: neither a large mean nor an odd first row costs digits.
    mask = (rows < last)[:, None] & is_channel[None, :]
    head = _load(z_ptr + rows[:, None] * num_channels + channels[None, :], mask, FIRST)
    shift = tl.sum(head, 0) / tl.minimum(last - first, BLOCK_R).to(tl.float32)
    sums = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    squares = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    for start in tl.range(0, rows_per_part, BLOCK_R, num_stages=_NUM_STAGES):
        rows = first + start + tl.arange(0, BLOCK_R)
        mask = (rows < last)[:, None] & is_channel[None, :]
        r = _load(z_ptr + rows[:, None] * num_channels + channels[None, :], mask, FIRST)
        distance = tl.where(mask, r - shift[None, :], 0.0)
        sums += distance
        squares += distance * distance
    count = (last - first).to(tl.float32)
    total = tl.sum(sums, 0)
    deviation = tl.sum(squares, 0) - total * total / count
    parts = channels.to(tl.int64) * num_parts + i_part
    tl.store(means_ptr + parts, shift.to(tl.float64) + (total / count).to(tl.float64), is_channel)
    tl.store(deviations_ptr + parts, tl.where(deviation < 0, 0.0, deviation), is_channel)


@triton.jit(do_not_specialize=_COUNTS)
def merge_statistics_kernel(
    means_ptr, deviations_ptr, mean_ptr, inverse_std_ptr, variance_ptr,
    num_rows, num_channels, rows_per_part, num_parts, eps, CHANNELS: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Statistics of some channels from those of their parts, by Chan's formula in float64."""
    channels = (tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)).to(tl.int64)
    is_channel = channels < num_channels
    sums = tl.zeros((CHANNELS, PARTS), tl.float64)
    for start in range(0, num_parts, PARTS):
        parts = start + tl.arange(0, PARTS)
        counts = tl.minimum(num_rows - parts.to(tl.int64) * rows_per_part, rows_per_part).to(tl.float64)
        mask = is_channel[:, None] & (parts < num_parts)[None, :]
        at = channels[:, None] * num_parts + parts[None, :]
        sums += tl.load(means_ptr + at, mask, 0.0) * counts[None, :]
    mean = tl.sum(sums, 1) / num_rows
    squares = tl.zeros((CHANNELS, PARTS), tl.float64)
    for start in range(0, num_parts, PARTS):
        parts = start + tl.arange(0, PARTS)
        counts = tl.minimum(num_rows - parts.to(tl.int64) * rows_per_part, rows_per_part).to(tl.float64)
        mask = is_channel[:, None] & (parts < num_parts)[None, :]
        at = channels[:, None] * num_parts + parts[None, :]
        distance = tl.load(means_ptr + at, mask, 0.0) - mean[:, None]
        between = tl.where(mask, distance * distance * counts[None, :], 0.0)
        squares += tl.load(deviations_ptr + at, mask, 0.0) + between
    variance = tl.sum(squares, 1) / num_rows
    tl.store(mean_ptr + channels, mean, is_channel)
    tl.store(variance_ptr + channels, variance, is_channel)
    tl.store(inverse_std_ptr + channels, 1.0 / tl.sqrt(variance + eps), is_channel)


@triton.jit(do_not_specialize=_COUNTS)
def normalise_kernel(
    z_ptr, residual_ptr, mean_ptr, inverse_std_ptr, gamma_ptr, beta_ptr, feature_ptr, sums_ptr,
    num_channels, height, width, out_height, out_width, pixels_per_chunk, num_chunks,
    FIRST: tl.constexpr, POOL: tl.constexpr, RESIDUAL: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """The feature, and the sums over each chunk of x_hat of what passed the ReLU, of 1, and with RESIDUAL of y."""
    STEP: tl.constexpr = 2 if POOL else 1
    image, i_chunk, channels = _place(num_channels, num_chunks, BLOCK_C)
    is_channel = channels < num_channels
    mean, rest, inverse_std = _normaliser(mean_ptr, inverse_std_ptr, channels, is_channel)
    gamma = _parameter(gamma_ptr, channels, is_channel)
    beta = _parameter(beta_ptr, channels, is_channel)
    num_pixels = out_height * out_width
    z_ptr += image * height * width * num_channels
    feature_ptr += image * num_pixels * num_channels
    hats = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    counts = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    values = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    first = i_chunk * pixels_per_chunk
    for start in tl.range(first, tl.minimum(first + pixels_per_chunk, num_pixels), BLOCK_P, num_stages=_NUM_STAGES):
        pixels = start + tl.arange(0, BLOCK_P)
        mask = (pixels < num_pixels)[:, None] & is_channel[None, :]
        source = (
            (pixels // out_width * STEP).to(tl.int64) * width + pixels % out_width * STEP
            if POOL
            else pixels.to(tl.int64)
        )
        pointers = z_ptr + source[:, None] * num_channels + channels[None, :]
        window = _window(pointers, mask, mask, mask, width * num_channels, num_channels, FIRST, POOL)
        y, x_hat, _ = _produce(window, mean, rest, inverse_std, gamma, beta, POOL)
        offsets = pixels.to(tl.int64)[:, None] * num_channels + channels[None, :]
        if RESIDUAL:
            residual = tl.load(residual_ptr + image * num_pixels * num_channels + offsets, mask, 0.0)
            y += residual.to(tl.float32)
        if not FIRST:
            # As rounded, because a backward with a residual asks the stored feature what passed.
            y = tl.where(y < 0, 0.0, y).to(feature_ptr.dtype.element_ty)
            has_passed = mask & ~(y.to(tl.float32) <= 0)
            counts += tl.where(has_passed, 1.0, 0.0)
            hats += tl.where(has_passed, x_hat, 0.0)
            if RESIDUAL:
                values += tl.where(mask, y.to(tl.float32), 0.0)
        else:
            hats += tl.where(mask, x_hat, 0.0)
        tl.store(feature_ptr + offsets, y, mask)
    KINDS: tl.constexpr = 1 if FIRST else (3 if RESIDUAL else 2)
    sums_ptr += (image * num_chunks + i_chunk) * KINDS * num_channels + channels
    tl.store(sums_ptr, tl.sum(hats, 0), is_channel)
    if not FIRST:
        tl.store(sums_ptr + num_channels, tl.sum(counts, 0), is_channel)
    if RESIDUAL:
        tl.store(sums_ptr + 2 * num_channels, tl.sum(values, 0), is_channel)


@triton.jit(do_not_specialize=_COUNTS)
def average_kernel(
    sums_ptr, gamma_ptr, beta_ptr, average_ptr, average_hat_ptr, passed_ptr, num_channels, num_chunks, num_pixels,
    FIRST: tl.constexpr, RESIDUAL: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Averages per image from the sums of its chunks."""
    image, _, channels = _place(num_channels, 1, BLOCK_C)
    is_channel = channels < num_channels
    KINDS: tl.constexpr = 1 if FIRST else (3 if RESIDUAL else 2)
    sums_ptr += image * num_chunks * KINDS * num_channels + channels
    hat = tl.zeros((BLOCK_C,), tl.float32)
    count = tl.zeros((BLOCK_C,), tl.float32)
    value = tl.zeros((BLOCK_C,), tl.float32)
    for i_chunk in range(num_chunks):
        chunk_ptr = sums_ptr + i_chunk * KINDS * num_channels
        hat += tl.load(chunk_ptr, is_channel, 0.0)
        if not FIRST:
            count += tl.load(chunk_ptr + num_channels, is_channel, 0.0)
        if RESIDUAL:
            value += tl.load(chunk_ptr + 2 * num_channels, is_channel, 0.0)
    hat /= num_pixels
    passed = tl.full((BLOCK_C,), 1.0, tl.float32) if FIRST else count / num_pixels
    if RESIDUAL:
        average = value / num_pixels
    else:
        gamma = tl.load(gamma_ptr + channels, is_channel, 0.0).to(tl.float32)
        beta = tl.load(beta_ptr + channels, is_channel, 0.0).to(tl.float32)
        average = hat * gamma + passed * beta
    offsets = image * num_channels + channels
    tl.store(average_ptr + offsets, average, is_channel)
    tl.store(average_hat_ptr + offsets, hat, is_channel)
    tl.store(passed_ptr + offsets, passed, is_channel)


@triton.jit(do_not_specialize=_COUNTS)
def reduce_kernel(
    grad_ptr, z_ptr, feature_ptr, mean_ptr, inverse_std_ptr, gamma_ptr, beta_ptr, sums_ptr, products_ptr,
    num_shared, num_channels, height, width, out_height, out_width, pixels_per_chunk, num_chunks, num_parts,
    stride_n, stride_c, stride_h, stride_w,
    FIRST: tl.constexpr, POOL: tl.constexpr, RESIDUAL: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Sums of the deeper path's gradient, and of it times x_hat, over each chunk of each image: (num_shared, parts)."""
    STEP: tl.constexpr = 2 if POOL else 1
    image, i_chunk, channels = _place(num_shared, num_chunks, BLOCK_C)
    is_channel = channels < num_shared
    mean, rest, inverse_std = _normaliser(mean_ptr, inverse_std_ptr, channels, is_channel)
    gamma = _parameter(gamma_ptr, channels, is_channel)
    beta = _parameter(beta_ptr, channels, is_channel)
    num_pixels = out_height * out_width
    z_ptr += image * height * width * num_channels
    grad_ptr += image * stride_n
    sums = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    products = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    first = i_chunk * pixels_per_chunk
    for start in tl.range(first, tl.minimum(first + pixels_per_chunk, num_pixels), BLOCK_P, num_stages=_NUM_STAGES):
        pixels = start + tl.arange(0, BLOCK_P)
        mask = (pixels < num_pixels)[:, None] & is_channel[None, :]
        row, column = (pixels // out_width).to(tl.int64), (pixels % out_width).to(tl.int64)
        source = (row * width + column) * STEP
        pointers = z_ptr + source[:, None] * num_channels + channels[None, :]
        window = _window(pointers, mask, mask, mask, width * num_channels, num_channels, FIRST, POOL)
        y, x_hat, _ = _produce(window, mean, rest, inverse_std, gamma, beta, POOL)
        offsets = (row * stride_h + column * stride_w)[:, None] + channels.to(tl.int64)[None, :] * stride_c
        grad = tl.load(grad_ptr + offsets, mask, 0.0).to(tl.float32)
        if RESIDUAL:
            at = (image * num_pixels + pixels)[:, None] * num_channels + channels[None, :]
            y = tl.load(feature_ptr + at, mask, 0.0).to(tl.float32)
        if not FIRST:
            grad = tl.where(y.to(z_ptr.dtype.element_ty).to(tl.float32) <= 0, 0.0, grad)
        sums += grad
        products += grad * tl.where(mask, x_hat, 0.0)
    parts = channels.to(tl.int64) * num_parts + image * num_chunks + i_chunk
    tl.store(sums_ptr + parts, tl.sum(sums, 0), is_channel)
    tl.store(products_ptr + parts, tl.sum(products, 0), is_channel)


@triton.jit(do_not_specialize=_COUNTS)
def merge_gradients_kernel(
    sums_ptr, products_ptr, grad_average_ptr, average_hat_ptr, passed_ptr,
    grad_gamma_ptr, grad_beta_ptr, slope_ptr, offset_ptr,
    num_shared, num_channels, num_parts, num_images, num_rows, stride_n, stride_c,
    TRAINING: tl.constexpr, CHANNELS: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Parameter gradients of some channels, and what the statistics send back to each pixel: offset + x_hat * slope."""
    channels = (tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)).to(tl.int64)
    is_channel = channels < num_channels
    sums = tl.zeros((CHANNELS, PARTS), tl.float64)
    products = tl.zeros((CHANNELS, PARTS), tl.float64)
    for start in range(0, num_parts, PARTS):
        parts = start + tl.arange(0, PARTS)
        mask = (channels < num_shared)[:, None] & (parts < num_parts)[None, :]
        at = channels[:, None] * num_parts + parts[None, :]
        sums += tl.load(sums_ptr + at, mask, 0.0).to(tl.float64)
        products += tl.load(products_ptr + at, mask, 0.0).to(tl.float64)
    for start in range(0, num_images, PARTS):
        images = (start + tl.arange(0, PARTS)).to(tl.int64)
        mask = is_channel[:, None] & (images < num_images)[None, :]
        grads = grad_average_ptr + channels[:, None] * stride_c + images[None, :] * stride_n
        grad = tl.load(grads, mask, 0.0).to(tl.float64)
        at = images[None, :] * num_channels + channels[:, None]
        sums += grad * tl.load(passed_ptr + at, mask, 0.0)
        products += grad * tl.load(average_hat_ptr + at, mask, 0.0)
    grad_beta = tl.sum(sums, 1)
    grad_gamma = tl.sum(products, 1)
    tl.store(grad_beta_ptr + channels, grad_beta, is_channel)
    tl.store(grad_gamma_ptr + channels, grad_gamma, is_channel)
    # In eval mode the statistics are constants, and nothing flows through them.
    count = num_rows if TRAINING else float("inf")
    tl.store(offset_ptr + channels, grad_beta / count, is_channel)
    tl.store(slope_ptr + channels, grad_gamma / count, is_channel)


@triton.jit(do_not_specialize=_COUNTS)
def gradient_kernel(
    grad_ptr, grad_average_ptr, z_ptr, feature_ptr, mean_ptr, inverse_std_ptr, gamma_ptr, beta_ptr, slope_ptr,
    offset_ptr, grad_z_ptr, grad_residual_ptr,
    num_shared, num_channels, height, width, out_height, out_width, pixels_per_chunk, num_chunks,
    stride_n, stride_c, stride_h, stride_w, stride_average_n, stride_average_c,
    FIRST: tl.constexpr, POOL: tl.constexpr, RESIDUAL: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """grad_z = gamma * inverse_std * (grad_y - offset - x_hat * slope), times [z > 0] with FIRST.

    grad_y is, at the pixel that survived, the deeper path's gradient plus the image's exit gradient. With POOL a
    "pixel" below is a window; those that an odd size cuts off have no survivor, yet they are part of the statistics.
    """
    STEP: tl.constexpr = 2 if POOL else 1
    image, i_chunk, channels = _place(num_channels, num_chunks, BLOCK_C)
    is_channel = channels < num_channels
    mean, rest, inverse_std = _normaliser(mean_ptr, inverse_std_ptr, channels, is_channel)
    gamma = _parameter(gamma_ptr, channels, is_channel)
    beta = _parameter(beta_ptr, channels, is_channel)
    # grad_z = scale * grad_y - drift - (r - mean) * pull
    scale = gamma * inverse_std
    slope = _parameter(slope_ptr, channels, is_channel)
    drift = scale * (_parameter(offset_ptr, channels, is_channel) - rest * slope)
    pull = scale * inverse_std * slope
    averages = image * stride_average_n + channels.to(tl.int64) * stride_average_c
    exit = tl.load(grad_average_ptr + averages, is_channel, 0.0).to(tl.float32) / (out_height * out_width)
    z_ptr += image * height * width * num_channels
    grad_z_ptr += image * height * width * num_channels
    grad_ptr += image * stride_n
    across = tl.cdiv(width, STEP)
    num_pixels = tl.cdiv(height, STEP) * across
    first = i_chunk * pixels_per_chunk
    for start in tl.range(first, tl.minimum(first + pixels_per_chunk, num_pixels), BLOCK_P, num_stages=_NUM_STAGES):
        pixels = start + tl.arange(0, BLOCK_P)
        row, column = (pixels // across).to(tl.int64), (pixels % across).to(tl.int64)
        is_whole = (row < out_height) & (column < out_width)
        mask = is_whole[:, None] & is_channel[None, :]
        offsets = (row * stride_h + column * stride_w)[:, None] + channels.to(tl.int64)[None, :] * stride_c
        is_shared = is_whole[:, None] & (channels < num_shared)[None, :]
        grad = exit[None, :] + tl.load(grad_ptr + offsets, is_shared, 0.0).to(tl.float32)
        at = (row * width + column)[:, None] * (STEP * num_channels) + channels[None, :]
        has_right, has_below = (column * STEP + 1 < width)[:, None], (row * STEP + 1 < height)[:, None]
        inside = (pixels < num_pixels)[:, None] & is_channel[None, :]
        window = _window(z_ptr + at, inside, has_right, has_below, width * num_channels, num_channels, FIRST, POOL)
        y, _, position = _produce(window, mean, rest, inverse_std, gamma, beta, POOL)
        if RESIDUAL:
            y = tl.load(feature_ptr + image * height * width * num_channels + at, mask, 0.0).to(tl.float32)
        if not FIRST:
            grad = tl.where(y.to(z_ptr.dtype.element_ty).to(tl.float32) <= 0, 0.0, grad)
        if RESIDUAL:
            tl.store(grad_residual_ptr + image * height * width * num_channels + at, grad, mask)
        grad = tl.where(mask, grad, 0.0)
        for index in tl.static_range(STEP * STEP):
            r = window[index]
            own = tl.where(position == index, grad, 0.0)
            result = scale * own - drift - (r - mean) * pull
            if FIRST:
                result = tl.where(r <= 0, 0.0, result)
            here = at + (index // 2) * width * num_channels + (index % 2) * num_channels
            is_inside = inside
            if index // 2:
                is_inside &= has_below
            if index % 2:
                is_inside &= has_right
            tl.store(grad_z_ptr + here, result, is_inside)
