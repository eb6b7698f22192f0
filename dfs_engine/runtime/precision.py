"""How float32 operands are multiplied, as they are or rounded to tf32: for whoever compares or times results."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch


@contextlib.contextmanager
def fp32_precision(value: str) -> Iterator[None]:
    """In the block matrix products and convolutions multiply float32 in this way, process-wide.

    Each is named: `torch.backends.fp32_precision` alone leaves cuDNN's convolutions at tf32 in torch 2.11. And never
    `allow_tf32`: reading that one raises where the settings were made through the newer names.

    Args:
        value: "ieee", which is exact, or "tf32", where the device has it.
    """
    backends: Any = torch.backends  # has objects in modules' places, whose attributes the type checker cannot see
    owners = (backends.cuda.matmul, backends.cudnn.conv, backends.mkldnn.matmul, backends.mkldnn.conv)
    before = [owner.fp32_precision for owner in owners]
    try:
        for owner in owners:
            owner.fp32_precision = value
        yield
    finally:
        for owner, previous in zip(owners, before, strict=True):
            owner.fp32_precision = previous
