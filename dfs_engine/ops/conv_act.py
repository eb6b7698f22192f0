"""A convolution for evaluation alone, with what follows it in one pass: for weights that do not change any more.

Kernels want a weight in an order of their own. Where it stays as it is, that is made once (`FixedConv`), not in every
call; and without a backward nobody needs what lies between the convolution and the feature.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dfs_engine import reference as oracle
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


class FixedConv:
    """A convolution's numbers and what kernels made of its weight, each when it was first needed.

    Args:
        weight: (out, in / groups, kH, kW); like the others, not to change any more.
        geometry: stride, padding, dilation, groups.
        bias: (out,). scale, shift: (out,), both or neither.

    Raises:
        ValueError: scale without shift.
    """

    def __init__(
        self,
        weight: Tensor,
        geometry: choice.Geometry,
        bias: Tensor | None = None,
        scale: Tensor | None = None,
        shift: Tensor | None = None,
    ) -> None:
        if (scale is None) != (shift is None):
            raise ValueError(f"{NAME}: expected scale and shift together, got one.")
        self.weight, self.geometry, self.bias, self.scale, self.shift = weight, geometry, bias, scale, shift
        self._made: dict[Any, Any] = {}

    def of(self, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
        """Weight and bias, the former in channels_last, as stock convolutions of such images read it.

        The bias without gaps: oneDNN's pointwise convolutions read it as if it had none.
        """
        made = self._made.get(dtype)
        if made is None:  # two threads may both make it, and the same
            weight = self.weight.to(dtype).contiguous(memory_format=torch.channels_last)
            made = self._made[dtype] = weight, None if self.bias is None else self.bias.to(dtype).contiguous()
        return made

    def transformed(self) -> Tensor:
        """The weight for Winograd's kernel, in float32."""
        made = self._made.get("winograd")
        if made is None:
            made = self._made["winograd"] = torch.ops.dfs_engine.winograd_weight(self.weight)
        return made

    def packed(self, image: Tensor) -> Tensor:
        """The weight for oneDNN's kernels of such images: an opaque tensor. Of one image they want another order."""
        key = image.dtype, image.size(0) == 1
        made = self._made.get(key)
        if made is None:
            stride, padding, dilation, groups = self.geometry
            with torch.inference_mode(False):
                weight = self.weight.to(image.dtype, copy=True, memory_format=torch.contiguous_format)
                made = self._made[key] = torch.ops.mkldnn._reorder_convolution_weight(
                    weight, padding, stride, dilation, groups, image.shape
                )
        return made

    def affine(self) -> tuple[Tensor, Tensor]:
        """scale and shift, of ones and zeros if there are none."""
        if self.scale is not None and self.shift is not None:
            return self.scale, self.shift
        return self.standard()[::-1]

    def standard(self) -> tuple[Tensor, Tensor]:
        """A mean of 0 and a variance of 1 per channel."""
        made = self._made.get("standard")
        if made is None:
            zeros = torch.zeros(self.weight.size(0), device=self.weight.device)
            made = self._made["standard"] = zeros, torch.ones_like(zeros)
        return made

    def __deepcopy__(self, memo: dict) -> "FixedConv":
        return FixedConv(*(memo.get(id(each), each) for each in self.__getstate__()))

    def __getstate__(self) -> tuple:
        return self.weight, self.geometry, self.bias, self.scale, self.shift  # the rest is of this process

    def __setstate__(self, state: tuple) -> None:
        self.__init__(*state)  # type: ignore[misc]


def conv_act(
    input: Tensor,
    conv: FixedConv,
    residual: Tensor | None = None,
    *,
    relu: bool = True,
    pool: bool = False,
    averages: bool = False,
    backend: str | None = None,
) -> tuple[Tensor, Tensor | None]:
    """2-D convolution and what follows it, without a gradient.

    Equivalent to: ``y = F.relu(F.conv2d(input, conv.weight, conv.bias, *conv.geometry) + residual)``
    ``y = F.max_pool2d(y * conv.scale + conv.shift, 2); return y, y.mean((2, 3))``, where what is None or False is left
    out, and scale and shift are per channel.

    Args:
        input: (N, in_channels, H, W), of any floating dtype; cast by autocast as for `F.conv2d`.
        residual: of the convolution's shape; without a scale and a pool.
        relu, pool, averages: what else is wanted.
        backend: "aten" or "reference" (stock PyTorch), "cpp" (fp32 and bf16 on the CPU) or one of its kernels,
            "cpp:winograd", "cpp:onednn", "cpp:aten"; None or "auto" picks: on the CPU, in those dtypes, cpp. Triton has
            none.

    Returns:
        (N, out_channels, H', W') in the dtype of input (of autocast, where that is on), and the averages
        (N, out_channels), or None.

    Raises:
        RuntimeError: an input that needs gradient; a requested backend that is not there, or has no kernel for the
            dtype or the shape. ValueError: a residual beside a scale or a pool.
    """
    if residual is not None and (conv.scale is not None or pool):
        raise ValueError(f"{NAME}: expected neither a scale nor a pool beside a residual.")
    if torch.is_grad_enabled() and (input.requires_grad or (residual is not None and residual.requires_grad)):
        raise RuntimeError(
            f"{NAME}: expected an input that needs no gradient, got one that does. Call what `prepare` made under "
            "torch.inference_mode(), or the model that it was made of."
        )
    input, residual = _common.autocast(input, residual)  # type: ignore[assignment]
    used, _, kernel = choice.conv_act_backend(input, backend).partition(":")
    if used == "cpp":
        kernel = kernel or choice.conv_act_kernel(input, conv.weight.shape, conv.geometry, pool)
        backends.record("conv_act_forward", kernel)
    with _common.no_autocast(input.device.type):
        if used == "reference":
            return oracle.conv_act(input, conv, residual, relu=relu, pool=pool, averages=averages)
        if kernel == "winograd":
            scale, shift = conv.affine() if pool else (conv.scale, conv.shift)
            feature, average = torch.ops.dfs_engine.winograd_conv_act.default(
                input, conv.transformed(), conv.weight.size(0), conv.bias, scale, shift, residual, conv.geometry[1],
                relu, pool, averages,
            )  # fmt: skip
            return feature, average if averages else None
        if kernel == "onednn":
            return _onednn(input, conv, residual, relu, pool, averages)
        weight, bias = conv.of(input.dtype)
        output = F.conv2d(input, weight, bias, *conv.geometry)
        return _finish(output, conv, residual, relu, pool, averages)


def _onednn(input, conv, residual, relu, pool, averages) -> tuple[Tensor, Tensor | None]:
    """oneDNN's convolution; a residual and the ReLU are its own, the rest is `norm_act`'s kernel."""
    dtype = input.dtype
    image = input.to(choice.compute_dtype(dtype)).contiguous(memory_format=torch.channels_last)
    stride, padding, dilation, groups = conv.geometry
    given = conv.packed(image), conv.of(image.dtype)[1], padding, stride, dilation, groups
    op = torch.ops.mkldnn._convolution_pointwise
    if residual is not None:
        residual = residual.to(image.dtype).contiguous(memory_format=torch.channels_last)
        output = op.binary(image, residual, *given, "add", None, "relu" if relu else None, [], None)
    elif conv.scale is None and not pool:
        output = op.default(image, *given, "relu" if relu else "none", [], "")
    else:
        output = op.default(image, *given, "none", [], "").to(dtype)
        if not relu:
            return _finish(output, conv, None, False, pool, averages)
        feature, average, *_ = torch.ops.dfs_engine.norm_act.default(
            output, *conv.affine(), None, *conv.standard(), 0.0, pool, True, averages
        )
        return feature, average if averages else None
    output = output.to(dtype)
    return output, output.mean((2, 3)) if averages else None


def _finish(output, conv, residual, relu, pool, averages) -> tuple[Tensor, Tensor | None]:
    """What follows a convolution, by stock operators."""
    output = output if residual is None else output + residual
    output = F.relu(output) if relu else output
    if conv.scale is not None:
        scale, shift = (values.to(output.dtype)[:, None, None] for values in (conv.scale, conv.shift))
        output = torch.addcmul(shift, output, scale)
    output = F.max_pool2d(output, 2) if pool else output
    return output, output.mean((2, 3)) if averages else None
