"""How far confidence can be believed: the calibration error, and a temperature against it (Guo et al., ICML 2017)."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

NUM_BINS = 15
TEMPERATURES = (0.01, 100.0)
"""Between which one is fitted: logits that are never wrong would take it to 0."""


def calibration_error(confidence: Tensor, is_right: Tensor, num_bins: int = NUM_BINS) -> float:
    """Expected calibration error, in [0, 1]: by how much accuracy and confidence differ in a bin, over bins as samples.

    Equivalent to: ``multiclass_calibration_error(logits.softmax(-1), labels, num_classes, n_bins=num_bins)`` of
    torchmetrics, of which it needs no more than the largest probability and whether that class is right.

    Args:
        confidence: (N,), the probability of the class predicted. is_right: bool (N,), whether that is the label.
        num_bins: of equal width.
    """
    from torchmetrics.functional.classification import binary_calibration_error

    return binary_calibration_error(confidence, is_right.int(), n_bins=num_bins, norm="l1").item()


def fit_temperature(logits: Tensor, labels: Tensor) -> float:
    """The number by which to divide logits so that the loss on these samples is lowest. It changes no class.

    Equivalent to: the minimum over T of ``F.cross_entropy(logits / T, labels)``, in float64, between `TEMPERATURES`.

    Args:
        logits: (N, num_classes) of one exit, of samples that the model was not trained on. labels: int64 (N,).
    """
    values = logits.detach().double()
    log_temperature = torch.zeros((), dtype=torch.float64, device=values.device, requires_grad=True)
    optimizer = torch.optim.LBFGS([log_temperature], max_iter=100, tolerance_grad=1e-9, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        found = F.cross_entropy(values * (-log_temperature).exp(), labels)
        found.backward()
        return found

    with torch.enable_grad():
        optimizer.step(loss)
    lowest, highest = TEMPERATURES
    return min(max(log_temperature.exp().item(), lowest), highest)


def calibrated_confidence(logits: Tensor, temperatures: Sequence[float]) -> Tensor:
    """(num_exits, N, num_classes) -> (num_exits, N): the largest probability, each exit's at its temperature."""
    return (logits / logits.new_tensor(temperatures)[:, None, None]).softmax(-1).amax(-1)
