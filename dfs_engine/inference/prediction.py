"""What inference says of each sample."""

from typing import NamedTuple

from torch import Tensor


class Prediction(NamedTuple):
    """Of N samples, in the order in which they came.

    Attributes:
        classes: int64 (N,), the largest logit at the exit taken; 0 where there is one logit only.
        exits: int64 (N,), the exit taken, counted from 0.
        confidence: (N,), the policy's value there: a probability, an entropy, a number of equal predictions.
        logits: (N, num_classes), of the exit taken, in the dtype in which the exits make them.
    """

    classes: Tensor
    exits: Tensor
    confidence: Tensor
    logits: Tensor
