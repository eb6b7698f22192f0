"""A convolution for evaluation alone, with the normalisation and the ReLU around it folded in."""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dfs_engine.nn.conv2d import PartitionedConv2d
from dfs_engine.nn.norm_act import NormAct2d
from dfs_engine.nn.reading import whole
from dfs_engine.ops.conv_act import FixedConv, conv_act

_HOOKS = ("_forward_hooks", "_forward_pre_hooks")


class Affine(NamedTuple):
    """What a batch normalisation does in evaluation, per channel: y * scale + shift. float64 (C,)."""

    scale: Tensor
    shift: Tensor

    @classmethod
    def of(cls, bn: Any) -> "Affine":
        scale = (bn.running_var.double() + bn.eps).rsqrt()
        scale = scale if bn.weight is None else scale * bn.weight.double()
        shift = -bn.running_mean.double() * scale
        return cls(scale, shift if bn.bias is None else shift + bn.bias.double())


def can_fix(conv: Any, bn: Any = None) -> bool:
    """Whether `ConvAct` can stand for a convolution, and for `bn` too, if one is given.

    Not for a subclass of the stock layers, which may compute something else, nor where a hook waits for a call, nor for
    the depthwise and grouped ones, which have kernels that need no preparing.
    """
    is_conv = type(conv) in (nn.Conv2d, PartitionedConv2d) and not _is_awaited(conv)
    if not is_conv or conv.groups != 1 or conv.padding_mode != "zeros" or isinstance(conv.padding, str):
        return False
    return bn is None or (is_fixed_norm(bn) and not _is_awaited(bn))


def is_fixed_norm(bn: Any) -> bool:
    """Whether a layer is a batch normalisation by running statistics."""
    return type(bn) in (nn.BatchNorm2d, NormAct2d) and bn.running_mean is not None


def _is_awaited(layer: nn.Module) -> bool:
    return any(getattr(layer, name) for name in _HOOKS)


class ConvAct(nn.Module):
    """What a convolution and the layers behind it do in evaluation: (N, in, H, W) -> (N, out, H', W').

    Has copies of all that it reads, as buffers, and no mode: in training mode it does the same. See `ops.conv_act`.

    Args:
        conv: an `nn.Conv2d` that `can_fix`.
        bn: the batch normalisation right behind it, folded into weight and bias.
        relu: whether a ReLU comes next.
        affine: a batch normalisation behind the ReLU.
        pool: whether a 2x2 max pool ends it.
        backend: as `conv_act`.
    """

    takes_slices = True  # see `nn.reading.apply_layer`

    weight: Tensor
    bias: Tensor | None
    scale: Tensor | None
    shift: Tensor | None

    @torch.no_grad()
    def __init__(
        self,
        conv: Any,
        bn: Any = None,
        *,
        relu: bool = False,
        affine: Affine | None = None,
        pool: bool = False,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        weight, bias = conv.weight.double(), None if conv.bias is None else conv.bias.double()
        if isinstance(conv, PartitionedConv2d) and not conv.reference:
            weight = weight.clone()
            weight[:, : conv.start] = weight[:, conv.stop :] = 0
        if bn is not None:
            folded = Affine.of(bn)
            weight = weight * folded.scale[:, None, None, None]
            bias = folded.shift if bias is None else folded.shift + bias * folded.scale
        dtype = conv.weight.dtype
        self.register_buffer("weight", weight.to(dtype, copy=True))
        self.register_buffer("bias", None if bias is None else bias.to(dtype, copy=True))
        # A normalisation's numbers stay in float32 at least beside a weight in half precision.
        wide = torch.promote_types(dtype, torch.float32)
        self.register_buffer("scale", None if affine is None else affine.scale.to(wide))
        self.register_buffer("shift", None if affine is None else affine.shift.to(wide))
        self.geometry = tuple(conv.stride), tuple(conv.padding), tuple(conv.dilation), conv.groups
        self.relu, self.pool, self.backend = relu, pool, backend
        self.train(conv.training)
        self._fixed = self._fix()

    def _fix(self) -> FixedConv:
        return FixedConv(self.weight, self.geometry, self.bias, self.scale, self.shift)

    def forward(self, *input: Any, residual: Tensor | None = None) -> Tensor:
        """Of a reading; `residual`, (N, out, H', W'), is added in front of the ReLU."""
        return self._run(whole(input), residual)[0]

    def with_average(self, *input: Any) -> tuple[Tensor, Tensor]:
        """The same, and its average over the pixels, (N, out)."""
        feature, average = self._run(whole(input), averages=True)
        assert average is not None
        return feature, average

    def _run(
        self, image: Tensor, residual: Tensor | None = None, averages: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        fixed = self._fixed
        if fixed.weight is not self.weight:  # moved, or of another dtype now
            fixed = self._fixed = self._fix()
        return conv_act(image, fixed, residual, relu=self.relu, pool=self.pool, averages=averages, backend=self.backend)

    def extra_repr(self) -> str:
        stride, padding, dilation, groups = self.geometry
        return (
            f"{tuple(self.weight.shape)}, stride={stride}, padding={padding}, dilation={dilation}, groups={groups}, "
            f"relu={self.relu}, affine={self.scale is not None}, pool={self.pool}"
        )
