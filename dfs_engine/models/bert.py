"""BERT, RoBERTa, ELECTRA and DistilBERT with an exit after every layer: pooler (the first token through a dense layer
and an activation), dropout, linear; each as its model has it for classification.

The modules are transformers' own; its layers are applied here submodule by submodule, so that a layer can read a split
hidden state, and so that no version's call signatures matter. `models.sentences` has the names, `models.huggingface`
takes transformers' models apart and makes ours one of them.

An exit reads the first token. So the last layer, from which nothing else is read, is computed for it alone in the `dfs`
variant, with the same result; dropout draws fewer numbers there than in the other variants.

Shapes: N sentences, T tokens, C hidden channels, the axis on which hidden states are split.
"""

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dfs_engine.models.multi_exit import Block
from dfs_engine.nn import Exit, Fork, Reading, add, apply_layer, apply_linears, attend, map_channels, whole


class BertBlock(Block):
    """One transformers `BertLayer`, or one of the same parts: a reading of the hidden state (N, T, C) -> (N, T, C).

    What is called beside the reading is the same for all: `mask`, bool (N, 1, 1, T), True where a token is no padding.
    """

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, *input: Any, **context: Any) -> tuple:
        """As `Block.forward`; recomputed in the backward where transformers was asked for gradient checkpointing."""
        if not (self.training and getattr(self.layer, "gradient_checkpointing", False)):
            return super().forward(*input, **context)
        return checkpoint(super().forward, *input, use_reentrant=False, **context)

    def make(self, *input: Any, mask: Tensor | None = None) -> Tensor:
        return self._finish(input, apply_linears(self._projections(), input), mask)

    def produce(
        self, input: tuple, fork: Fork, is_last: bool, mask: Tensor | None = None, **context: Any
    ) -> tuple[Reading, ...]:
        if not is_last or fork.variant != "dfs":
            return super().produce(input, fork, is_last, mask=mask)
        # Its exit reads the first token: of the others only keys and values are needed.
        input = self.enter(*input)
        query, key, value = self._projections()
        first = map_channels(lambda tokens: tokens[:, :1], input)
        projections = [*apply_linears([query], first), *apply_linears([key, value], input)]
        made = self._finish(first, projections, mask)
        return (made,), (made,)

    def enter(self, *input: Any) -> Reading:
        """What the layer reads, of what the block does."""
        return input

    def _projections(self) -> list[nn.Module]:
        attention = cast(Any, self.layer).attention.self
        return [attention.query, attention.key, attention.value]

    def _finish(self, hidden: Reading, projections: list[Tensor], mask: Tensor | None) -> Tensor:
        """The layer behind query, key and value, for the tokens that have a query: `hidden` (N, t, C) -> (N, t, C)."""
        layer = cast(Any, self.layer)
        attention = layer.attention.self
        mixed = _attend(attention, attention.num_attention_heads, projections, mask)
        after = layer.attention.output
        attended = after.LayerNorm(add(hidden, after.dropout(after.dense(mixed))))
        return layer.output(layer.intermediate(attended), attended)


class BertStem(BertBlock):
    """Embeddings and the first layer: ids (N, T) and token types or None -> (N, T, C).

    Args:
        projection: from the embeddings' width to C, where they differ (ELECTRA).
    """

    def __init__(self, embeddings: nn.Module, layer: nn.Module, projection: nn.Module | None = None) -> None:
        super().__init__(layer)
        self.embeddings, self.projection = embeddings, projection

    def make(self, *input: Any, mask: Tensor | None = None) -> Tensor:
        return super().make(*self.enter(*input), mask=mask)

    def enter(self, *input: Any) -> Reading:
        embedded = self._embed(*input)
        return (embedded if self.projection is None else self.projection(embedded),)

    def _embed(self, input_ids: Tensor, token_type_ids: Tensor | None) -> Tensor:
        return self.embeddings(input_ids=input_ids, token_type_ids=token_type_ids)


class DistilBertBlock(BertBlock):
    """One transformers `TransformerBlock` of DistilBERT; see `BertBlock`."""

    def _projections(self) -> list[nn.Module]:
        attention = cast(Any, self.layer).attention
        return [attention.q_lin, attention.k_lin, attention.v_lin]

    def _finish(self, hidden: Reading, projections: list[Tensor], mask: Tensor | None) -> Tensor:
        layer = cast(Any, self.layer)
        mixed = _attend(layer.attention, layer.attention.n_heads, projections, mask)
        attended = layer.sa_layer_norm(add(hidden, layer.attention.out_lin(mixed)))
        return layer.output_layer_norm(layer.ffn(attended) + attended)


class DistilBertStem(BertStem, DistilBertBlock):
    """Embeddings and the first layer; DistilBERT has no token types, and takes no notice of any."""

    def _embed(self, input_ids: Tensor, token_type_ids: Tensor | None) -> Tensor:
        return self.embeddings(input_ids=input_ids)


def _attend(attention: Any, num_heads: int, projections: list[Tensor], mask: Tensor | None) -> Tensor:
    """What a `BertSelfAttention` does with query (N, t, C), key and value (N, T, C): -> (N, t, C)."""
    heads = (num_heads, -1)
    query, key, value = (projection.unflatten(-1, heads).transpose(1, 2) for projection in projections)
    plain = attention.config._attn_implementation == "eager" or None  # as whoever made the configuration wants it
    return attend(query, key, value, attention.dropout, mask, plain=plain).transpose(1, 2).flatten(2)


class BertExit(Exit):
    """A reading of (N, T, C), of which it takes the first token -> logits (N, num_classes).

    Args:
        activation: behind the pooler: tanh, but for ELECTRA and DistilBERT.
        drops_token: whether dropout comes before the pooler too (RoBERTa, ELECTRA).
    """

    def __init__(
        self,
        pooler: nn.Linear,
        dropout: float,
        classifier: nn.Linear,
        activation: Callable[[Tensor], Tensor] = torch.tanh,
        drops_token: bool = False,
    ) -> None:
        super().__init__()
        self.pooler, self.dropout, self.classifier = pooler, nn.Dropout(dropout), classifier
        self.activation, self.drops_token = activation, drops_token

    def fresh(self, std: float) -> "BertExit":
        """One of the same sizes, with transformers' initialisation."""
        layers = [nn.Linear(layer.in_features, layer.out_features) for layer in (self.pooler, self.classifier)]
        for layer in layers:
            nn.init.normal_(layer.weight, std=std)
            nn.init.zeros_(layer.bias)
        pooler, classifier = layers
        return BertExit(pooler, self.dropout.p, classifier, self.activation, self.drops_token)

    def feature(self, reading: Reading) -> Reading:
        """Of (N, T, C): what the pooler makes of the first token, (N, C)."""
        first = map_channels(lambda tokens: tokens[:, 0], reading)
        if self.drops_token and self.training:  # the same entries for the part with gradient and for the whole
            first = (self.dropout(whole(first)),)
        return (self.activation(apply_layer(self.pooler, first)),)

    def classify(self, feature: Reading) -> Tensor:
        return self.classifier(self.dropout(*feature))
