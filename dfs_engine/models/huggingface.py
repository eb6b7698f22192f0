"""The BERT family as models of transformers: `save_pretrained`, `from_pretrained`, Auto classes, `Trainer`, `pipeline`.

Importing this file registers them, so that transformers opens the folders that they are saved in. Needs transformers,
unlike the other files here.

    import dfs_engine.models.huggingface
    model = AutoModelForSequenceClassification.from_pretrained("folder")
"""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    BertPreTrainedModel,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    DistilBertPreTrainedModel,
    ElectraConfig,
    ElectraForSequenceClassification,
    ElectraPreTrainedModel,
    PretrainedConfig,
    RobertaConfig,
    RobertaForSequenceClassification,
    RobertaPreTrainedModel,
)
from transformers.modeling_outputs import SequenceClassifierOutput

from dfs_engine.models.bert import BertBlock, BertExit, BertStem, DistilBertBlock, DistilBertStem
from dfs_engine.models.hub import write_card
from dfs_engine.models.multi_exit import MultiExitModel, OnExit
from dfs_engine.models.pretrained import pretrained_folder
from dfs_engine.models.registry import create_model
from dfs_engine.nn import Fork, convert_dropouts, convert_layers, exit_loss, smooth_labels

# Of transformers' configs, what makes the model: `get_config` keeps these.
_BERT_KEYS = (
    "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "hidden_act",
    "hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout", "max_position_embeddings",
    "type_vocab_size", "initializer_range", "layer_norm_eps", "pad_token_id",
)  # fmt: skip
_DISTILBERT_KEYS = (
    "vocab_size", "dim", "n_layers", "n_heads", "hidden_dim", "activation", "dropout", "attention_dropout",
    "seq_classif_dropout", "max_position_embeddings", "sinusoidal_pos_embds", "initializer_range", "pad_token_id",
)  # fmt: skip

# What of them changes the function, and which values these files compute.
_SUPPORTED = {
    "is_decoder": (False,),
    "add_cross_attention": (False,),
    "position_embedding_type": ("absolute", None),
    "problem_type": (None, "single_label_classification", "regression"),
}


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


def _with_exits(base: type[PretrainedConfig]) -> Any:
    """A config class: one of transformers, and of `create_model` what routes the features."""

    def __init__(  # noqa: N807
        self: Any,
        *,
        beta: float = 0.5,
        variant: str = "dfs",
        reference: bool = True,
        exit_gradient: str = "own",
        backend: str | None = None,
        **kwargs: Any,
    ) -> None:
        base.__init__(self, **kwargs)
        self.beta, self.variant, self.reference = beta, variant, reference
        self.exit_gradient, self.backend = exit_gradient, backend

    def to_dict(self: Any) -> dict[str, Any]:
        # What `forward` returns is the caller's choice of today, no part of the model.
        return {key: value for key, value in base.to_dict(self).items() if key != "return_dict"}

    def from_dict(cls: Any, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        found = config_dict.get("model_type", cls.model_type)
        if found != cls.model_type:
            raise ValueError(
                "pretrained_model_name_or_path: expected a folder that save_pretrained of a model with exits wrote, "
                f"got one of model_type={found!r}. To start from it: create_model({base.model_type!r}, "
                "pretrained=FOLDER)."
            )
        return base.from_dict.__func__(cls, config_dict, **kwargs)  # type: ignore[attr-defined]

    members = {
        "__init__": __init__,
        "__module__": __name__,
        "__doc__": f"transformers' `{base.__name__}`, with beta, variant, reference, exit_gradient and backend.",
        "model_type": f"dfs_{base.model_type}",
        "keys_to_ignore_at_inference": ["hidden_states", "exit_logits"],  # of an output, what is no prediction
        "to_dict": to_dict,
        "from_dict": classmethod(from_dict),
    }
    return type(f"MultiExit{base.__name__}", (base,), members)


MultiExitBertConfig = _with_exits(BertConfig)
MultiExitDistilBertConfig = _with_exits(DistilBertConfig)
MultiExitElectraConfig = _with_exits(ElectraConfig)
MultiExitRobertaConfig = _with_exits(RobertaConfig)


class Parts(NamedTuple):
    """What a transformers model is made of.

    Attributes:
        projection: from the embeddings' width to the hidden one, where it has one.
        exit: its head.
    """

    embeddings: nn.Module
    layers: nn.ModuleList
    exit: BertExit
    projection: nn.Module | None = None


class MultiExitSentenceModel(MultiExitModel):
    """A `MultiExitModel` that is called as transformers' classifiers are, also by its `Trainer` and `pipeline`.

    A Trainer's `compute_metrics` gets the last exit's logits, as from any model; with `evaluate(ignore_keys=[])` and
    `predict(..., ignore_keys=[])` a pair of those and all exits'. For label smoothing see `exits_loss`. Gradient
    checkpointing is never the reentrant kind.

    Attributes:
        config: the transformers config, with what `create_model` takes besides. For its `return_dict` see `forward`.

    Args:
        stock: a transformers model of the same config, whose modules this one takes; None: a new one's.
    """

    config: Any
    input_defaults: ClassVar[dict[str, int]] = {"attention_mask": 1, "token_type_ids": 0}
    kind: ClassVar[str]
    stock_class: ClassVar[Any]
    config_keys: ClassVar[tuple[str, ...]] = _BERT_KEYS
    block_classes: ClassVar[tuple[type[BertStem], type[BertBlock]]] = BertStem, BertBlock
    base_model_prefix = ""
    _no_split_modules: ClassVar[Any] = ["BertStem", "BertBlock", "DistilBertStem", "DistilBertBlock", "BertExit"]

    def __init__(self, config: Any, stock: Any = None) -> None:
        _check_config(config)
        fork = Fork(
            config.beta,
            config.variant,
            reference=config.reference,
            exit_gradient=config.exit_gradient,
            dim=-1,
            backend=config.backend,
        )
        parts = self.take_apart(self.stock_class(config) if stock is None else stock)
        first, *deeper = parts.layers
        make_stem, make_block = self.block_classes
        super().__init__(
            [make_stem(parts.embeddings, first, parts.projection), *(make_block(layer) for layer in deeper)],
            [*(parts.exit.fresh(config.initializer_range) for _ in deeper), parts.exit],
            fork,
            num_classes=config.num_labels,
            input_shape=(self.num_positions(config),),
            config=config,
        )
        self.name, self.create = self.kind, create_model
        convert_layers(self, fork.variant, fork.backend)
        if fork.variant == "dfs":
            convert_dropouts(self, fork.backend)
        cast(Any, self).post_init()

    @staticmethod
    def take_apart(stock: Any) -> Parts:
        """The modules of `stock_class`."""
        raise NotImplementedError

    @staticmethod
    def num_positions(config: Any) -> int:
        """How many tokens the model can read."""
        return config.max_position_embeddings

    @classmethod
    def start_from(cls, folder: Path, config: Any) -> Any:
        """The model of `config`, with the weights of a folder that transformers or `save_pretrained` wrote."""
        found = AutoConfig.from_pretrained(folder, local_files_only=True).model_type
        options: Any = {"dtype": torch.float32, "ignore_mismatched_sizes": True, "local_files_only": True}
        if found == config.model_type:
            return cast(Any, cls).from_pretrained(folder, config=config, **options)
        return cls(config, cls.stock_class.from_pretrained(folder, config=config, **options))

    def get_config(self) -> dict[str, Any]:
        """As `MultiExitModel.get_config`; transformers may have changed its config meanwhile."""
        return {**super().get_config(), "config": {key: getattr(self.config, key) for key in self.config_keys}}

    def init_weights(self) -> None:
        """Nothing: transformers has initialised its modules, and `BertExit.fresh` the others."""

    def get_input_embeddings(self) -> Any:
        return cast(Any, self.blocks[0]).embeddings.word_embeddings

    def set_input_embeddings(self, value: nn.Module) -> None:
        cast(Any, self.blocks[0]).embeddings.word_embeddings = value

    def save_pretrained(self, save_directory: Any, is_main_process: bool = True, *args: Any, **kwargs: Any) -> None:
        """As transformers' models, with a model card beside it where there is none."""
        cast(Any, super()).save_pretrained(save_directory, is_main_process, *args, **kwargs)
        if is_main_process:
            write_card(self, Path(save_directory))

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
            return_dict: whether to return a `MultiExitClassifierOutput`; None: as `config.return_dict` says. That is
                True of a model that `from_pretrained` made, as everywhere in transformers, and None of `create_model`'s
                and `load_model`'s: where there are labels.
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
        words = self.get_input_embeddings()
        shape = (batch, min(128, *self.input_shape))
        return torch.randint(words.num_embeddings, shape, device=words.weight.device)

    def example_inputs(self, batch: int = 1) -> dict[str, Tensor]:
        """Sentences of random lengths, each in two parts where the model tells parts apart."""
        input_ids = self.example_input(batch)
        position = torch.arange(input_ids.size(1), device=input_ids.device)
        lengths, first = torch.randint(1, input_ids.size(1) + 1, (2, batch, 1), device=input_ids.device)
        is_second = (position >= first).long().clamp(max=getattr(self.config, "type_vocab_size", 1) - 1)
        return {"input_ids": input_ids, "attention_mask": (position < lengths).long(), "token_type_ids": is_second}

    @property
    def max_tokens(self) -> int | None:
        return self.input_shape[0]


class MultiExitBert(MultiExitSentenceModel, BertPreTrainedModel):
    """BERT; see `MultiExitSentenceModel`."""

    config_class = MultiExitBertConfig
    kind, stock_class = "bert", BertForSequenceClassification

    @staticmethod
    def take_apart(stock: Any) -> Parts:
        bert = stock.bert
        exit = BertExit(bert.pooler.dense, stock.dropout.p, stock.classifier)
        return Parts(bert.embeddings, bert.encoder.layer, exit)


class MultiExitRoberta(MultiExitSentenceModel, RobertaPreTrainedModel):
    """RoBERTa; see `MultiExitSentenceModel`."""

    config_class = MultiExitRobertaConfig
    kind, stock_class = "roberta", RobertaForSequenceClassification

    @staticmethod
    def take_apart(stock: Any) -> Parts:
        head = stock.classifier
        exit = BertExit(head.dense, head.dropout.p, head.out_proj, drops_token=True)
        return Parts(stock.roberta.embeddings, stock.roberta.encoder.layer, exit)

    @staticmethod
    def num_positions(config: Any) -> int:
        return config.max_position_embeddings - config.pad_token_id - 1  # its positions begin behind that of padding


class MultiExitElectra(MultiExitSentenceModel, ElectraPreTrainedModel):
    """ELECTRA's discriminator; see `MultiExitSentenceModel`."""

    config_class = MultiExitElectraConfig
    kind, stock_class = "electra", ElectraForSequenceClassification
    config_keys = (*_BERT_KEYS, "embedding_size")

    @staticmethod
    def take_apart(stock: Any) -> Parts:
        electra, head = stock.electra, stock.classifier
        exit = BertExit(head.dense, head.dropout.p, head.out_proj, F.gelu, drops_token=True)
        return Parts(electra.embeddings, electra.encoder.layer, exit, getattr(electra, "embeddings_project", None))


class MultiExitDistilBert(MultiExitSentenceModel, DistilBertPreTrainedModel):
    """DistilBERT; see `MultiExitSentenceModel`."""

    config_class = MultiExitDistilBertConfig
    kind, stock_class = "distilbert", DistilBertForSequenceClassification
    config_keys = _DISTILBERT_KEYS
    block_classes = DistilBertStem, DistilBertBlock

    @staticmethod
    def take_apart(stock: Any) -> Parts:
        exit = BertExit(stock.pre_classifier, stock.dropout.p, stock.classifier, F.relu)
        return Parts(stock.distilbert.embeddings, stock.distilbert.transformer.layer, exit)


MODELS: dict[str, Any] = {
    model.kind: model for model in (MultiExitBert, MultiExitDistilBert, MultiExitElectra, MultiExitRoberta)
}
for _model in MODELS.values():
    AutoConfig.register(_model.config_class.model_type, _model.config_class, exist_ok=True)
    AutoModelForSequenceClassification.register(_model.config_class, _model, exist_ok=True)


def exits_loss(label_smoothing: float = 0.0) -> Callable[..., Tensor]:
    """The sum of all exits' losses, for `Trainer(compute_loss_func=...)`.

    Label smoothing has to be asked for here: with `TrainingArguments(label_smoothing_factor=...)` a Trainer computes
    the loss of one exit alone, and the others learn nothing.

    Args:
        label_smoothing: share of each target that all classes get equally.
    """

    def loss(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
        logits = outputs["exit_logits"] if isinstance(outputs, Mapping) else outputs
        target = smooth_labels(labels, logits[-1].size(-1), label_smoothing) if label_smoothing else labels
        # Over all batches that are accumulated, a Trainer wants the mean.
        total = torch.stack([exit_loss(each, target, reduction="sum") for each in logits]).sum()
        return total / (len(labels) if num_items_in_batch is None else num_items_in_batch)

    return loss


def read_config(kind: Any, config: Any, folder: Path | None, fork: Fork, num_classes: int) -> Any:
    """A config of the model class `kind` of its own; see `models.sentences`.

    Raises:
        ValueError: it is of another type, or has keys that such a one does not have.
    """
    base = kind.stock_class.config_class
    if isinstance(config, (str, Path)):
        source = Path(config).expanduser()
        source = source if source.is_file() else pretrained_folder(source, "config")
        settings = AutoConfig.from_pretrained(source, local_files_only=True)
    elif config is None or isinstance(config, Mapping):
        settings = base() if folder is None else AutoConfig.from_pretrained(folder, local_files_only=True)
    else:
        settings = config
    if settings.model_type not in (base.model_type, kind.config_class.model_type):
        known = settings.model_type.removeprefix("dfs_")
        remedy = f" Its name here is {known}: create_model({known!r}, ...), --model.name {known}." * (known in MODELS)
        raise ValueError(f"config: expected a {kind.kind}, got model_type={settings.model_type!r}.{remedy}")
    values = copy.deepcopy(settings.to_dict())
    for key in ("model_type", "architectures", "transformers_version"):  # what the class says of itself
        values.pop(key, None)
    routing = {name: getattr(fork, name) for name in ("beta", "variant", "reference", "exit_gradient", "backend")}
    settings = kind.config_class(**values | routing)
    if isinstance(config, Mapping):
        unknown = [key for key in config if not hasattr(settings, key)]
        if unknown:
            raise ValueError(f"config: expected keys of transformers' {base.__name__}, got {', '.join(unknown)}.")
        settings.update(dict(config))
    settings.num_labels = num_classes
    settings.return_dict = None
    _check_config(settings)
    return settings


def _check_config(config: Any) -> None:
    for key, valid in _SUPPORTED.items():
        value = getattr(config, key, valid[0])
        if value not in valid:
            raise ValueError(f"config: expected {key} to be {' or '.join(map(repr, valid))}, got {value!r}.")
