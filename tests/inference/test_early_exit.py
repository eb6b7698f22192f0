"""`EarlyExit` on every family against `simulate` on the logits of all exits, sample by sample."""

import logging
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dfs_engine import attach_exits, create_model
from dfs_engine.inference import EarlyExit, Entropy, MaxProbability, Patience, Prediction, simulate
from dfs_engine.models import MultiExitModel
from dfs_engine.nn import reading, whole

BERT = {
    "vocab_size": 30, "hidden_size": 12, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 16,
    "max_position_embeddings": 12, "initializer_range": 0.2,
}  # fmt: skip
FAMILIES: dict[str, dict[str, Any]] = {
    "vgg7_64": {"width": 6},
    "resnet18": {"width": 6},
    "msdnet_cifar_lin_grow": {"num_exits": 4, "channels": 8, "growth": 4, "num_scales": 3, "head_width": 32},
    "vit_tiny_patch16_224": {
        "img_size": 16, "patch_size": 8, "depth": 5, "embed_dim": 18, "num_heads": 3, "start_block": 1
    },
    "bert": {"config": BERT},
    "attached": {},
}  # fmt: skip
NEEDS = {"vit_tiny_patch16_224": "timm", "bert": "transformers"}
FAMILY = pytest.mark.parametrize("family", FAMILIES)
NUM_CLASSES = 5
MARGIN = 1e-5
"""How far from a threshold a value has to be for rounding not to change what the policy says."""


class Backbone(nn.Module):
    """Convolutions with a residual sum, so that `branch` is no place to leave at, and `first` and `second` are."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.branch = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 6, 1)
        self.second, self.third, self.last = nn.Conv2d(6, 8, 3, stride=2), nn.Conv2d(8, 6, 1), nn.Linear(6, NUM_CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        first = self.first(images).tanh()
        second = self.second(first + self.branch(first)).tanh()
        return self.last(self.third(second).tanh().mean((2, 3)))


class KeepsImage(Backbone):
    """Reads the image at its end too: nowhere is a place to leave at."""

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images) + images.mean((1, 2, 3))[:, None]


class Untraceable(Backbone):
    """Asks for a number of a tensor, which torch.fx cannot give it."""

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images if images.sum() > -1e9 else -images)


def make_model(family: str, dtype: torch.dtype = torch.float32, backbone: type = Backbone, **options: Any) -> Any:
    if family in NEEDS:
        pytest.importorskip(NEEDS[family])
    if family == "attached":
        names, example = ["first", "branch", "second"], torch.zeros(1, 3, 8, 8, dtype=dtype)
        model: Any = attach_exits(backbone().to(dtype), names, example_input=example, **options)
    else:
        model = create_model(family, num_classes=NUM_CLASSES, dtype=dtype, **FAMILIES[family], **options)
    return spread(model.eval(), family)


@torch.no_grad()
def spread(model: Any, family: str) -> Any:
    """Changes the last linear of each exit so that over many samples its logits have mean 0 and deviation 2."""
    read: dict[nn.Module, Tensor] = {}
    last = [[module for module in exit.modules() if isinstance(module, nn.Linear)][-1] for exit in model.exits]
    if family == "attached":
        last.append(model.backbone.last)
    hooks = [layer.register_forward_hook(lambda layer, given, _: read.update({layer: whole(given)})) for layer in last]
    all_logits = model(**batch(family, 64, last[0].weight.dtype))
    for layer, hook, logits in zip(last, hooks, all_logits, strict=True):
        hook.remove()
        feature = read[layer].mean(0)
        if layer.bias is not None:
            logits = logits - layer.bias
            layer.bias.zero_()
        layer.weight -= logits.mean(0)[:, None] * feature / feature.square().sum()
        layer.weight *= 2 / (logits - logits.mean(0)).std()
    return model


def batch(family: str, num_samples: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Keyword arguments of a model: images, or sentences of 2 to 9 tokens."""
    if family != "bert":
        return {"input": torch.randn(num_samples, 3, 16, 16, dtype=dtype)}
    lengths = torch.randint(2, 10, (num_samples, 1))
    return {
        "input_ids": torch.randint(BERT["vocab_size"], (num_samples, 9)),
        "attention_mask": (torch.arange(9) < lengths).long(),
    }


def by_thirds(kind: Any, logits: list[Tensor]) -> Any:
    """A policy by which at every exit a third of those who are still there leave, as far as there are three."""
    any_one = kind(0.0)
    values = [any_one.value(each).double() for each in logits]
    stays, thresholds = torch.ones(len(values[0]), dtype=torch.bool), []
    for value in values[:-1]:
        sure = (kind.sign * value)[stays].sort(descending=True).values
        cut = kind.sign * ((sure[len(sure) // 3 - 1] + sure[len(sure) // 3]) / 2 if len(sure) > 2 else math.inf)
        thresholds.append(min(max(float(cut), 0), 1) if len(sure) > 2 and kind is MaxProbability else float(cut))
        stays &= kind.sign * value < kind.sign * thresholds[-1]
    return kind(thresholds)


POLICIES: dict[str, Callable[[list[Tensor]], Any]] = {
    "max_probability": lambda logits: by_thirds(MaxProbability, logits),
    "entropy": lambda logits: by_thirds(Entropy, logits),
    "patience": lambda logits: Patience(2),
    "own": lambda logits: margin_policy,
}


def margin_policy(logits: Tensor, exit_index: int, state: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """The mean over the exits so far of the difference of the two largest logits: has a state of its own."""
    two = logits.topk(2).values
    state["sum"] = state.get("sum", 0) + two[:, 0] - two[:, 1]
    value = state["sum"] / (exit_index + 1)
    return value > 1.5, value


def is_clear(policy: Any, logits: list[Tensor], exits: Tensor) -> Tensor:
    """Of which samples, each of which leaves at its own of `exits`, rounding can change no decision and no class."""
    clear, state = torch.ones(len(exits), dtype=torch.bool), {}
    for index, each in enumerate(logits):
        two = each.topk(2).values
        is_far = two[:, 0] - two[:, 1] > MARGIN
        if index < len(logits) - 1 and isinstance(policy, (MaxProbability, Entropy)):
            threshold = policy.threshold[index] if isinstance(policy.threshold, tuple) else policy.threshold
            is_far &= (policy.value(each) - threshold).abs() > MARGIN
        if policy is margin_policy:
            is_far &= (policy(each, index, state)[1] - 1.5).abs() > MARGIN
        clear &= is_far | (exits < index)
    return clear


def all_logits(model: Any, input: dict[str, Tensor]) -> list[Tensor]:
    with torch.no_grad():
        return model(**input)


def assert_as_simulated(found: Prediction, logits: list[Tensor], policy: Any) -> None:
    expected = simulate(logits, policy)
    clear = is_clear(policy, logits, expected.exits)
    assert (~clear).sum() <= 1 + 0.05 * len(clear)
    for name in ("exits", "classes"):
        torch.testing.assert_close(getattr(found, name)[clear], getattr(expected, name)[clear], rtol=0, atol=0)
    for name in ("confidence", "logits"):
        torch.testing.assert_close(getattr(found, name)[clear], getattr(expected, name)[clear], rtol=1e-4, atol=1e-4)


@FAMILY
@pytest.mark.parametrize("name", POLICIES)
def test_it_predicts_what_simulated_routing_does(family, name):
    model, input = make_model(family), batch(family, 64)
    logits = all_logits(model, input)
    policy = POLICIES[name](logits)
    assert_as_simulated(EarlyExit(model, policy).predict(**input), logits, policy)
    taken = simulate(logits, policy).exits.unique()
    assert len(taken) == model.num_exits if name in ("max_probability", "entropy") else len(taken) > 1


@FAMILY
@pytest.mark.parametrize(
    "options",
    [
        {"variant": "dense"},
        {"variant": "detach"},
        {"variant": "split"},
        {"reference": False},
        {"beta": 0.0},
        {"beta": 1.0},
    ],
    ids=lambda options: "-".join(map(str, options.values())),
)
def test_every_variant(family, options):
    model, input = make_model(family, **options), batch(family, 30)
    logits = all_logits(model, input)
    policy = by_thirds(MaxProbability, logits)
    assert_as_simulated(EarlyExit(model, policy)(**input), logits, policy)


@FAMILY
@pytest.mark.parametrize("num_samples", [0, 1, 7, 1000])
def test_batches_of_any_size(family, num_samples):
    model, input = make_model(family), batch(family, num_samples)
    logits = all_logits(model, input)
    policy = MaxProbability(0.7)
    found = EarlyExit(model, policy)(**input)
    assert_as_simulated(found, logits, policy)
    assert found.logits.shape == (num_samples, NUM_CLASSES)
    assert found.classes.dtype == found.exits.dtype == torch.int64


@FAMILY
def test_in_float64_it_is_exact_to_rounding(family):
    model, input = make_model(family, torch.float64), batch(family, 30, torch.float64)
    logits = all_logits(model, input)
    policy = by_thirds(Entropy, logits)
    found, expected = EarlyExit(model, policy)(**input), simulate(logits, policy)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def rows_seen(model: Any, modules: list[nn.Module], call: Callable[[], Any]) -> list[int]:
    """With how many samples each module is called, 0 if it is not."""
    seen = dict.fromkeys(modules, 0)
    hooks = [
        module.register_forward_pre_hook(lambda module, input: seen.update({module: len(input[0])}))
        for module in modules
    ]
    call()
    for hook in hooks:
        hook.remove()
    return list(seen.values())


@FAMILY
def test_blocks_see_undecided_samples_only(family):
    model, input = make_model(family), batch(family, 40)
    policy = by_thirds(MaxProbability, all_logits(model, input))
    predict = EarlyExit(model, policy)
    taken = predict(**input).exits
    undecided = [int((taken >= index).sum()) for index in range(model.num_exits)]
    assert undecided[0] == 40 > undecided[1] > undecided[-1] > 0
    if family == "attached":  # nobody leaves the batch at the second exit
        parts = [getattr(model.backbone, name) for name in ("first", "branch", "second", "third", "last")]
        expected = [40, undecided[1], undecided[1], undecided[3], undecided[3]]
    else:
        parts, expected = [*model.blocks, *model.exits], undecided * 2
    assert rows_seen(model, parts, lambda: predict(**input)) == expected


@FAMILY
def test_blocks_behind_the_last_exit_taken_do_not_run(family):
    model, input = make_model(family), batch(family, 6)
    parts = (
        [model.backbone.first, model.backbone.branch, model.backbone.third] if family == "attached" else model.blocks
    )
    at_first = rows_seen(model, list(parts), lambda: EarlyExit(model, MaxProbability(0.0))(**input))
    assert at_first == [6] + [0] * (len(parts) - 1)
    everywhere = rows_seen(model, list(parts), lambda: EarlyExit(model, MaxProbability(math.inf))(**input))
    assert everywhere == [6] * len(parts)
    assert EarlyExit(model, MaxProbability(math.inf))(**input).exits.tolist() == [model.num_exits - 1] * 6


@pytest.mark.parametrize("backbone", [KeepsImage, Untraceable])
def test_a_backbone_that_cannot_be_cut_stops_as_a_whole(backbone, caplog, monkeypatch):
    monkeypatch.setattr(reading, "_said", set())
    model, input = make_model("attached", backbone=backbone), batch("attached", 20)
    logits = all_logits(model, input)
    policy = by_thirds(MaxProbability, logits)
    with caplog.at_level(logging.WARNING):
        found = EarlyExit(model, policy)(**input)
        EarlyExit(model, policy)(**input)
    assert_as_simulated(found, logits, policy)
    said = [record.message for record in caplog.records if "until all its samples are decided" in record.message]
    assert len(said) == 1
    assert "first, branch, second" in said[0]
    last = int(found.exits[found.exits < 2].max())
    some = {"input": input["input"][found.exits <= last]}
    parts = [model.backbone.first, model.backbone.third]
    assert rows_seen(model, parts, lambda: EarlyExit(model, policy)(**some)) == [len(some["input"]), 0]
    assert len(model(**input)) == 4  # as before
    assert [tuple(each.shape) for each in model(**input)] == [(20, NUM_CLASSES)] * 4


def test_padding_of_others_changes_nothing():
    model = make_model("bert")
    input = batch("bert", 12)
    predict = EarlyExit(model, MaxProbability(0.6))
    together = predict(**input)
    assert len(together.exits.unique()) > 1
    for index, (ids, mask) in enumerate(zip(*input.values(), strict=True)):
        alone = predict(ids[mask.bool()][None])  # by position, and without a mask
        torch.testing.assert_close(alone.logits[0], together.logits[index], rtol=1e-4, atol=1e-4)
        assert alone.exits[0] == together.exits[index]


@FAMILY
def test_it_runs_in_eval_mode_without_gradient_and_leaves_the_model_as_it_was(family):
    model, input = make_model(family), batch(family, 9)
    expected = EarlyExit(model, MaxProbability(0.7))(**input)
    model.train()
    kept = model.backbone.first if family == "attached" else model.blocks[0]
    kept.eval()
    modes = {name: module.training for name, module in model.named_modules()}
    state = {name: value.clone() for name, value in model.state_dict().items()}
    found = EarlyExit(model, MaxProbability(0.7))(**input)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert not found.logits.requires_grad
    assert {name: module.training for name, module in model.named_modules()} == modes
    torch.testing.assert_close(dict(model.state_dict()), state, rtol=0, atol=0)
    assert torch.is_grad_enabled()
    assert all(logits.requires_grad for logits in model(**input))


def test_modes_come_back_after_an_error():
    model = make_model("vgg7_64").train()

    def breaks(logits, exit_index, state):
        raise RuntimeError("of the policy")

    with pytest.raises(RuntimeError, match="of the policy"):
        EarlyExit(model, breaks)(**batch("vgg7_64", 2))
    assert all(module.training for module in model.modules())


def test_an_attached_model_works_on_after_an_error():
    model, input = make_model("attached"), batch("attached", 4)

    def breaks(logits, exit_index, state):
        raise RuntimeError("of the policy")

    with pytest.raises(RuntimeError, match="of the policy"):
        EarlyExit(model, breaks)(**input)
    assert len(model(**input)) == 4


@FAMILY
def test_under_bf16_autocast(family):
    model, input = make_model(family), batch(family, 20)
    with torch.autocast("cpu", torch.bfloat16):
        logits = all_logits(model, input)
        policy = by_thirds(MaxProbability, logits)
        found = EarlyExit(model, policy)(**input)
    expected = simulate(logits, policy)
    assert found.logits.dtype == expected.logits.dtype == torch.bfloat16
    assert found.confidence.dtype == torch.float32
    same = found.exits == expected.exits
    assert same.float().mean() > 0.6  # a bf16 product may round otherwise in a smaller batch
    torch.testing.assert_close(found.logits[same], expected.logits[same], rtol=0.1, atol=0.1)


def test_channels_last_stays():
    model, seen = make_model("vgg7_64"), []
    for block in model.blocks[1:]:
        block.register_forward_pre_hook(lambda _, input: seen.append(input[1].stride(1)))
    EarlyExit(model, by_thirds(MaxProbability, all_logits(model, batch("vgg7_64", 30))))(**batch("vgg7_64", 30))
    assert set(seen) == {1}


def test_a_regression_takes_a_policy_of_ones_own():
    model = create_model("vgg7_64", num_classes=1, width=4).eval()
    with pytest.raises(ValueError, match=r"two or more classes for MaxProbability.*num_classes=1"):
        EarlyExit(model, MaxProbability(0.9))
    found = EarlyExit(model, lambda logits, index, state: (logits[:, 0] > 0, logits[:, 0]))(torch.randn(3, 3, 8, 8))
    assert found.logits.shape == (3, 1)


@pytest.mark.parametrize(
    ("policy", "error", "message"),
    [
        (MaxProbability, TypeError, r"got <class .*Write MaxProbability\(\.\.\.\)"),
        (0.9, TypeError, r"got 0\.9\. MaxProbability\(0\.9\) is one"),
        (MaxProbability([0.5] * 6), ValueError, r"or 5, one for each of 6 exits but the last.*got 6"),
    ],
)
def test_policies_that_do_not_fit(policy, error, message):
    with pytest.raises(error, match=message):
        EarlyExit(make_model("vgg7_64"), policy)


@pytest.mark.parametrize(
    "result", [lambda n: torch.ones(n), lambda n: (torch.ones(n), torch.ones(n)), lambda n: (torch.ones(n) > 0, 1.0),
               lambda n: (torch.ones(1) > 0, torch.ones(n))]
)  # fmt: skip
def test_policies_that_return_something_else(result):
    model = make_model("vgg7_64")
    with pytest.raises(TypeError, match=r"expected \(done, value\), a bool tensor \(3,\).* at exit 0"):
        EarlyExit(model, lambda logits, index, state: result(len(logits)))(**batch("vgg7_64", 3))


class OwnForward(MultiExitModel):
    def forward(self, input, *, return_features=False):
        return self._run((input / 2,), return_features)


class OwnForwardThatStops(MultiExitModel):
    def forward(self, input, *, return_features=False, on_exit=None):
        return self._run((input / 2,), return_features, on_exit)


def test_a_family_of_ones_own_hands_on_exit_on():
    model, input = make_model("vgg7_64", variant="dense"), batch("vgg7_64", 20)
    model.__class__ = OwnForward
    with pytest.raises(TypeError, match=r"expected OwnForward\.forward to have on_exit"):
        EarlyExit(model, Patience(1))
    model.__class__ = OwnForwardThatStops
    logits = all_logits(model, input)
    policy = by_thirds(MaxProbability, logits)
    assert_as_simulated(EarlyExit(model, policy)(**input), logits, policy)


def test_models_that_are_none():
    model = make_model("vgg7_64")
    with pytest.raises(TypeError, match=r"got model=Linear\. attach_exits makes one"):
        EarlyExit(nn.Linear(2, 2), Patience(1))
    with pytest.raises(TypeError, match=r"Give what it wraps, model\.module"):
        EarlyExit(nn.DataParallel(model), Patience(1))
    assert repr(EarlyExit(model, Patience(2))) == "EarlyExit(vgg7_64, Patience(num_equal=2))"


@FAMILY
def test_features_and_leaving_exclude_each_other(family):
    with pytest.raises(ValueError, match=r"on_exit: expected return_features=False"):
        make_model(family)(**batch(family, 2), return_features="blocks", on_exit=lambda index, logits: None)


def test_labels_and_leaving_exclude_each_other():
    with pytest.raises(ValueError, match=r"on_exit: expected neither labels nor return_dict"):
        make_model("bert")(**batch("bert", 2), labels=torch.zeros(2).long(), on_exit=lambda index, logits: None)
