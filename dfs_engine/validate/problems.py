"""The shapes on which `dfs validate` tries each op: a round one, and odd ones.

A later op joins by one function here.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from dfs_engine.partition import ChannelSlice
from dfs_engine.validate.cases import (
    Case,
    Problem,
    SlicedCase,
    few_produced_cases,
    few_sliced_cases,
    fixed_cases,
    partition_cases,
    produced_cases,
    sliced_cases,
)

PROBLEMS: dict[str, Callable[[], list[Problem]]] = {}


def problems(op: str) -> Callable[[Callable[[], list[Problem]]], Callable[[], list[Problem]]]:
    """Registers the function that lists the problems of `op`, which has its oracle by that name in `reference`."""

    def register(function: Callable[[], list[Problem]]) -> Callable[[], list[Problem]]:
        PROBLEMS[op] = function
        return function

    return register


@problems("partitioned_conv2d")
def _conv2d_problems() -> list[Problem]:
    def problem(
        label: str,
        input: tuple,
        out_channels: int,
        kernel: tuple,
        bias: bool = True,
        cases: Callable[[Problem], list[Case]] = sliced_cases,
        **options: Any,
    ) -> Problem:
        weight = (out_channels, input[1] // options.get("groups", 1), *kernel)
        tensors = {"input": input, "weight": weight, "bias": (out_channels,) if bias else None}
        return Problem(label, tensors, options, 1, input[1], ("nchw", "channels_last", "strided", "expanded"), cases)

    # Winograd's tiles, 4 pixels apart, end before the border, on it, and 1 to 3 pixels behind it, in the forward and in
    # both gradients; some lie inside, which is a path of its own. Half of the channels are enough for it.
    def tiled(height: int, width: int, padding: tuple[int, int]) -> Problem:
        return problem(f"{height}x{width}, padding {padding}", (3, 40, height, width), 18, (3, 3), padding=padding)

    return [
        problem("round", (4, 16, 8, 8), 32, (3, 3), padding=1),
        problem("wide", (2, 64, 6, 6), 64, (3, 3), bias=False, padding=1),
        problem("1 channel", (2, 1, 7, 7), 8, (3, 3), padding=1),
        problem("3 channels, stride 2", (2, 3, 9, 11), 17, (3, 3), stride=2, padding=1),
        problem("17 channels", (3, 17, 9, 7), 9, (3, 3), padding=1),
        problem("65 channels, no bias", (2, 65, 5, 5), 33, (3, 3), bias=False, padding=1),
        problem("1x1", (2, 17, 6, 5), 12, (1, 1)),
        problem("1x1, stride 2, no bias", (2, 16, 7, 6), 8, (1, 1), bias=False, stride=2),
        problem("dilation 2", (2, 17, 11, 9), 6, (3, 3), padding=2, dilation=2),
        problem("5x3, mixed strides", (2, 8, 9, 10), 7, (5, 3), stride=(2, 1), padding=(1, 2)),
        problem("4 groups", (2, 12, 7, 7), 8, (3, 3), padding=1, groups=4),
        problem("depthwise, stride 2", (2, 17, 9, 9), 17, (3, 3), bias=False, stride=2, padding=1, groups=17),
        problem("depthwise, multiplier 2", (2, 6, 5, 7), 12, (3, 3), groups=6),
        problem("depthwise 3x5, uneven", (2, 17, 9, 12), 17, (3, 5), stride=(1, 2), padding=(0, 2), groups=17),
        tiled(12, 13, (1, 0)),
        tiled(13, 10, (0, 2)),
        tiled(10, 11, (2, 1)),
        tiled(11, 12, (1, 1)),
        # Long sums, which kernels take in several blocks: over input channels, output channels, pixels.
        problem("330 channels", (1, 330, 3, 5), 20, (3, 3), padding=1, cases=few_sliced_cases),
        problem("330 out channels", (1, 24, 5, 3), 330, (3, 3), padding=1, cases=few_sliced_cases),
        problem("many pixels", (9, 24, 30, 31), 17, (3, 3), padding=1, cases=few_sliced_cases),
        problem("batch 0", (0, 8, 5, 5), 4, (3, 3), padding=1),
    ]


@problems("partitioned_linear")
def _linear_problems() -> list[Problem]:
    def problem(
        label: str,
        input: tuple,
        out_features: int,
        bias: bool = True,
        cases: Callable[[Problem], list[Case]] = sliced_cases,
    ) -> Problem:
        tensors = {"input": input, "weight": (out_features, input[-1]), "bias": (out_features,) if bias else None}
        return Problem(label, tensors, {}, -1, input[-1], ("contiguous", "transposed", "strided", "expanded"), cases)

    return [
        problem("round", (8, 32), 16),
        problem("wide", (64, 128), 64),
        problem("1 feature", (6, 1), 4),
        problem("tokens, 3 features", (2, 3, 5, 3), 17),
        problem("17 features", (9, 17), 3),
        problem("tokens, 65 features, no bias", (2, 7, 65), 33, bias=False),
        problem("one vector", (17,), 9),
        # Long sums, which kernels take in several blocks: over features in and out, and over rows.
        problem("deep and wide", (33, 1300), 830, cases=few_sliced_cases),
        problem("many rows", (1300, 48), 40, cases=few_sliced_cases),
        problem("batch 0", (0, 8), 4),
    ]


@problems("partitioned_norm_linear")
def _norm_linear_problems() -> list[Problem]:
    def problem(
        label: str,
        input: tuple,
        out_features: int,
        affine: bool = True,
        bias: bool = True,
        cases: Callable[[Problem], list[Case]] = sliced_cases,
    ) -> Problem:
        channels = input[-1]
        norm = (channels,) if affine else None
        weight = (out_features, channels)
        tensors = {
            "input": input,
            "norm_weight": norm,
            "norm_bias": norm,
            "weight": weight,
            "bias": (out_features,) if bias else None,
        }
        return Problem(label, tensors, {}, -1, channels, ("contiguous", "transposed", "strided"), cases, signed=True)

    # One channel normalises to a constant, and of a few beside zeros only a rounding error is left of the gradient: so
    # every beta has to leave several. For the same reason rows do not share one number here (layout "expanded").
    return [
        problem("round", (8, 64), 32),
        problem("wide", (64, 128), 64),
        problem("tokens, 65 channels", (2, 3, 5, 65), 17),
        problem("tokens, 97 channels, no bias", (2, 7, 97), 33, bias=False),
        problem("not affine", (9, 72), 7, affine=False),
        problem("one vector", (129,), 9),
        problem("deep", (33, 700), 400, cases=few_sliced_cases),
        problem("many rows", (700, 72), 40, cases=few_sliced_cases),
        problem("batch 0", (0, 8), 4),
    ]


@problems("norm_act")
def _norm_act_problems() -> list[Problem]:
    def problem(
        label: str,
        input: tuple,
        affine: bool = True,
        residual: bool = False,
        cases: Callable[[Problem], list[Case]] = produced_cases,
        **options: Any,
    ) -> Problem:
        parameters = (input[1],) if affine else None
        tensors = {"input": input, "weight": parameters, "bias": parameters}
        tensors |= {"residual": input} if residual else {}
        layouts = ("nchw", "channels_last", "strided", "expanded")
        return Problem(label, tensors, {"pool": False} | options, 1, input[1], layouts, cases, signed=True)

    return [
        problem("round", (4, 16, 8, 8)),
        problem("3 channels, odd size, pool", (3, 3, 9, 7), pool=True),
        problem("17 channels, pool", (2, 17, 6, 5), pool=True),
        problem("65 channels, ReLU last", (2, 65, 5, 6), relu_first=False),
        problem("17 channels, ReLU last, pool", (3, 17, 7, 6), relu_first=False, pool=True),
        problem("17 channels, residual", (2, 17, 7, 5), residual=True, relu_first=False),
        problem("not affine", (3, 8, 5, 4), affine=False),
        problem("ties, pool", (2, 8, 6, 8), pool=True)._replace(has_ties=True),
        problem("ties, ReLU last, pool", (2, 8, 8, 6), relu_first=False, pool=True)._replace(has_ties=True),
        problem("many pixels", (5, 20, 23, 21), cases=few_produced_cases),
        problem("batch 0", (0, 8, 4, 4), pool=True),
    ]


@problems("conv_act")
def _conv_act_problems() -> list[Problem]:
    def problem(
        label: str,
        input: tuple,
        out_channels: int,
        kernel: int = 3,
        stride: int = 1,
        padding: tuple[int, int] = (1, 1),
        dilation: int = 1,
        groups: int = 1,
        affine: bool = False,
        residual: bool = False,
        pool: bool = False,
    ) -> Problem:
        geometry = ((stride, stride), padding, (dilation, dilation), groups)
        weight = (out_channels, input[1] // groups, kernel, kernel)
        output = F.conv2d(torch.empty(input, device="meta"), torch.empty(weight, device="meta"), None, *geometry).shape
        vector = (out_channels,)
        tensors: dict[str, tuple[int, ...] | None] = {
            "input": input,
            "weight": weight,
            "bias": vector,
            "scale": vector if affine else None,
            "shift": vector if affine else None,
            "residual": tuple(output) if residual else None,
        }
        options = {"geometry": geometry, "pool": pool}
        return Problem(
            label, tensors, options, 1, input[1], ("nchw", "channels_last", "strided"), fixed_cases, signed=True
        )

    # Winograd's tiles of 4 pixels end on the border and 1 to 3 pixels behind it; a pool leaves out an odd last row.
    return [
        problem("round", (4, 16, 8, 8), 32),
        problem("pool, affine", (3, 17, 9, 14), 24, affine=True, pool=True),
        problem("pool alone", (2, 33, 11, 6), 17, pool=True),
        problem("affine", (2, 24, 7, 9), 65, affine=True),
        problem("residual", (2, 20, 10, 13), 20, residual=True),
        problem("padding 0", (2, 18, 9, 7), 18, padding=(0, 0)),
        problem("padding 2, 1, pool", (2, 18, 6, 7), 18, padding=(2, 1), pool=True),
        problem("one pixel", (2, 16, 1, 1), 16),
        problem("3 channels, 7x7, stride 2", (2, 3, 15, 17), 17, kernel=7, stride=2, padding=(3, 3), pool=True),
        problem("stride 2, residual", (2, 17, 9, 8), 12, stride=2, residual=True),
        problem("1x1, affine", (3, 17, 5, 6), 40, kernel=1, padding=(0, 0), affine=True),
        problem("1x1, stride 3", (2, 16, 8, 7), 9, kernel=1, stride=3, padding=(0, 0)),
        problem("dilation 2", (2, 16, 9, 9), 16, dilation=2, padding=(2, 2)),
        problem("4 groups, pool", (2, 16, 7, 6), 8, groups=4, affine=True, pool=True),
        problem("depthwise", (2, 17, 9, 6), 17, groups=17),
        problem("many channels and pixels", (5, 130, 21, 18), 150, affine=True, pool=True),
        problem("batch 0", (0, 16, 6, 6), 16),
    ]


@problems("partition")
def _partition_problems() -> list[Problem]:
    def problem(label: str, input: tuple, dim: int) -> Problem:
        last = ("channels_last",) if len(input) == 4 else ("transposed",)
        layouts = ("contiguous", *last, "strided", "expanded")
        return Problem(label, {"input": input}, {"dim": dim}, dim, input[dim], layouts, partition_cases, signed=True)

    return [
        problem("image", (3, 17, 5, 4), 1),
        problem("1 channel", (2, 1, 4, 4), 1),
        problem("tokens", (2, 7, 65), -1),
        problem("batch 0", (0, 8, 4, 4), 1),
    ]


def winograd_problem() -> Problem:
    """A convolution on which Winograd's error is told beside the direct one's."""
    tensors: dict[str, tuple[int, ...] | None] = {
        "input": (2, 64, 16, 16),
        "weight": (64, 64, 3, 3),
        "bias": None,
    }
    # Both signs, as features have: with one sign the error looks smaller than it is.
    return Problem("winograd", tensors, {"padding": 1}, 1, 64, ("channels_last",), _whole, signed=True)


def _whole(problem: Problem) -> list[Case]:
    return [SlicedCase("whole", ChannelSlice(0, problem.num_channels), True, "plain", "channels_last")]
