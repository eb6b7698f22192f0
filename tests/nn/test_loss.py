"""One exit's loss: classes, or a number."""

import pytest
import torch
import torch.nn.functional as F

from dfs_engine.nn import exit_loss, smooth_labels


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_classes(reduction):
    logits, target = torch.randn(5, 3, dtype=torch.float64), torch.randint(3, (5,))
    expected = F.cross_entropy(logits, target, reduction=reduction)
    assert torch.equal(exit_loss(logits, target, reduction), expected)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("target_dtype", [torch.float32, torch.float64, torch.int64])
def test_one_output_predicts_a_number(reduction, target_dtype):
    logits, target = torch.randn(6, 1, dtype=torch.float64), (3 * torch.randn(6)).to(target_dtype)
    errors = (logits[:, 0] - target.double()).square()
    expected = {"mean": errors.mean(), "sum": errors.sum(), "none": errors}[reduction]
    torch.testing.assert_close(exit_loss(logits, target, reduction), expected)


def test_a_number_keeps_its_digits_in_half_precision():
    logits = torch.zeros(1, 1, dtype=torch.bfloat16, requires_grad=True)
    loss = exit_loss(logits, torch.tensor([1.001]))
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(1.001**2)
    loss.backward()
    assert logits.grad.dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_smoothed_labels_are_cross_entropys(dtype):
    logits, target = torch.randn(9, 5, dtype=dtype), torch.randint(5, (9,))
    expected = F.cross_entropy(logits.double(), target, label_smoothing=0.2)
    smooth = smooth_labels(target, 5, 0.2)
    assert smooth.dtype == torch.float32
    torch.testing.assert_close(smooth.sum(1), torch.ones(9))
    torch.testing.assert_close(exit_loss(logits, smooth).double(), expected, rtol=1e-5, atol=1e-6)


def test_smoothed_shares_are_cross_entropys():
    logits, shares = torch.randn(9, 5, dtype=torch.float64), torch.rand(9, 5).softmax(1)
    expected = F.cross_entropy(logits, shares.double(), label_smoothing=0.3)
    torch.testing.assert_close(exit_loss(logits, smooth_labels(shares, 5, 0.3)), expected, rtol=1e-6, atol=1e-6)
