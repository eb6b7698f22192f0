"""What one exit's prediction costs."""

import torch
import torch.nn.functional as F
from torch import Tensor


def exit_loss(logits: Tensor, target: Tensor, reduction: str = "mean") -> Tensor:
    """Cross entropy; of a single output, which predicts a number, the squared error.

    Args:
        logits: (N, num_classes).
        target: (N,) class indices, or (N, num_classes) the share of each class; where num_classes is 1, (N,) numbers.
        reduction: "mean", "sum" or "none".
    """
    if logits.size(-1) > 1:
        return F.cross_entropy(logits, target, reduction=reduction)
    dtype = torch.promote_types(logits.dtype, torch.float32)  # a target keeps its digits in half precision
    return F.mse_loss(logits.squeeze(-1).to(dtype), target.to(dtype), reduction=reduction)


def smooth_labels(target: Tensor, num_classes: int, smoothing: float) -> Tensor:
    """``(1 - smoothing) * target + smoothing / num_classes``, label smoothing's target (Szegedy et al., CVPR 2016).

    Args:
        target: (N,) class indices, or (N, num_classes) the share of each class.

    Returns:
        float32 (N, num_classes), rows of sum 1.
    """
    shares = F.one_hot(target, num_classes).float() if target.dim() == 1 else target
    return shares * (1 - smoothing) + smoothing / num_classes
