"""What a BERT with exits returns to transformers' users. Needs transformers, unlike the other files here."""

from dataclasses import dataclass

from torch import Tensor
from transformers.modeling_outputs import SequenceClassifierOutput


@dataclass
class MultiExitClassifierOutput(SequenceClassifierOutput):
    """transformers' output of a classifier, whose answer is the last exit's, and with all exits' besides.

    Attributes:
        loss: the sum of all exits' losses (see `dfs_engine.nn.exit_loss`); None without labels.
        logits: (N, num_classes), the last exit's.
        hidden_states: None, or the features f_k, shallow to deep, (N, T, C) each.
        attentions: None.
        exit_logits: of every exit, shallow to deep, (N, num_classes) each; the last are `logits`.
    """

    exit_logits: tuple[Tensor, ...] | None = None
