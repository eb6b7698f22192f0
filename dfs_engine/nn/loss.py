"""What one exit's prediction costs."""

import torch
import torch.nn.functional as F
from torch import Tensor


def exit_loss(logits: Tensor, target: Tensor, reduction: str = "mean") -> Tensor:
    """Cross entropy; of a single output, which predicts a number, the squared error.

    Args:
        logits: (N, num_classes). target: (N,), class indices, or numbers where num_classes is 1.
        reduction: "mean", "sum" or "none".
    """
    if logits.size(-1) > 1:
        return F.cross_entropy(logits, target, reduction=reduction)
    dtype = torch.promote_types(logits.dtype, torch.float32)  # a target keeps its digits in half precision
    return F.mse_loss(logits.squeeze(-1).to(dtype), target.to(dtype), reduction=reduction)
