"""How closely a tensor has to follow its reference: the one table of tolerances, and the comparison that uses it.

Errors are measured twice, because each measure alone is blind: the largest error over the largest reference value finds
one wrong element, the RMS ratio finds a small error that is everywhere. Both are free of scale.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

DTYPES = {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True, slots=True)
class Tolerance:
    """Bounds of a comparison.

    Attributes:
        max_ratio: bound of max|error| / max|reference|.
        rms_ratio: bound of RMS(error) / RMS(reference).
    """

    max_ratio: float
    rms_ratio: float

    def __str__(self) -> str:
        return f"max {self.max_ratio:.0e}, rms {self.rms_ratio:.0e}"


# Of a result in the key's dtype against a float64 reference computed from the same rounded inputs.
TOLERANCES = {
    torch.float64: Tolerance(max_ratio=1e-10, rms_ratio=1e-10),
    torch.float32: Tolerance(max_ratio=1e-5, rms_ratio=1e-5),
    # One rounding of the result costs half a unit of its last place: 2**-9 in bf16, 2**-12 in fp16. The rest is for
    # stock kernels that round a partial sum in between.
    torch.bfloat16: Tolerance(max_ratio=2e-2, rms_ratio=1e-2),
    torch.float16: Tolerance(max_ratio=4e-3, rms_ratio=2e-3),
}
EXACT = Tolerance(max_ratio=0.0, rms_ratio=0.0)


@dataclass(frozen=True, slots=True)
class Comparison:
    """What `compare` found. A NaN or a wrong shape counts as an infinite error."""

    name: str
    max_abs: float
    max_ratio: float
    rms_ratio: float
    tolerance: Tolerance
    note: str = ""

    @property
    def excess(self) -> float:
        """The larger of error / bound: above 1 is a breach."""
        return max(
            _ratio(self.max_ratio, self.tolerance.max_ratio),
            _ratio(self.rms_ratio, self.tolerance.rms_ratio),
        )

    @property
    def ok(self) -> bool:
        return self.excess <= 1

    def __str__(self) -> str:
        verdict = "within" if self.ok else "beyond"
        note = f" ({self.note})" if self.note else ""
        return (
            f"{self.name}: max abs error {self.max_abs:.3g} ({self.max_ratio:.3g} of the largest value), "
            f"RMS ratio {self.rms_ratio:.3g}, {verdict} {self.tolerance}{note}"
        )


def compare(
    name: str, actual: Tensor | None, expected: Tensor, tolerance: Tolerance | None = None, *, scale: float = 0.0
) -> Comparison:
    """Compares a tensor with its reference, in float64.

    Args:
        name: the tensor's name, for messages.
        actual: the result; None (a gradient that was not computed) is a breach.
        expected: the reference, of the same shape.
        tolerance: default: the entry of `TOLERANCES` for the dtype of `actual`.
        scale: what the reference's size counts as where it is smaller: a sum whose terms cancel carries the rounding of
            the terms, not of the sum.
    """
    if actual is None:
        return failure(name, "missing", tolerance or EXACT)
    tolerance = tolerance or TOLERANCES[actual.dtype]
    if actual.shape != expected.shape:
        return failure(name, f"shape {tuple(actual.shape)}, expected {tuple(expected.shape)}", tolerance)
    if expected.numel() == 0:
        return Comparison(name, 0.0, 0.0, 0.0, tolerance)
    actual, expected = actual.detach().double(), expected.detach().double().to(actual.device)
    if not actual.isfinite().all():
        return failure(name, "NaN or infinity in the result", tolerance)
    error = actual - expected
    max_abs = error.abs().max().item()
    return Comparison(
        name=name,
        max_abs=max_abs,
        max_ratio=_ratio(max_abs, max(scale, expected.abs().max().item())),
        rms_ratio=_ratio(error.square().mean().sqrt().item(), max(scale, expected.square().mean().sqrt().item())),
        tolerance=tolerance,
    )


def assert_close(
    name: str, actual: Tensor | None, expected: Tensor, tolerance: Tolerance | None = None, *, scale: float = 0.0
) -> None:
    """Raises AssertionError, naming the tensor and both errors, where `compare` finds a breach."""
    comparison = compare(name, actual, expected, tolerance, scale=scale)
    if not comparison.ok:
        raise AssertionError(str(comparison))


def gradient_scale(gradients: Iterable[Tensor]) -> float:
    """`scale` for gradients of one model: a hundredth of the largest value among them.

    A gradient far below the others is what cancellation left of terms of their size: of a bias in front of a batch
    norm, of a scale that a batch norm behind a ReLU undoes, of whole layers where beta is 0 or 1.
    """
    return 1e-2 * max(gradient.abs().max().item() for gradient in gradients)


def failure(name: str, note: str, tolerance: Tolerance = EXACT) -> Comparison:
    """A breach that no number tells."""
    infinity = float("inf")
    return Comparison(name, infinity, infinity, infinity, tolerance, note)


def _ratio(value: float, scale: float) -> float:
    """value / scale, where nothing over nothing is nothing."""
    if value == 0:
        return 0.0
    return value / scale if scale else float("inf")
