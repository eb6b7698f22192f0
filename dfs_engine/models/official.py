"""Checkpoints of the published code: their keys and ours, one table per family, read in both directions.

Our models keep one tensor where the published code splits it in two (VGG's layers behind a fork) or registers it twice
(ViT's blocks).
"""

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dfs_engine.models.multi_exit import MultiExitModel
from dfs_engine.partition import Partition

_MAX_LISTED = 20


class Rule(NamedTuple):
    """One line of a table: our keys of one shape, and the published keys of the same tensor.

    Attributes:
        ours: template of our key. A field of one letter, `{i}`, stands for a number; a longer one, `{leaf}`, for the
            rest of the key.
        official: templates with the same fields, of which `{i+1}` is the number after.
        how: "one" key; "columns": two keys, the input channels of f+ and those of f-; "copies": keys that all hold it.
    """

    ours: str
    official: tuple[str, ...]
    how: str

    def match(self, key: str) -> tuple[str, ...] | None:
        """The published keys of our `key`; None if the rule is not about it."""
        pattern = re.sub(r"\\\{(\w+)\\\}", _field, re.escape(self.ours))
        found = re.fullmatch(pattern, key)
        if found is None:
            return None
        fields = found.groupdict()

        def fill(field: re.Match[str]) -> str:
            name, _, offset = field[1].partition("+")
            return str(int(fields[name]) + int(offset)) if offset else fields[name]

        return tuple(re.sub(r"\{([\w+]+)\}", fill, template) for template in self.official)

    def split(self, tensor: Tensor, beta: float) -> list[Tensor]:
        """What the published keys hold of our tensor, as views."""
        if self.how == "columns":
            parts = Partition(tensor.size(1), beta)
            return [columns.of(tensor, 1) for columns in (parts.shared, parts.exit)]
        return [tensor] * len(self.official)

    def join(self, tensors: list[Tensor]) -> Tensor:
        """Our tensor."""
        return torch.cat(tensors, 1) if self.how == "columns" else tensors[0]


def _field(match: re.Match[str]) -> str:
    return rf"(?P<{match[1]}>{r'[0-9]+' if len(match[1]) == 1 else '.+'})"


def _one(ours: str, official: str) -> Rule:
    return Rule(ours, (official,), "one")


def _columns(ours: str, shared: str, exit: str) -> Rule:
    return Rule(ours, (shared, exit), "columns")


def _copies(ours: str, *official: str) -> Rule:
    return Rule(ours, official, "copies")


def _vgg(model: Any) -> Iterator[Rule]:
    yield _one("blocks.0.conv.{leaf}", "feature_extractors.0.0.{leaf}")
    yield _one("blocks.0.bn.{leaf}", "feature_extractors.0.2.{leaf}")
    block = "feature_extractors.{k}"
    yield _columns("blocks.{k}.conv.weight", f"{block}.conv_p.weight", f"{block}.conv_s.weight")
    yield _one("blocks.{k}.bn.{leaf}", f"{block}.bn.{{leaf}}")
    yield _columns("exits.{k}.linear.weight", "classifers.{k}.fc_p.weight", "classifers.{k}.fc_s.weight")


def _resnet(model: Any) -> Iterator[Rule]:
    yield _one("blocks.0.stem.conv.weight", "conv1.weight")
    yield _one("blocks.0.stem.bn.{leaf}", "bn1.{leaf}")
    ours, official = "blocks.{k}.residual_blocks.{b}", "layer{k+1}.{b}"
    yield _one(f"{ours}.layers.{{i}}.conv.weight", f"{official}.conv{{i+1}}.weight")
    yield _one(f"{ours}.layers.{{i}}.bn.{{leaf}}", f"{official}.bn{{i+1}}.{{leaf}}")
    yield _one(f"{ours}.shortcut_conv.weight", f"{official}.downsample.0.weight")
    yield _one(f"{ours}.shortcut_bn.{{leaf}}", f"{official}.downsample.1.{{leaf}}")
    for ours, official in (
        ("exits.{k}.gate", "attention{k+1}.0.op"),
        ("exits.{k}.sep_convs.{i}", "scala{k+1}.{i}.op"),
    ):
        for name, index in (("depthwise1", 0), ("pointwise1.conv", 1), ("depthwise2", 4), ("pointwise2.conv", 5)):
            yield _one(f"{ours}.{name}.weight", f"{official}.{index}.weight")
        yield _one(f"{ours}.pointwise1.bn.{{leaf}}", f"{official}.2.{{leaf}}")
        yield _one(f"{ours}.pointwise2.bn.{{leaf}}", f"{official}.6.{{leaf}}")
    yield _one("exits.{k}.gate_bn.{leaf}", "attention{k+1}.1.{leaf}")
    yield _one("exits.{k}.linear.{leaf}", "fc{k+1}.{leaf}")


def _msdnet(model: Any) -> Iterator[Rule]:
    if model.blocks[0].layers[0].large:
        yield _one("blocks.0.layers.0.scales.0.conv.{leaf}", "blocks.0.0.layers.0.0.{leaf}")
        yield _one("blocks.0.layers.0.scales.0.bn.{leaf}", "blocks.0.0.layers.0.1.{leaf}")
    scale = "blocks.{k}.layers.{i}.scales.{s}"
    # A path: 1x1 convolution, BN, ReLU, if it has a bottleneck, then 3x3 convolution, BN, ReLU.
    first = 3 if any(".bottleneck." in key for key in model.state_dict()) else 0
    for path in ("normal", "down"):
        official = f"blocks.{{k}}.{{i}}.layers.{{s}}.conv_{path}.net"
        for unit, index in (("bottleneck", 0), ("spatial", first)):
            yield _one(f"{scale}.{path}.{unit}.conv.weight", f"{official}.{index}.weight")
            yield _one(f"{scale}.{path}.{unit}.bn.{{leaf}}", f"{official}.{index + 1}.{{leaf}}")
    stem = "blocks.0.layers.0.scales.{s}", "blocks.0.0.layers.{s}.net"
    transition = scale, "blocks.{k}.{i}.m.{s}.net"
    head = "exits.{k}.convs.{i}", "classifier.{k}.m.{i}.net"
    for ours, official in (stem, transition, head):
        yield _one(f"{ours}.conv.weight", f"{official}.0.weight")
        yield _one(f"{ours}.bn.{{leaf}}", f"{official}.1.{{leaf}}")
    yield _one("exits.{k}.linear.{leaf}", "classifier.{k}.linear.1.{leaf}")


def _vit(model: Any) -> Iterator[Rule]:
    last, start = model.num_exits - 1, len(model.blocks[0].vit.blocks) - 1
    for ours, index in (("blocks.0.vit.blocks.{i}", "{i}"), ("blocks.{i}.block", f"{{i+{start}}}")):
        block = f"blocks.{index}.{{rest}}"
        yield _copies(f"{ours}.{{rest}}", f"backbone_model.{block}", block)
    yield _one("blocks.0.vit.{rest}", "backbone_model.{rest}")
    for ours, official, middle in (("norm", "norm", "middle_norms"), ("head", "head", "middle_heads")):
        yield _one(f"exits.{last}.tail.{ours}.{{leaf}}", f"backbone_model.{official}.{{leaf}}")
        yield _one(f"exits.{{k}}.tail.{ours}.{{leaf}}", f"{middle}.{{k}}.{{leaf}}")


def _bert(model: Any) -> Iterator[Rule]:
    last = model.num_exits - 1
    yield _one("blocks.0.embeddings.{rest}", "bert.embeddings.{rest}")
    yield _one("blocks.{k}.layer.{rest}", "bert.encoder.layer.{k}.{rest}")
    yield _one(f"exits.{last}.pooler.{{leaf}}", "bert.pooler.dense.{leaf}")
    yield _one(f"exits.{last}.classifier.{{leaf}}", "classifier.{leaf}")
    yield _one("exits.{k}.pooler.{leaf}", "middle_pooler_layers.{k}.dense.{leaf}")
    yield _one("exits.{k}.classifier.{leaf}", "middle_classifier_layers.{k}.{leaf}")


class _Family(NamedTuple):
    """A table, and the keys of what is no part of the model: adapters of feature distillation, an old buffer."""

    rules: Callable[[Any], Iterator[Rule]]
    extras: str = "(?!)"  # matches nothing
    adapters: tuple[Rule, ...] = ()


# By the file of dfs_engine/models/ that the family is written in.
_FAMILIES = {
    "vgg": _Family(_vgg, r"adaptation_layers\..+", (_one("adapters.{k}.weight", "adaptation_layers.{k}.2.weight"),)),
    "resnet": _Family(
        _resnet, r"adaptation_layer\d\..+", (_one("adapters.{k}.{leaf}", "adaptation_layer{k+1}.{leaf}"),)
    ),
    "msdnet": _Family(_msdnet),
    "vit": _Family(_vit),
    "bert": _Family(_bert, r"bert\.embeddings\.position_ids"),
}


class _Line(NamedTuple):
    """One tensor of a model."""

    ours: str
    official: tuple[str, ...]
    rule: Rule
    tensor: Tensor


class LoadedKeys(NamedTuple):
    """What `load_official_state_dict` did not put into the model.

    Attributes:
        missing_keys: published keys of tensors that the model has, and the checkpoint not.
        unexpected_keys: of the checkpoint, that mean nothing to this model.
        extras: tensors of the published training code that are no part of the model: published key -> tensor.
    """

    missing_keys: list[str]
    unexpected_keys: list[str]
    extras: dict[str, Tensor]


def load_official_state_dict(
    model: MultiExitModel, state_dict: Mapping[str, Tensor], strict: bool = True
) -> LoadedKeys:
    """Copies a checkpoint of the published code into `model`, once all of it is known to fit.

    Args:
        model: of `create_model`, with the options that the checkpoint was trained with. Where the published code splits
            a layer (VGG), its beta has to be the checkpoint's.
        state_dict: published key -> tensor. Converted to the model's dtype and device.
        strict: whether missing and unexpected keys are errors. Another shape is one always.

    Raises:
        ValueError: the checkpoint does not fit; the message lists published keys beside ours, and the model is as it
            was. Also for a model whose family has no published code.
    """
    family, lines = _table(model)
    expected = {key for line in lines for key in line.official}
    missing = [key for line in lines for key in line.official if key not in state_dict]
    others = [key for key in state_dict if key not in expected]
    extras = {key: state_dict[key] for key in others if re.fullmatch(family.extras, key)}
    unexpected = [key for key in others if key not in extras]

    complete = [line for line in lines if all(key in state_dict for key in line.official)]
    misfits = [text for line in lines for text in _misfits(line, state_dict, model.fork.beta)]
    problems = _listed("misfits", misfits)
    if strict:
        ours = {key: line.ours for line in lines for key in line.official}
        problems += _listed("missing keys", [f"{key} (ours: {ours[key]})" for key in missing])
        problems += _listed("unexpected keys", unexpected)
    if problems:
        raise ValueError(
            "load_official_state_dict: expected a checkpoint of this model, got one with "
            + "; ".join(problems)
            + ". Create the model with the name, options, num_classes and beta of the checkpoint."
        )
    with torch.no_grad():
        for line in complete:
            line.tensor.copy_(line.rule.join([state_dict[key] for key in line.official]))
    return LoadedKeys(missing, unexpected, extras)


def to_official_state_dict(model: MultiExitModel, extras: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """The tensors of `model` under the keys, and in the shapes, of the published code.

    Args:
        model: of `create_model`.
        extras: what `load_official_state_dict` returned as such, to be written back. The published ResNet18 always has
            `adaptation_layer`s and does not load without them.

    Returns:
        Copies, in the model's dtype; what was loaded comes back bit for bit.

    Raises:
        ValueError: a model whose family has no published code.
    """
    _, lines = _table(model)
    result = {}
    for line in lines:
        for key, part in zip(line.official, line.rule.split(line.tensor, model.fork.beta), strict=True):
            result[key] = part.clone(memory_format=torch.contiguous_format)
    return result | {key: tensor.clone() for key, tensor in (extras or {}).items()}


def adapter_keys(model: MultiExitModel) -> dict[str, str]:
    """Of the adapters of feature distillation: their keys in `methods.BYOT` -> in the published code, where it has any.

    Raises:
        ValueError: a model whose family has no published code.
    """
    ours = [f"adapters.{k}.{leaf}" for k in range(model.num_exits - 1) for leaf in ("weight", "bias")]
    found = ((key, rule.match(key)) for rule in _family(model).adapters for key in ours)
    return {key: official[0] for key, official in found if official is not None}


def published_beta(model: MultiExitModel, state_dict: Mapping[str, Any]) -> float | None:
    """The simplest share of channels that splits this family's layers as a checkpoint has them split.

    Args:
        model: of the checkpoint's family and width, whatever its beta; on any device.
        state_dict: published key -> tensor.

    Returns:
        None where the family has no layer in two, or the checkpoint no such layer: then nothing tells.

    Raises:
        ValueError: no one share splits all layers so.
    """
    sizes = set()
    for line in _table(model)[1]:
        parts = [state_dict.get(key) for key in line.official] if line.rule.how == "columns" else []
        if parts and all(isinstance(part, Tensor) and part.dim() > 1 for part in parts):
            sizes.add(tuple(part.size(1) for part in parts if part is not None))
    if not sizes:
        return None
    for digits in range(7):
        unit = 10**digits
        nearest = [round(unit * shared / (shared + exit)) for shared, exit in sizes]
        for beta in sorted({number / unit for number in nearest}):
            if all(Partition(shared + exit, beta).num_shared == shared for shared, exit in sizes):
                return beta
    raise ValueError(
        f"source: expected layers that one share of channels splits, got them split as {sorted(sizes)}. Give the "
        "--model flags of the checkpoint."
    )


def _family(model: MultiExitModel) -> _Family:
    name = type(next(iter(model.blocks), model)).__module__.rpartition(".")[2]
    if name not in _FAMILIES or (name == "bert" and model.name != "bert"):  # of its relatives none was published
        raise ValueError(
            f"model: expected one of the published families {', '.join(_FAMILIES)}, got a {type(model).__name__}"
            f"{f' {model.name!r}' if model.name else ''}, of which there are no published checkpoints."
        )
    return _FAMILIES[name]


def _table(model: MultiExitModel) -> tuple[_Family, list[_Line]]:
    """The family of `model`, and its lines in the order of our state_dict."""
    family = _family(model)
    rules = list(family.rules(model))
    lines = []
    for key, tensor in model.state_dict().items():
        found = next(((rule, official) for rule in rules if (official := rule.match(key)) is not None), None)
        if found is None:
            raise ValueError(
                f"model: expected options of the published code, got {model.name!r} with {key}, which it does not have."
            )
        lines.append(_Line(key, found[1], found[0], tensor))
    return family, lines


def _misfits(line: _Line, state_dict: Mapping[str, Any], beta: float) -> Iterator[str]:
    """What keeps the published tensors of one line from being ours."""
    given = [key for key in line.official if key in state_dict]
    shapes = dict(zip(line.official, (part.shape for part in line.rule.split(line.tensor, beta)), strict=True))
    for key in given:
        value = state_dict[key]
        if not isinstance(value, Tensor):
            yield f"{key} (ours: {line.ours}), a {type(value).__name__} and no tensor"
        elif value.shape != shapes[key]:
            yield f"{key} (ours: {line.ours}), of shape {tuple(value.shape)} and not {tuple(shapes[key])}"
        elif line.rule.how == "copies" and key != given[0] and not torch.equal(value, state_dict[given[0]]):
            yield f"{key} (ours: {line.ours}), not the same tensor as {given[0]}"


def _listed(what: str, items: list[str]) -> list[str]:
    if not items:
        return []
    more = f" and {len(items) - _MAX_LISTED} more" if len(items) > _MAX_LISTED else ""
    return [f"{what} ({len(items)}): {', '.join(items[:_MAX_LISTED])}{more}"]
