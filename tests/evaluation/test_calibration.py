"""Calibration error against a computation by hand and torchmetrics' own; the temperature against what it promises."""

import math

import pytest
import torch
import torch.nn.functional as F

from dfs_engine.evaluation.calibration import calibrated_confidence, calibration_error, fit_temperature


def by_hand(confidence: list[float], is_right: list[bool], num_bins: int) -> float:
    bins = [[] for _ in range(num_bins)]
    for value, right in zip(confidence, is_right, strict=True):
        bins[math.floor(value * num_bins)].append((value, right))
    return sum(abs(sum(v for v, _ in each) - sum(r for _, r in each)) for each in bins if each) / len(confidence)


def overconfident(num_samples: int = 500, num_classes: int = 7, factor: float = 3.0):
    """Logits that are `factor` times those by which the labels were drawn."""
    logits = 2 * torch.randn(num_samples, num_classes)
    return factor * logits, torch.distributions.Categorical(logits=logits).sample()


@pytest.mark.parametrize("num_bins", [15, 4])
def test_calibration_error_is_that_of_a_computation_by_hand(num_bins):
    confidence, is_right = 0.05 + 0.9 * torch.rand(301), torch.rand(301) < 0.6
    expected = by_hand(confidence.tolist(), is_right.tolist(), num_bins)
    assert calibration_error(confidence, is_right, num_bins) == pytest.approx(expected, abs=1e-5)


def test_calibration_error_of_four_samples():
    confidence, is_right = torch.tensor([0.95, 0.95, 0.55, 0.55]), torch.tensor([True, False, True, True])
    # |0.5 - 0.95| and |1 - 0.55|, each of half of the samples
    assert calibration_error(confidence, is_right, 10) == pytest.approx(0.45, abs=1e-6)


def test_calibration_error_is_torchmetrics_own_of_all_classes():
    classification = pytest.importorskip("torchmetrics.functional.classification")
    logits, labels = overconfident()
    confidence, classes = logits.softmax(-1).max(-1)
    expected = classification.multiclass_calibration_error(logits.softmax(-1), labels, 7, n_bins=15)
    assert calibration_error(confidence, classes == labels) == pytest.approx(expected.item(), abs=1e-6)


@pytest.mark.parametrize("factor", [3.0, 0.3])
def test_a_temperature_lowers_the_loss_and_changes_no_class(factor):
    logits, labels = overconfident(factor=factor)
    temperature = fit_temperature(logits, labels)
    assert (temperature > 1) == (factor > 1)
    assert F.cross_entropy(logits / temperature, labels) < F.cross_entropy(logits, labels)
    assert torch.equal((logits / temperature).argmax(-1), logits.argmax(-1))


def test_no_other_temperature_has_a_lower_loss():
    logits, labels = overconfident()
    temperature = fit_temperature(logits, labels)
    found = F.cross_entropy(logits.double() / temperature, labels)
    for other in torch.logspace(-2, 2, 400, dtype=torch.float64):
        assert found <= F.cross_entropy(logits.double() / other, labels) + 1e-9


def test_a_temperature_undoes_a_factor():
    logits, labels = overconfident()
    assert fit_temperature(5 * logits, labels) == pytest.approx(5 * fit_temperature(logits, labels), rel=1e-3)


def test_logits_that_are_always_or_never_right_have_one_within_its_limits():
    labels = torch.randint(5, (60,))
    for logits in (F.one_hot(labels, 5) * 1e4, F.one_hot(labels, 5) * 9.0, torch.zeros(60, 5), -F.one_hot(labels, 5)):
        assert 0.01 <= fit_temperature(logits.float(), labels) <= 100


def test_confidence_at_each_exits_temperature():
    logits = torch.randn(3, 11, 4)
    found = calibrated_confidence(logits, [0.5, 1.0, 4.0])
    for index, temperature in enumerate([0.5, 1.0, 4.0]):
        torch.testing.assert_close(found[index], F.softmax(logits[index] / temperature, -1).max(-1).values)
