"""One op on one shape, in every formulation: what `dfs bench ops` times and compares."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dfs_engine.benchmarks.measure import TOTAL, Phases
from dfs_engine.benchmarks.options import LAYOUTS
from dfs_engine.benchmarks.shapes import BlockShape, ConvShape, Shape
from dfs_engine.ops import norm_act, partitioned_conv2d, partitioned_linear
from dfs_engine.partition import Partition
from dfs_engine.reference import live_slice

STOCK_PATHS = ("dense", "detach")
# The op's name in `backend.OPS`.
OP_NAMES = {"conv2d": "partitioned_conv2d", "linear": "partitioned_linear", "norm_act": "norm_act"}


class OpCase(NamedTuple):
    """One way to compute the op. `path` is dense, detach, or a backend; `beta` is None for dense."""

    path: str
    layout: str
    beta: float | None

    def __str__(self) -> str:
        beta = "" if self.beta is None else f"/beta={self.beta:g}"
        return f"{self.path}/{self.layout}{beta}"


@dataclass(frozen=True, slots=True)
class Operands:
    """Tensors of one shape, the same for every case; `parameters`: the weight, and the bias where there is one."""

    shape: Shape
    input: Tensor
    parameters: list[Tensor]
    grads: list[Tensor]

    @classmethod
    def random(cls, shape: Shape, dtype: torch.dtype, seed: int) -> "Operands":
        """Gradients are of a size that keeps bf16 in range."""
        generator = torch.Generator().manual_seed(seed)

        def random(*size: int, scale: float = 1.0) -> Tensor:
            return (torch.randn(size, generator=generator) * scale).to(dtype)

        if isinstance(shape, ConvShape):
            fan_in = shape.channels // shape.groups
            input = random(shape.batch, shape.channels, shape.size, shape.size)
            scale = (fan_in * shape.kernel**2) ** -0.5
            parameters = [random(shape.out_channels, fan_in, shape.kernel, shape.kernel, scale=scale)]
            grads = [random(shape.batch, shape.out_channels, shape.out_size, shape.out_size)]
        elif isinstance(shape, BlockShape):
            size = shape.size // 2 if shape.pool else shape.size
            input = random(shape.batch, shape.channels, shape.size, shape.size)
            # Batch normalisation keeps its parameters in float32, as autocast does.
            held = torch.float64 if dtype == torch.float64 else torch.float32
            parameters = [random(shape.channels).to(held) for _ in range(2)]
            # Of the feature, and of its average, whose gradient is as large as that of all its pixels together.
            grads = [random(shape.batch, shape.channels, size, size), random(shape.batch, shape.channels) * size]
        else:
            input = random(shape.batch, shape.tokens, shape.channels)
            weight = random(shape.out_channels, shape.channels, scale=shape.channels**-0.5)
            parameters = [weight, random(shape.out_channels)]
            grads = [random(shape.batch, shape.tokens, shape.out_channels)]
        return cls(shape, input, parameters, grads)

    def double(self) -> "Operands":
        """The same values in float64."""
        parameters, grads = ([tensor.double() for tensor in tensors] for tensors in (self.parameters, self.grads))
        return Operands(self.shape, self.input.double(), parameters, grads)


class TimedOp:
    """Forward and backward of one case. Leaves are the live input, the weight and the bias."""

    def __init__(self, case: OpCase, operands: Operands) -> None:
        self.case, shape = case, operands.shape
        self.num_live = shape.channels if case.beta is None else Partition(shape.channels, case.beta).num_shared

        def laid_out(tensor: Tensor) -> Tensor:
            layout = LAYOUTS.get(case.layout, torch.contiguous_format)
            return tensor.to(memory_format=layout if tensor.dim() == 4 else torch.contiguous_format).detach()

        self.input, self.grads = laid_out(operands.input), [laid_out(grad) for grad in operands.grads]
        self.parameters = [laid_out(tensor).requires_grad_() for tensor in operands.parameters]
        self.shape = shape
        is_fused = case.path not in STOCK_PATHS and not isinstance(shape, BlockShape)
        # As in a network: the live part is a view of the full feature.
        self.live = self.input.narrow(_channel_dim(shape), 0, self.num_live) if is_fused else self.input
        self.live = self.live.detach().requires_grad_()
        self.leaves = [self.live, *self.parameters]
        self.compute: Callable[[], list[Tensor]] = self._block if isinstance(shape, BlockShape) else self._layer
        if isinstance(shape, BlockShape):
            scale = self.parameters[0].detach()
            self.running = torch.zeros_like(scale), torch.ones_like(scale)
            live = self.num_live
            if case.path not in STOCK_PATHS:  # each reader's gradient reaches its own part alone
                self.grads = [self.grads[0].narrow(1, 0, live), self.grads[1][:, live:].contiguous()]
        self.phases: Phases = {"forward": self.forward, "backward": self.backward}

    @property
    def flops(self) -> dict[str, int]:
        """Of each phase: stock computes the gradient of all input channels, and drops what nobody asked for."""
        full = self.shape.flops
        grad_input = full if self.case.path in STOCK_PATHS else full * self.num_live // self.shape.channels
        backward = full + grad_input
        return {
            "forward": full,
            "backward": backward,
            TOTAL: full + backward,
            "grad_input": grad_input,
            "grad_weight": full,
        }

    def detailed(self) -> Phases:
        """The two gradients one after the other."""
        return {
            "_": self.forward,
            "grad_input": lambda: self._grad([self.live], keep=True),
            "grad_weight": lambda: self._grad(self.parameters),
        }

    def forward(self) -> None:
        self.outputs = self.compute()

    def backward(self) -> None:
        self._grad(self.leaves)

    def results(self) -> dict[str, Tensor]:
        """Output and gradients; of the input's gradient the live part."""
        outputs = self.compute()
        grad_input, *rest = torch.autograd.grad(outputs, self.leaves, self.grads)
        if not isinstance(self.shape, BlockShape):
            grad_input = grad_input.narrow(_channel_dim(self.shape), 0, self.num_live)
        names = ("grad_weight", "grad_bias")
        # The blocks' outputs differ in which channels they hold.
        shown = {} if isinstance(self.shape, BlockShape) else {"output": outputs[0].detach()}
        return shown | {"grad_input": grad_input} | dict(zip(names, rest, strict=False))

    def _grad(self, leaves: list[Tensor], keep: bool = False) -> None:
        torch.autograd.grad(self.outputs, leaves, self.grads, retain_graph=keep)
        if not keep:
            del self.outputs

    def _layer(self) -> list[Tensor]:
        path, shape, live = self.case.path, self.shape, self.num_live
        input = self.live
        if path == "detach":
            input = live_slice(input, 0, live, True, _channel_dim(shape))
        weight, bias = self.parameters[0], self.parameters[1] if len(self.parameters) > 1 else None
        sliced = {"start": 0, "stop": live, "full": self.input, "backend": path}
        if isinstance(shape, ConvShape):
            geometry = (shape.stride, shape.kernel // 2, 1, shape.groups)
            if path in STOCK_PATHS:
                return [F.conv2d(input, weight, bias, *geometry)]
            return [partitioned_conv2d(input, weight, bias, *geometry, **sliced)]  # type: ignore[arg-type]
        if path in STOCK_PATHS:
            return [F.linear(input, weight, bias)]
        return [partitioned_linear(input, weight, bias, **sliced)]  # type: ignore[arg-type]

    def _block(self) -> list[Tensor]:
        assert isinstance(self.shape, BlockShape)
        weight, bias, live = *self.parameters, self.num_live
        if self.case.path not in STOCK_PATHS:
            made = norm_act(
                self.live, weight, bias, *self.running, pool=self.shape.pool, num_shared=live, exit_start=live,
                backend=self.case.path,
            )  # fmt: skip
            return [made.shared, made.exit]
        feature = stock_block(self.live, weight, bias, self.shape.pool, *self.running)
        if self.case.path == "dense":
            return [feature, feature.mean((2, 3))]
        exit = live_slice(feature, live, self.shape.channels, True, 1)
        return [live_slice(feature, 0, live, True, 1), exit.mean((2, 3))]


def stock_block(
    input: Tensor, weight: Tensor, bias: Tensor, pool: bool, mean: Tensor | None, variance: Tensor | None
) -> Tensor:
    """What stock PyTorch makes of a convolution's output; `mean` and `variance`: running ones, to update."""
    feature = F.batch_norm(F.relu(input), mean, variance, weight, bias, training=True)
    return F.max_pool2d(feature, 2) if pool else feature


def _channel_dim(shape: Shape) -> int:
    return 1 if isinstance(shape, ConvShape | BlockShape) else -1
