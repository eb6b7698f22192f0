"""The unit that ResNet and MSDNet are made of."""

from typing import Any

from torch import Tensor, nn

from dfs_engine.nn.conv_act import ConvAct, can_fix
from dfs_engine.nn.norm_act import apply_norm_relu
from dfs_engine.nn.reading import apply_layer


class ConvNormReLU(nn.Module):
    """Convolution, BN, a residual where one is given, ReLU: (N, in, H, W) -> (N, out, ceil(H / stride), ...)."""

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: int, stride: int = 1, bias: bool = False, **dd: Any
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size, stride, kernel_size // 2, bias=bias, **dd)
        self.bn = nn.BatchNorm2d(out_channels, **dd)

    def forward(self, *input: Any, residual: Tensor | None = None) -> Tensor:
        return apply_norm_relu(self.bn, apply_layer(self.conv, input), residual)

    def for_inference(self) -> nn.Module:
        """See `dfs_engine.inference.prepare`."""
        if not can_fix(self.conv, self.bn):
            return self
        return ConvAct(self.conv, self.bn, relu=True, backend=getattr(self.conv, "backend", None))
