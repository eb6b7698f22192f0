"""The attainable limit of a training step: what its arithmetic and its data would take at the machine's own best speed.

Counted from shapes alone, whoever computes them (on the meta device nobody does), so that it says how far any
implementation is from what could be:

- arithmetic: the multiply-adds of each convolution and matrix product, of a `dfs` step those that are left after
  slicing; of 3x3 convolutions with stride 1 those of Winograd's F(4x4, 3x3) where that is faster;
- data: operands and result of each product once, each parameter, gradient and optimizer state once, and of what lies
  between products only the tensors that several of them read: what one alone reads can be made while it reads.

What else a step does (norms, activations, losses, Winograd's transforms) is taken to be free, so 1.0 is out of reach.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import conv_flop_count

from dfs_engine.benchmarks import machine
from dfs_engine.benchmarks.measure import TOTAL, Phases, Times

# Winograd's F(4x4, 3x3) multiplies 36 numbers for a tile of 4 x 4 outputs. With fewer channels it is not worth it.
_TILE, _TILE_PRODUCTS, _WINOGRAD_CHANNELS = 4, 36, 16
_aten = torch.ops.aten


class Product(NamedTuple):
    """A convolution or matrix product.

    Attributes:
        flops: of the definition; a multiply-add is two.
        winograd_flops: of Winograd's algorithm; None where it does not apply.
        elements: numbers in the operands and in the result.
    """

    flops: int
    winograd_flops: int | None
    elements: int


class Speeds(NamedTuple):
    """What a machine reaches: products in float32 and in the step's dtype (FLOP/s), a copy's reads and writes (B/s)."""

    products_fp32: float
    products: float
    copy: float


@dataclass(slots=True)
class Work:
    """All that a training step cannot do without.

    Attributes:
        products: in order.
        shared: numbers in tensors between products that several products read.
        parameters: numbers in the parameters; as many in their gradients.
        optimizer_states: numbers that the optimizer keeps for each of them.
    """

    products: list[Product] = field(default_factory=list)
    shared: int = 0
    parameters: int = 0
    optimizer_states: int = 1

    @property
    def flops(self) -> int:
        """Of the products as defined."""
        return sum(product.flops for product in self.products)

    def num_bytes(self, dtype: torch.dtype) -> int:
        """Read and written: activations and products in `dtype`, parameters and what belongs to them in float32."""
        activations = sum(product.elements for product in self.products) + self.shared
        return activations * dtype.itemsize + self.parameters * (2 + self.optimizer_states) * torch.float32.itemsize

    def seconds(self, dtype: torch.dtype, speeds: Speeds) -> float:
        """The attainable limit. Winograd's products are taken in float32, in which its transforms are exact enough."""

        def arithmetic(product: Product) -> float:
            direct = product.flops / speeds.products
            if product.winograd_flops is None or dtype == torch.float64:
                return direct
            return min(direct, product.winograd_flops / speeds.products_fp32)

        return sum(map(arithmetic, self.products)) + self.num_bytes(dtype) / speeds.copy


def count_work(model: nn.Module, input: Tensor, optimizer_states: int = 1) -> Work:
    """Of one training step of all exits.

    Args:
        model: on the meta device, by the `aten` backend; returns a list of every exit's logits.
        input: what it takes, on the meta device.
        optimizer_states: numbers that the optimizer keeps for each parameter: 1 of SGD's momentum, 2 of Adam.
    """
    with sdpa_kernel(SDPBackend.MATH), _Recorder(model) as recorder:
        torch.stack([logits.square().sum() for logits in model(input)]).sum().backward()
    return Work(
        recorder.products,
        shared=recorder.shared(input),
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        optimizer_states=optimizer_states,
    )


class _Recorder(TorchDispatchMode):
    """Notes products, and which tensors are read by several."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.products: list[Product] = []
        # By storage, which views share: how often products read it, and one of its tensors, which keeps it alive.
        self._read: dict[int, tuple[int, Tensor]] = {}
        self._made = {_storage(parameter) for parameter in model.parameters()}
        self._results: list[Tensor] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        count = _COUNTS.get(func.overloadpacket)
        for activations, weights, made, flops, winograd_flops in count(result, *args) if count else ():
            elements = sum(one.numel() for one in (*activations, *weights, made))
            self.products.append(Product(flops, winograd_flops, elements))
            self._made.add(_storage(made))
            self._results.append(made)
            for operand in activations:
                times, _ = self._read.get(_storage(operand), (0, operand))
                self._read[_storage(operand)] = times + 1, operand
        return result

    def shared(self, input: Tensor) -> int:
        given = self._made | {_storage(input)}
        # Of views into one storage the products read different parts, or all of it: the storage is what is written.
        return sum(
            operand.untyped_storage().nbytes() // operand.element_size()
            for storage, (times, operand) in self._read.items()
            if times > 1 and storage not in given
        )


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


# Operands, of which the second ones are weights, or what a layer made of them; result, FLOPs, Winograd's FLOPs.
_Counted = tuple[tuple[Tensor, ...], tuple[Tensor, ...], Tensor, int, int | None]


def _product(left: Tensor, right: Tensor, made: Tensor) -> _Counted:
    return (left, right), (), made, 2 * left.numel() * right.size(-1), None


def _count_mm(made: Tensor, left: Tensor, right: Tensor, *_: Any) -> Iterator[_Counted]:
    yield _product(left, right, made)


def _count_addmm(made: Tensor, _bias: Tensor, left: Tensor, right: Tensor, *_: Any) -> Iterator[_Counted]:
    yield _product(left, right, made)


def _count_convolution(made: Tensor, input: Tensor, weight: Tensor, _bias: Any, *geometry: Any) -> Iterator[_Counted]:
    yield (input,), (weight,), made, *_convolution_flops(input, weight, made, geometry)


def _count_convolution_backward(
    made: tuple[Tensor, ...], grad: Tensor, input: Tensor, weight: Tensor, _bias: Any, *geometry_and_mask: Any
) -> Iterator[_Counted]:
    *geometry, mask = geometry_and_mask
    flops = _convolution_flops(input, weight, grad, geometry)
    if mask[0]:
        yield (grad,), (weight,), made[0], *flops
    if mask[1]:
        yield (grad, input), (), made[1], *flops


def _convolution_flops(input: Tensor, weight: Tensor, output: Tensor, geometry: Any) -> tuple[int, int | None]:
    """By definition and by Winograd; both are the same in all three passes."""
    stride, _, dilation, transposed, _, groups = geometry
    flops = conv_flop_count(list(input.shape), list(weight.shape), list(output.shape), transposed)
    out_channels, in_channels, *kernel = weight.shape
    is_plain = {*stride, *dilation, groups} == {1} and not transposed and kernel == [3, 3]
    if not is_plain or min(out_channels, in_channels) < _WINOGRAD_CHANNELS:
        return flops, None
    num_images, _, height, width = output.shape
    tiles = num_images * -(-height // _TILE) * -(-width // _TILE)
    return flops, 2 * tiles * _TILE_PRODUCTS * in_channels * out_channels


_COUNTS: dict[Any, Callable[..., Iterator[_Counted]]] = {
    _aten.mm: _count_mm,
    _aten.bmm: _count_mm,
    _aten.addmm: _count_addmm,
    _aten.convolution: _count_convolution,
    _aten.convolution_backward: _count_convolution_backward,
}


class Gauges:
    """Short runs at the machine's best speed, to be timed in turns with what is held against it."""

    def __init__(self, dtype: torch.dtype, device: str = "cpu") -> None:
        self.dtype = dtype
        is_cpu = torch.device(device).type == "cpu"
        self._gauges = {
            f"gauge: {name} {each}": gauge  # the name of no step
            for each in dict.fromkeys((torch.float32, dtype))
            for name, gauge in machine.product_gauges(each, device, 1024 if is_cpu else 8192).items()
        }
        self._gauges["gauge: copy"] = machine.copy_gauge(device, 2**26 if is_cpu else 2**29)
        self.calls: dict[str, Phases] = {name: {"call": gauge.call} for name, gauge in self._gauges.items()}

    def speeds(self, times: Times) -> Speeds:
        """From the fastest of the timed runs; those of gauges leave `times`."""
        reached = {name: gauge.units / min(times.pop(name)[TOTAL]) for name, gauge in self._gauges.items()}

        def products(dtype: torch.dtype) -> float:
            return max(speed for name, speed in reached.items() if name.endswith(f" {dtype}"))

        return Speeds(products(torch.float32), products(self.dtype), reached["gauge: copy"])
