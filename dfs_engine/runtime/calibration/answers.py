"""What a calibration asks and what it is told, and the rows of JSON in which the table and the kept file hold it."""

import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch

FP32, BF16 = "fp32", "bf16"
MANY_ROWS = "1024 rows or more"
LARGE_IMAGES, SMALL_IMAGES = "3x3, stride 2, large images", "3x3, stride 2, small images"
PLAIN_3X3, NARROW_3X3 = "3x3, stride 1", "3x3, stride 1, 32 to 63 channels"


class Question(NamedTuple):
    """How fast are the kernels of this operator (of torch.ops.dfs_engine), in this dtype, on this class of shapes?"""

    op: str
    dtype: str
    shape: str


class Answer(NamedTuple):
    """Speed of every kernel over ATen's, by the kernel's name, and the day it was measured (as in "2026-11-25")."""

    speedups: dict[str, float]
    measured: str


LINEAR = tuple(Question(op, FP32, MANY_ROWS) for op in ("linear", "linear_grad_input", "linear_grad_weight"))
STRIDED = tuple(Question("conv2d_grad_weight", FP32, images) for images in (LARGE_IMAGES, SMALL_IMAGES))
HALF, HALF_NARROW = (
    tuple(Question(op, BF16, shape) for op in ("conv2d", "conv2d_grad_input", "conv2d_grad_weight"))
    for shape in (PLAIN_3X3, NARROW_3X3)
)


def questions() -> dict[Question, tuple[str, ...]]:
    """What this process can be asked: the kernels to be compared with ATen's."""
    from dfs_engine import _C

    # ATen hands oneDNN's product, which is a convolution here, to something else on one thread; csrc/linear.cpp knows.
    products = ("gemm",) if torch.get_num_threads() == 1 else ("gemm", "onednn")
    asked: dict[Question, tuple[str, ...]] = dict.fromkeys(LINEAR, products)
    asked[LINEAR[2]] = ("gemm",)
    asked |= dict.fromkeys(STRIDED, ("gemm",))
    if "bfloat16" not in _C.emulated_dtypes():  # else it is computed in float in any case
        asked |= dict.fromkeys((*HALF, *HALF_NARROW), ("winograd",))
    return asked


def to_rows(answers: Mapping[Question, Answer]) -> list[dict[str, Any]]:
    """As JSON keeps them."""
    return [{**question._asdict(), **answer._asdict()} for question, answer in answers.items()]


def from_rows(rows: Any) -> dict[Question, Answer]:
    """The answers among rows that anyone may have written; what is none is left out."""
    answers = {}
    for row in rows if isinstance(rows, list) else ():
        if not isinstance(row, dict) or row.keys() != {*Question._fields, *Answer._fields}:
            continue
        names = [row[field] for field in (*Question._fields, "measured")]
        if all(isinstance(name, str) for name in names) and _are_speedups(row["speedups"]):
            answers[Question(*names[:3])] = Answer(row["speedups"], row["measured"])
    return answers


def those_asked(asked: Mapping[Question, Iterable[str]], answers: Mapping[Question, Answer]) -> dict[Question, Answer]:
    """Those of the answers that were asked for, with every kernel."""
    return {
        question: answers[question]
        for question, kernels in asked.items()
        if question in answers and answers[question].speedups.keys() >= set(kernels)
    }


def _are_speedups(value: Any) -> bool:
    return isinstance(value, dict) and all(
        isinstance(speedup, float) and math.isfinite(speedup) and speedup > 0 for speedup in value.values()
    )
