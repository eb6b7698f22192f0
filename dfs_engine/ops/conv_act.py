"""A convolution for evaluation alone, with what follows it in one pass: for weights that do not change any more.

Kernels want a weight in an order of their own. Where it stays as it is, that is made once (`FixedWeight`), not in every
call; and without a backward nobody needs what lies between the convolution and the feature.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dfs_engine.ops import _common
from dfs_engine.runtime import backend as backends
from dfs_engine.runtime import choice

NAME = "conv_act"


def _fake_weight(weight: Tensor) -> Tensor:
    raise NotImplementedError("winograd_weight: its result depends on the CPU, and is nothing to trace.")


def _fake_conv_act(
    input, weights, out_channels, bias, scale, shift, residual, padding, relu, pool, averages
) -> tuple[Tensor, Tensor]:
    num_images, _, height, width = input.shape
    size = (height + 2 * padding[0] - 2, width + 2 * padding[1] - 2)
    size = (size[0] // 2, size[1] // 2) if pool else size
    feature = input.new_empty((num_images, out_channels, *size)).contiguous(memory_format=torch.channels_last)
    return feature, input.new_empty((num_images if averages else 0, out_channels))


_common.define("winograd_weight", "Tensor weight", "Tensor", fake=_fake_weight)
_common.define(
    "winograd_conv_act",
    "Tensor input, Tensor weights, SymInt out_channels, Tensor? bias, Tensor? scale, Tensor? shift, Tensor? residual, "
    "SymInt[2] padding, bool relu, bool pool, bool averages",
    "(Tensor, Tensor)",
    fake=_fake_conv_act,
)


class FixedWeight:
    """A convolution's weight and what kernels made of it, each when it was first needed.

    Args:
        weight: (out, in / groups, kH, kW), not to change any more.
        geometry: stride, padding, dilation, groups.
    """

    def __init__(self, weight: Tensor, geometry: choice.Geometry) -> None:
        self.weight, self.geometry = weight, geometry
        self._made: dict[Any, Tensor] = {}

    def of(self, dtype: torch.dtype) -> Tensor:
        """In channels_last, as stock convolutions of such images read it."""
        return self._once(dtype, lambda: self.weight.to(dtype).contiguous(memory_format=torch.channels_last))

    def transformed(self) -> Tensor:
        """For Winograd's kernel, in float32."""
        return self._once("winograd", lambda: torch.ops.dfs_engine.winograd_weight(self.weight))

    def packed(self, dtype: torch.dtype) -> Tensor:
        """For oneDNN's kernels: an opaque tensor."""
        stride, padding, dilation, groups = self.geometry

        def pack() -> Tensor:
            weight = self.weight.to(dtype).contiguous()
            return torch.ops.mkldnn._reorder_convolution_weight(weight, padding, stride, dilation, groups)

        return self._once(("onednn", dtype), pack)

    def _once(self, key: Any, make: Any) -> Tensor:
        made = self._made.get(key)
        if made is None:  # two threads may both make it, and the same
            with torch.no_grad(), torch.inference_mode(False):
                made = self._made[key] = make()
        return made

    def __deepcopy__(self, memo: dict) -> "FixedWeight":
        return FixedWeight(memo.get(id(self.weight), self.weight), self.geometry)

    def __getstate__(self) -> tuple:
        return self.weight, self.geometry  # the rest is of this machine, and partly opaque

    def __setstate__(self, state: tuple) -> None:
        self.__init__(*state)  # type: ignore[misc]


def conv_act(
    input: Tensor,
    weight: FixedWeight,
    bias: Tensor | None = None,
    *,
    residual: Tensor | None = None,
    relu: bool = True,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    pool: bool = False,
    averages: bool = False,
    backend: str | None = None,
) -> tuple[Tensor, Tensor | None]:
    """2-D convolution and what follows it, without a gradient.

    Equivalent to: ``y = F.relu(F.conv2d(input, weight.weight, bias, *weight.geometry) + residual) * scale + shift;``
    ``y = F.max_pool2d(y, 2); return y, y.mean((2, 3))``, where what is None or False is left out, and scale and shift
    are per channel.

    Args:
        input: (N, in_channels, H, W), of any floating dtype; cast by autocast as for `F.conv2d`.
        bias: (out_channels,). scale, shift: (out_channels,), both or neither.
        residual: of the convolution's shape.
        relu, pool, averages: what else is wanted.
        backend: "aten" or "reference" (stock PyTorch), "cpp" (fp32 and bf16 on the CPU) or one of its kernels,
            "cpp:winograd", "cpp:onednn", "cpp:aten"; None or "auto" picks: on the CPU, in those dtypes, cpp.

    Returns:
        (N, out_channels, H', W') in the dtype of input (of autocast, where that is on), and the averages
        (N, out_channels), or None.

    Raises:
        RuntimeError: an input that needs gradient; a requested backend that is not there, or has no kernel for the
            dtype or the shape. ValueError: scale without shift, or one of them beside a residual.
    """
    if (scale is None) != (shift is None) or (residual is not None and (scale is not None or pool)):
        raise ValueError(f"{NAME}: expected scale and shift together, and neither they nor a pool beside a residual.")
    if torch.is_grad_enabled() and (input.requires_grad or (residual is not None and residual.requires_grad)):
        raise RuntimeError(
            f"{NAME}: expected an input that needs no gradient, got one that does. Call what `prepare` made under "
            "torch.inference_mode(), or the model that it was made of."
        )
    input, residual = _common.autocast(input, residual)  # type: ignore[assignment]
    kernel = choice.conv_act_kernel(input, weight.weight.shape, weight.geometry, pool, backend)
    backends.record("conv_act_forward", kernel)
    with _common.no_autocast(input.device.type):
        if kernel == "winograd":
            return _winograd(input, weight, bias, residual, relu, scale, shift, pool, averages)
        if kernel == "onednn":
            return _onednn(input, weight, bias, residual, relu, scale, shift, pool, averages)
        output = F.conv2d(input, weight.of(input.dtype), _cast(bias, input.dtype), *weight.geometry)
        return _finish(output, residual, relu, scale, shift, pool, averages)


def _cast(values: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if values is None else values.to(dtype)


def _winograd(input, weight, bias, residual, relu, scale, shift, pool, averages) -> tuple[Tensor, Tensor | None]:
    if pool and scale is None:
        scale = torch.ones(weight.weight.size(0))
        shift = torch.zeros_like(scale)
    feature, average = torch.ops.dfs_engine.winograd_conv_act(
        input, weight.transformed(), weight.weight.size(0), bias, scale, shift, residual, weight.geometry[1], relu,
        pool, averages,
    )  # fmt: skip
    return feature, average if averages else None


def _onednn(input, weight, bias, residual, relu, scale, shift, pool, averages) -> tuple[Tensor, Tensor | None]:
    """oneDNN's convolution; a residual and the ReLU are its own, the rest is `norm_act`'s kernel."""
    dtype = choice.compute_dtype(input.dtype)
    stride, padding, dilation, groups = weight.geometry
    given = input.to(dtype).contiguous(memory_format=torch.channels_last), weight.packed(dtype), _cast(bias, dtype)
    geometry = padding, stride, dilation, groups
    op = torch.ops.mkldnn._convolution_pointwise
    if residual is not None:
        image, packed, offset = given
        residual = residual.to(dtype).contiguous(memory_format=torch.channels_last)
        ending: tuple = ("relu", [], None) if relu else (None, [], None)
        output = op.binary(image, residual, packed, offset, *geometry, "add", None, *ending)
        return _finish(output.to(input.dtype), None, False, None, None, False, averages)
    if scale is None and not pool:
        output = op(*given, *geometry, "relu" if relu else "none", [], "")
        return _finish(output.to(input.dtype), None, False, None, None, False, averages)
    output = op(*given, *geometry, "none", [], "").to(input.dtype)
    if scale is None or not relu:
        return _finish(output, None, relu, scale, shift, pool, averages)
    mean = torch.zeros(output.size(1))
    variance = torch.ones_like(mean)
    feature, average, *_ = torch.ops.dfs_engine.norm_act(
        output, scale, shift, None, mean, variance, 0.0, pool, True, averages
    )
    return feature, average if averages else None


def _finish(output, residual, relu, scale, shift, pool, averages) -> tuple[Tensor, Tensor | None]:
    """What follows a convolution, by stock operators."""
    output = output if residual is None else output + residual
    output = F.relu(output) if relu else output
    if scale is not None:
        output = torch.addcmul(shift.to(output.dtype)[:, None, None], output, scale.to(output.dtype)[:, None, None])
    output = F.max_pool2d(output, 2) if pool else output
    return output, output.mean((2, 3)) if averages else None
