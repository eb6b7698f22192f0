"""What gpu_ops.py and tune.py measure: every op's calls on one shape, and what they must give."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dfs_engine import reference
from dfs_engine.benchmarks.op_cases import stock_block
from dfs_engine.benchmarks.shapes import BlockShape, ConvShape, LinearShape, Shape
from dfs_engine.kernels import config
from dfs_engine.ops import norm_act, norm_linear
from dfs_engine.ops.conv2d import aten_grad_input as conv_grad_input
from dfs_engine.ops.conv2d import aten_grad_weight as conv_grad_weight
from dfs_engine.ops.linear import aten_grad_input as linear_grad_input
from dfs_engine.ops.linear import aten_grad_weight as linear_grad_weight
from dfs_engine.partition import Partition
from dfs_engine.runtime.choice import norm_act_table
from dfs_engine.validate.tolerances import TOLERANCES, Tolerance, compare

BETA = 0.5
DEVICE = "cuda"
_OPS = torch.ops.dfs_engine
_NOISE_MARGIN = 4
# A rounding may make two pixels of a pool's window equal, in stock kernels as here, and send a gradient elsewhere.
_FLIPS = 1e-3


class Way(NamedTuple):
    """How an op is computed; as the CSV's columns."""

    variant: str
    backend_used: str
    mode: str = "eager"


DENSE, COMPILED = Way("dense", "stock"), Way("dense", "stock", "compile")
ATEN, TRITON = Way("dfs", "aten"), Way("dfs", "triton")
# By `Way`, or by whatever else is to be told apart.
Calls = dict[Any, Callable[[], Any]]


class Launch(NamedTuple):
    """What a tuned table calls one metric of one shape: the arguments of `kernels.config.candidates`, but the dtype."""

    op: str
    m: int
    n: int
    k: int
    geometry: str = ""

    def key(self, dtype: torch.dtype) -> str:
        return config.table_key(self.op, self.m, self.n, self.k, dtype, self.geometry)


def launches(shape: Shape, beta: float = BETA) -> dict[tuple[str, str], Launch]:
    """(op, metric) of a shape's contests -> their launch, of those that a table can have."""
    live = Partition(shape.channels, beta).num_shared
    if isinstance(shape, BlockShape):
        pixels = shape.batch * shape.size**2
        return {("norm_act", "step"): Launch(norm_act_table(shape.pool), pixels, shape.channels, 1)}
    if isinstance(shape, LinearShape):
        rows = shape.batch * shape.tokens
        found = {
            ("linear", "grad_input"): Launch("linear_grad_input", rows, live, shape.out_channels),
            ("linear", "grad_weight"): Launch("linear_grad_weight", shape.out_channels, shape.channels, rows),
        }
        if _is_normed(shape):
            normed = Launch("norm_linear_grad_input", rows, live, shape.out_channels)
            found["norm_linear", "grad_input"] = normed
        return found
    if shape.groups > 1:
        return {}
    pixels, out_pixels, taps = shape.batch * shape.size**2, shape.batch * shape.out_size**2, shape.kernel**2
    geometry = config.convolution(*((size, size) for size in (shape.kernel, shape.stride, 1)))
    return {
        ("conv2d", "grad_input"): Launch("conv2d_grad_input", pixels, live, shape.out_channels * taps, geometry),
        ("conv2d", "grad_weight"): Launch(
            "conv2d_grad_weight", shape.out_channels, shape.channels * taps, out_pixels, geometry
        ),
    }


def _is_normed(shape: LinearShape) -> bool:
    """Whether a LayerNorm precedes the layer; those of post-norm models read the feature itself."""
    return shape.family.startswith("vit")


@dataclass(slots=True)
class Contest:
    """The ways to compute one metric of an op on one shape, and what they must give.

    Attributes:
        exact: the results in float64; None where there is nothing to compare.
        results: the tensors to compare, from what a call returns.
        least: bound of their RMS ratio, unless the dtype's or stock's is larger.
        num_bytes: what a call must move; 0 where that is not told.
    """

    op: str
    metric: str
    num_live: int
    calls: Calls
    exact: Callable[[], list[Tensor]] | None = None
    results: Callable[[Any], list[Tensor]] = list
    least: float = 0.0
    num_bytes: int = 0
    flops: dict[Way, int] = field(default_factory=dict)

    def check(self) -> None:
        """Every way is about as near to float64 as the stock kernels are.

        Raises:
            RuntimeError: one is not.
        """
        if self.exact is None:
            return
        expected = self.exact()
        found = {way: self.results(call()) for way, call in self.calls.items()}
        stock = found[ATEN]
        for way, values in found.items():
            for index, (value, truth) in enumerate(zip(values, expected, strict=True)):
                noise = compare("stock", stock[index], truth).rms_ratio
                bound = max(TOLERANCES[value.dtype].rms_ratio, _NOISE_MARGIN * noise, self.least)
                comparison = compare(f"{self.op} {self.metric} {index}", value, truth, Tolerance(float("inf"), bound))
                if not comparison.ok:
                    raise RuntimeError(f"{way}: {comparison}. It was not timed; run `dfs validate` to find the op.")


def contests(shape: Shape, dtype: torch.dtype, beta: float = BETA) -> Iterator[Contest]:
    """Everything that is measured on one shape, on operands of its own; `beta` of the channels are live."""
    live = Partition(shape.channels, beta).num_shared
    if isinstance(shape, ConvShape):
        yield from _conv_contests(shape, dtype, live)
    elif isinstance(shape, LinearShape):
        yield from _linear_contests(shape, dtype, live)
        if _is_normed(shape):
            yield _norm_linear_contest(shape, dtype, live)
    else:
        yield from _block_contests(shape, dtype, live)


def _random(*size: int, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
    tensor = (torch.randn(size, device=DEVICE) * scale).to(dtype)
    return tensor.contiguous(memory_format=torch.channels_last) if tensor.dim() == 4 else tensor


def _conv_contests(shape: ConvShape, dtype: torch.dtype, live: int) -> Iterator[Contest]:
    fan_in = shape.channels // shape.groups
    input = _random(shape.batch, shape.channels, shape.size, shape.size, dtype=dtype)
    grad = _random(shape.batch, shape.out_channels, shape.out_size, shape.out_size, dtype=dtype)
    weight = _random(shape.out_channels, fan_in, shape.kernel, shape.kernel, dtype=dtype, scale=0.1)
    geometry: tuple[Any, ...] = ([shape.stride] * 2, [shape.kernel // 2] * 2, [1, 1], shape.groups)

    def grad_input(compute: Any, stop: int, wide: bool = False) -> Tensor:
        given = (grad.double(), weight.double()) if wide else (grad, weight)
        return compute(*given, list(input.shape), *geometry, 0, stop, True)

    def grad_weight(compute: Any, wide: bool = False) -> list[Tensor]:
        given = (grad.double(), input.double()) if wide else (grad, input)
        return [compute(*given, list(weight.shape), *geometry, False)[0]]

    yield _grad_input_contest(shape, live, conv_grad_input, _OPS.conv2d_grad_input, grad_input, 1)
    yield _grad_weight_contest(shape, conv_grad_weight, _OPS.conv2d_grad_weight, grad_weight)


def _linear_contests(shape: LinearShape, dtype: torch.dtype, live: int) -> Iterator[Contest]:
    input = _random(shape.batch, shape.tokens, shape.channels, dtype=dtype)
    grad = _random(shape.batch, shape.tokens, shape.out_channels, dtype=dtype)
    weight = _random(shape.out_channels, shape.channels, dtype=dtype, scale=0.1)

    def grad_input(compute: Any, stop: int, wide: bool = False) -> Tensor:
        given = (grad.double(), weight.double()) if wide else (grad, weight)
        return compute(*given, 0, stop)

    def grad_weight(compute: Any, wide: bool = False) -> list[Tensor]:
        given = (grad.double(), input.double()) if wide else (grad, input)
        return list(compute(*given, True))

    yield _grad_input_contest(shape, live, linear_grad_input, _OPS.linear_grad_input, grad_input, -1)
    yield _grad_weight_contest(shape, linear_grad_weight, _OPS.linear_grad_weight, grad_weight)


def _grad_input_contest(
    shape: ConvShape | LinearShape, live: int, aten: Any, triton: Any, compute: Callable[..., Tensor], dim: int
) -> Contest:
    """Stock's whole gradient, and its live slice by `aten` and by `triton`, which `compute` calls."""
    return Contest(
        shape.op,
        "grad_input",
        live,
        {
            DENSE: lambda: compute(aten, shape.channels),
            ATEN: lambda: compute(aten, live),
            TRITON: lambda: compute(triton, live),
        },
        lambda: [compute(aten, live, wide=True)],
        lambda result: [result.narrow(dim, 0, live)],
        flops=_flops(shape, live),
    )


def _grad_weight_contest(
    shape: ConvShape | LinearShape, aten: Any, triton: Any, compute: Callable[..., list[Tensor]]
) -> Contest:
    return Contest(
        shape.op,
        "grad_weight",
        shape.channels,
        {ATEN: lambda: compute(aten), TRITON: lambda: compute(triton)},
        lambda: compute(aten, wide=True),
        flops=_flops(shape, shape.channels),
    )


def _flops(shape: ConvShape | LinearShape, live: int) -> dict[Way, int]:
    sliced = shape.flops * live // shape.channels
    return {DENSE: shape.flops, ATEN: sliced, TRITON: sliced}


def _norm_linear_contest(shape: LinearShape, dtype: torch.dtype, live: int) -> Contest:
    """As under autocast: the normalisation and its input in float32."""
    input = _random(shape.batch, shape.tokens, shape.channels, dtype=torch.float32)
    gain, shift = (_random(shape.channels, dtype=torch.float32) for _ in range(2))
    grad = _random(shape.batch, shape.tokens, shape.out_channels, dtype=dtype)
    weight = _random(shape.out_channels, shape.channels, dtype=dtype, scale=0.1)
    normalized, mean, rstd = torch.native_layer_norm(input, (shape.channels,), gain, shift, 1e-5)
    output = F.linear(normalized.to(dtype), weight)

    def dense() -> Tensor:
        wide = linear_grad_input(grad, weight, 0, shape.channels).float()
        saved = (input, [shape.channels], mean, rstd, gain, shift)
        return torch.ops.aten.native_layer_norm_backward(wide, *saved, [True, False, False])[0]

    def sliced(compute: Any, stop: int, wide: bool = False) -> Tensor:
        given = (grad, output, input, mean, rstd, gain, shift, weight)
        return compute(*(tensor.double() if wide else tensor for tensor in given), None, 0, stop)

    kernels = norm_linear.aten_grad_input, _OPS.norm_linear_grad_input
    contest = _grad_input_contest(shape, live, *kernels, sliced, -1)
    # What it multiplies in is as rounded as the dtype, whatever the result's.
    least = TOLERANCES[dtype].rms_ratio
    return replace(contest, op="norm_linear", calls=contest.calls | {DENSE: dense}, least=least)


def _dense_block(z: Tensor, weight: Tensor, bias: Tensor, pool: bool) -> list[Tensor]:
    feature = stock_block(z, weight, bias, pool, None, None)
    return [feature, feature.mean((2, 3))]


def _block_contests(shape: BlockShape, dtype: torch.dtype, live: int) -> Iterator[Contest]:
    channels, size = shape.channels, shape.size // 2 if shape.pool else shape.size
    z = _random(shape.batch, channels, shape.size, shape.size, dtype=dtype).requires_grad_()
    weight, bias = (_random(channels, dtype=torch.float32).requires_grad_() for _ in range(2))
    leaves = [z, weight, bias]
    options: dict[str, Any] = {"pool": shape.pool, "num_shared": live, "exit_start": live}
    # The average's gradient is as large as that of all its pixels together.
    whole = [
        _random(shape.batch, channels, size, size, dtype=dtype),
        _random(shape.batch, channels, dtype=dtype) * size,
    ]
    shared = whole[0][:, :live].contiguous(memory_format=torch.channels_last)
    narrow = [shared, whole[1][:, live:].contiguous()]

    def of_dense(compute: Any) -> tuple[Tensor, ...]:
        return torch.autograd.grad(compute(*leaves, shape.pool), leaves, whole)

    def of_dfs(backend: str) -> tuple[Tensor, ...]:
        made = norm_act(z, weight, bias, None, None, **options, backend=backend)
        return torch.autograd.grad([made.shared, made.exit], leaves, narrow)

    def exact() -> list[Tensor]:
        wide = [leaf.detach().double().requires_grad_() for leaf in leaves]
        _, first, _, second = reference.norm_act(wide[0], wide[1], wide[2], None, None, **options)
        return list(torch.autograd.grad([first, second], wide, [grad.double() for grad in narrow]))

    fused: Calls = {ATEN: lambda: of_dfs("aten"), TRITON: lambda: of_dfs("triton")}
    Contest("norm_act", "step", live, fused, exact, least=_FLIPS).check()
    # `dense` computes other gradients on purpose, so that only its time can be compared.
    compiled = torch.compile(_dense_block, dynamic=False)
    stock: Calls = {DENSE: lambda: of_dense(_dense_block), COMPILED: lambda: of_dense(compiled)}
    yield Contest("norm_act", "step", live, stock | fused)
    plain = [leaf.detach() for leaf in leaves]
    modes = (shape.pool, True)

    def forward() -> list[Tensor]:
        return _OPS.norm_act(*plain, None, None, None, 1e-5, *modes, True)

    _, _, average_hat, mean, inverse_std, _, passed = forward()
    saved = (*plain, None, average_hat, mean, inverse_std, passed)
    grad_average = F.pad(narrow[1], (live, 0))
    calls = {
        "forward": forward,
        "backward": lambda: _OPS.norm_act_backward(shared, grad_average, *saved, True, *modes),
    }
    # Numbers read and written: z twice in each pass, in the first of the backward's only as far as it is shared.
    outputs = z.numel() // 4 if shape.pool else z.numel()
    moved = {
        "forward": 2 * z.numel() + outputs,
        "backward": 2 * z.numel() + (z.numel() + 2 * outputs) * live // channels,
    }
    for metric, call in calls.items():
        num_bytes = moved[metric] * z.element_size()
        yield Contest("norm_act", metric, live, {TRITON: call}, num_bytes=num_bytes)


def one_pass(dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16)) -> int:
    """Launches every kernel once on small odd shapes, without stock kernels; returns how many results it looked at."""
    results: list[Tensor] = []
    for dtype in dtypes:

        def random(*size: int, dtype: torch.dtype = dtype) -> Tensor:
            tensor = torch.randn(size).to(dtype)
            last = tensor.dim() == 4
            return (tensor.contiguous(memory_format=torch.channels_last) if last else tensor).to(DEVICE)

        grad, input, weight = random(5, 7, 33), random(5, 7, 65), random(33, 65)
        results += [_OPS.linear_grad_input(grad, weight, 17, 50), *_OPS.linear_grad_weight(grad, input, True)]
        mean, rstd = (random(5, 7, 1, dtype=torch.float32) for _ in range(2))
        norm = (random(65), random(65), weight, None)
        results.append(_OPS.norm_linear_grad_input(grad, grad, input, mean, rstd, *norm, 17, 50))
        results += _OPS.norm_linear_grad_weight(grad, input, mean, rstd)
        for stride, kernel, groups in ((1, 3, 1), (2, 3, 1), (1, 1, 1), (2, 1, 1), (1, 3, 3), (2, 3, 33)):
            geometry = ([stride] * 2, [kernel // 2] * 2, [1, 1], groups)
            out = (9 + 2 * (kernel // 2) - kernel) // stride + 1
            input, grad = random(2, 33, 9, 9), random(2, 33, out, out)
            weight = random(33, 33 // groups, kernel, kernel)
            results.append(_OPS.conv2d_grad_input(grad, weight, list(input.shape), *geometry, 0, 17, True))
            results += _OPS.conv2d_grad_weight(grad, input, list(weight.shape), *geometry, True)
        z, gamma, beta = random(3, 65, 9, 7), *(random(65, dtype=torch.float32) for _ in range(2))
        for first, pool, has_residual in ((True, True, False), (True, False, False), (False, False, True)):
            residual = z if has_residual else None
            made = _OPS.norm_act(z, gamma, beta, residual, None, None, 1e-5, pool, first, True)
            feature, average, average_hat, mean, inverse_std, _, passed = made
            saved = (feature if has_residual else None, average_hat, mean, inverse_std, passed)
            modes = (True, pool, first)
            grads = _OPS.norm_act_backward(feature[:, :33], average, z, gamma, beta, *saved, *modes)
            results += [*made, *grads]
    if not all(result.cpu().isfinite().all() for result in results):
        raise RuntimeError("gpu_check --one-pass: expected finite results, got NaN or infinity.")
    return len(results)
