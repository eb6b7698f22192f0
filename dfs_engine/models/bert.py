"""BERT with an exit after every layer: pooler (the first token through a dense layer and tanh), dropout, linear.

The modules are transformers' own `BertForSequenceClassification`; its layers are applied here submodule by submodule,
so that a layer can read a split hidden state, and so that no version's call signatures matter.

An exit reads the first token. So the last layer, from which nothing else is read, is computed for it alone in the `dfs`
variant, with the same result; dropout draws fewer numbers there than in the other variants.

Shapes: N sentences, T tokens, C hidden channels, the axis on which hidden states are split.
"""

import contextlib
import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from dfs_engine.models.multi_exit import Block, MultiExitModel, OnExit
from dfs_engine.models.pretrained import pretrained_folder
from dfs_engine.models.registry import register_models
from dfs_engine.nn import (
    Exit,
    Fork,
    Reading,
    add,
    apply_layer,
    apply_linears,
    attend,
    convert_dropouts,
    exit_loss,
    map_channels,
)
from dfs_engine.runtime.extras import needs

# Of transformers' BertConfig, what makes the model: `get_config` keeps these.
_CONFIG_KEYS = (
    "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "hidden_act",
    "hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout", "max_position_embeddings",
    "type_vocab_size", "initializer_range", "layer_norm_eps", "pad_token_id",
)  # fmt: skip

# What of it changes the function, and which values this file computes.
_SUPPORTED = {
    "is_decoder": (False,),
    "add_cross_attention": (False,),
    "position_embedding_type": ("absolute", None),
    "problem_type": (None, "single_label_classification", "regression"),
}


class BertBlock(Block):
    """One transformers `BertLayer`: a reading of the hidden state (N, T, C) -> (N, T, C).

    What is called beside the reading is the same for all: `mask`, bool (N, 1, 1, T), True where a token is no padding.
    """

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

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
        mixed = _attend(layer.attention.self, projections, mask)
        after = layer.attention.output
        attended = after.LayerNorm(add(hidden, after.dropout(after.dense(mixed))))
        return layer.output(layer.intermediate(attended), attended)


class BertStem(BertBlock):
    """Embeddings and the first layer: ids (N, T) and token types or None -> (N, T, C)."""

    def __init__(self, embeddings: nn.Module, layer: nn.Module) -> None:
        super().__init__(layer)
        self.embeddings = embeddings

    def make(self, *input: Any, mask: Tensor | None = None) -> Tensor:
        return super().make(*self.enter(*input), mask=mask)

    def enter(self, *input: Any) -> Reading:
        input_ids, token_type_ids = input
        return (self.embeddings(input_ids=input_ids, token_type_ids=token_type_ids),)


def _attend(attention: Any, projections: list[Tensor], mask: Tensor | None) -> Tensor:
    """What a `BertSelfAttention` does with query (N, t, C), key and value (N, T, C): -> (N, t, C)."""
    heads = (attention.num_attention_heads, -1)
    query, key, value = (projection.unflatten(-1, heads).transpose(1, 2) for projection in projections)
    return attend(query, key, value, attention.dropout, mask).transpose(1, 2).flatten(2)


class BertExit(Exit):
    """A reading of (N, T, C), of which it takes the first token -> logits (N, num_classes)."""

    def __init__(self, pooler: nn.Linear, dropout: float, classifier: nn.Linear) -> None:
        super().__init__()
        self.pooler, self.dropout, self.classifier = pooler, nn.Dropout(dropout), classifier

    def feature(self, reading: Reading) -> Reading:
        """Of (N, T, C): what the pooler makes of the first token, (N, C)."""
        first = map_channels(lambda tokens: tokens[:, 0], reading)
        return (apply_layer(self.pooler, first).tanh(),)

    def classify(self, feature: Reading) -> Tensor:
        return self.classifier(self.dropout(*feature))


class MultiExitBert(MultiExitModel):
    """A `MultiExitModel` that is called as transformers' `BertForSequenceClassification` is, also by its `Trainer`.

    A Trainer's `compute_metrics` gets the last exit's logits, as from any model; with `evaluate(ignore_keys=[])` and
    `predict(..., ignore_keys=[])` a pair of those and all exits'. A loss outside of the model is computed of what
    `forward` returns without labels: a `compute_loss_func` gets all exits, `label_smoothing_factor` takes the first.

    Attributes:
        config: the `BertConfig`. A Trainer reads there what of an output is no prediction
            (`keys_to_ignore_at_inference`); for its `return_dict` see `forward`.
    """

    config: Any
    input_defaults: ClassVar[dict[str, int]] = {"attention_mask": 1, "token_type_ids": 0}

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        *,
        labels: Tensor | None = None,
        return_dict: bool | None = None,
        return_features: bool | str = False,
        on_exit: OnExit | None = None,
    ) -> Any:
        """Returns every exit's logits, shallow to deep; with labels, a `MultiExitClassifierOutput`.

        Args:
            input_ids: (N, T). attention_mask: (N, T), 0 for padding. token_type_ids: (N, T), 0 or 1.
            labels: (N,) class indices, or numbers where num_classes is 1.
            return_dict: whether to return a `MultiExitClassifierOutput`; None: as `config.return_dict` says, which is
                None unless set: where there are labels.
            return_features: also return features, as `MultiExitModel.forward`; f_k are the hidden states (N, T, C)
                behind each layer.
            on_exit: as `MultiExitModel.forward`; without labels.

        Returns:
            list of num_exits tensors (N, num_classes); with `return_features`, a pair of that and the list of features.
            As a `MultiExitClassifierOutput`: `logits` of the last exit, `exit_logits` of all, a tuple, `hidden_states`
            the features, a tuple too, and `loss`, the sum of all exits' losses.
        """
        if on_exit is not None and (labels is not None or return_dict):
            raise ValueError("on_exit: expected neither labels nor return_dict beside it, since samples leave.")
        mask = None if attention_mask is None else attention_mask.bool()[:, None, None]
        result = self._run((input_ids, token_type_ids), return_features, on_exit, mask=mask)
        if on_exit is not None:
            return result
        return_dict = self.config.return_dict if return_dict is None else return_dict
        if not (labels is not None if return_dict is None else return_dict):
            return result
        from dfs_engine.models.bert_output import MultiExitClassifierOutput

        logits, features = result if return_features else (result, None)
        loss = None
        if labels is not None:
            loss = torch.stack([exit_loss(exit_logits, labels) for exit_logits in logits]).sum()
        return MultiExitClassifierOutput(
            loss=loss,
            logits=logits[-1],
            hidden_states=None if features is None else tuple(features),
            exit_logits=tuple(logits),
        )

    def example_input(self, batch: int = 1) -> Tensor:
        """Random ids of at most 128 tokens, as GLUE is trained."""
        embeddings = cast(Any, self.blocks[0]).embeddings.word_embeddings
        shape = (batch, min(128, *self.input_shape))
        return torch.randint(embeddings.num_embeddings, shape, device=embeddings.weight.device)

    def example_inputs(self, batch: int = 1) -> dict[str, Tensor]:
        """Sentences of random lengths, each in two parts."""
        input_ids = self.example_input(batch)
        position = torch.arange(input_ids.size(1), device=input_ids.device)
        lengths, first = torch.randint(1, input_ids.size(1) + 1, (2, batch, 1), device=input_ids.device)
        is_second = (position >= first).long().clamp(max=self.config.type_vocab_size - 1)
        return {"input_ids": input_ids, "attention_mask": (position < lengths).long(), "token_type_ids": is_second}

    @property
    def max_tokens(self) -> int | None:
        return self.input_shape[0]


@register_models(["bert"], "own", dim=-1)
def _create_bert(
    _name: str,
    fork: Fork,
    *,
    num_classes: int,
    config: Any = None,
    pretrained: str | Path | None = None,
    device: Any = None,
    dtype: Any = None,
) -> MultiExitModel:
    """Any transformers BERT, with as many exits as layers; num_classes=1 is a regression.

    Args:
        config: a transformers `BertConfig`, or the folder or file of one; or a dict of what differs from the pretrained
            model's, or from BERT-base's. None: as that.
        pretrained: a folder that transformers saved, or an installed package that contains one. Layers, the last exit's
            pooler and, where it has num_classes, the last classifier start from it, the other exits at random; nothing
            is read on the meta device.
    """
    with needs("text"):
        from transformers import BertForSequenceClassification

    folder = None if pretrained is None else pretrained_folder(pretrained)
    settings = _read_config(config, folder)
    settings.num_labels = num_classes
    with torch.device("meta") if str(device) == "meta" else contextlib.nullcontext():
        if folder is None or str(device) == "meta":
            stock: Any = BertForSequenceClassification(settings)
        else:
            stock = BertForSequenceClassification.from_pretrained(
                folder, config=settings, dtype=torch.float32, ignore_mismatched_sizes=True, local_files_only=True
            )
        exits: list[nn.Module] = [_new_exit(settings) for _ in range(settings.num_hidden_layers - 1)]
    exits.append(BertExit(stock.bert.pooler.dense, stock.dropout.p, stock.classifier))
    first, *deeper = stock.bert.encoder.layer
    model = MultiExitBert(
        [BertStem(stock.bert.embeddings, first), *(BertBlock(layer) for layer in deeper)],
        exits,
        fork,
        num_classes=num_classes,
        input_shape=(settings.max_position_embeddings,),
    )
    settings.return_dict = None
    settings.keys_to_ignore_at_inference = ["hidden_states", "exit_logits"]
    model.config = settings
    model.options = {"config": {key: getattr(settings, key) for key in _CONFIG_KEYS}}
    if fork.variant == "dfs":
        convert_dropouts(model, fork.backend)
    return model.to(device=device, dtype=dtype)


def _new_exit(settings: Any) -> BertExit:
    """With transformers' initialisation."""
    dropout = settings.hidden_dropout_prob if settings.classifier_dropout is None else settings.classifier_dropout
    pooler = nn.Linear(settings.hidden_size, settings.hidden_size)
    classifier = nn.Linear(settings.hidden_size, settings.num_labels)
    for layer in (pooler, classifier):
        nn.init.normal_(layer.weight, std=settings.initializer_range)
        nn.init.zeros_(layer.bias)
    return BertExit(pooler, dropout, classifier)


def _read_config(config: Any, folder: Path | None) -> Any:
    """A `BertConfig` of its own, checked to be one that this file computes."""
    from transformers import AutoConfig, BertConfig

    if isinstance(config, (str, Path)):
        source = Path(config).expanduser()
        source = source if source.is_file() else pretrained_folder(source, "config")
        settings = AutoConfig.from_pretrained(source, local_files_only=True)
    elif config is None or isinstance(config, Mapping):
        settings = BertConfig() if folder is None else AutoConfig.from_pretrained(folder, local_files_only=True)
        unknown = [key for key in config or () if not hasattr(settings, key)]
        if unknown:
            raise ValueError(f"config: expected keys of transformers' BertConfig, got {', '.join(unknown)}.")
        settings.update(dict(config or {}))
    else:
        settings = copy.deepcopy(config)
    if settings.model_type != "bert":
        raise ValueError(f"config: expected a BERT, got model_type={settings.model_type!r}.")
    for key, valid in _SUPPORTED.items():
        value = getattr(settings, key, valid[0])
        if value not in valid:
            raise ValueError(f"config: expected {key} to be {' or '.join(map(repr, valid))}, got {value!r}.")
    return settings
