"""Checkpoints of the published code: keys and shapes as it writes them, there and back bit for bit."""

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from dfs_engine import create_model, list_models, load_official_state_dict, to_official_state_dict
from dfs_engine.validate.tolerances import assert_close

PUBLISHED = json.loads(Path(__file__).with_name("official_state_dicts.json").read_text())["models"]
# published name -> our name and options
MODELS = {
    "vgg7_64_cifar100": ("vgg7_64", {"num_classes": 100}),
    "vgg7_64_cifar100+distill": ("vgg7_64", {"num_classes": 100}),
    "vgg16_64_imagenet": ("vgg16_64", {"num_classes": 1000}),
    "vgg16_64_imagenet+distill": ("vgg16_64", {"num_classes": 1000}),
    "resnet18_cifar100": ("resnet18", {"num_classes": 100}),
    "msdnet_cifar100": ("msdnet_cifar", {"num_classes": 100}),
    "msdnet_imagenet": ("msdnet_imagenet", {"num_classes": 1000}),
    "vit_tiny_patch16_224": ("vit_tiny_patch16_224", {"num_classes": 1000}),
    "bert_base": ("bert", {"num_classes": 2}),
}
SLOW = pytest.mark.slow  # 110 million weights, four times
# Of the published training code, and no part of the model.
EXTRAS = {
    "vgg7_64_cifar100+distill": [f"adaptation_layers.{k}.2.weight" for k in range(5)],
    "vgg16_64_imagenet+distill": [f"adaptation_layers.{k}.2.weight" for k in range(12)],
    "resnet18_cifar100": [f"adaptation_layer{k}.{leaf}" for k in (1, 2, 3) for leaf in ("weight", "bias")],
}


def need(name: str) -> None:
    """Skips where the family is not there: not in this tree, or its library not installed."""
    if not list_models(name):
        pytest.skip(f"no model {name}")
    if name == "bert":
        pytest.importorskip("transformers")


def random_checkpoint(shapes: dict[str, list[int]]) -> dict[str, torch.Tensor]:
    """As the published code would write it: integers where it counts, one tensor under both of ViT's keys."""
    checkpoint = {
        key: torch.randint(1 << 40, ()) if key.endswith("num_batches_tracked") else torch.randn(shape)
        for key, shape in shapes.items()
    }
    for key in shapes:
        if f"backbone_model.{key}" in shapes:
            checkpoint[key] = checkpoint[f"backbone_model.{key}"]
    return checkpoint


def shapes_of(model) -> dict[str, list[int]]:
    return {key: list(value.shape) for key, value in to_official_state_dict(model).items()}


@pytest.fixture(params=MODELS)
def published(request):
    need(MODELS[request.param][0])
    return request.param


def make(published: str, **options):
    name, own = MODELS[published]
    return create_model(name, **own, **options)


def test_every_published_model_is_tested():
    assert MODELS.keys() == PUBLISHED.keys()


def test_published_keys_and_shapes(published):
    expected = {key: shape for key, shape in PUBLISHED[published].items() if key not in EXTRAS.get(published, ())}
    assert shapes_of(make(published, device="meta")) == expected


@pytest.mark.parametrize(
    "published", [pytest.param(name, marks=SLOW if name == "bert_base" else ()) for name in MODELS]
)
def test_there_and_back_is_bitwise(published):
    need(MODELS[published][0])
    model = make(published)
    checkpoint = random_checkpoint(PUBLISHED[published])
    originals = {key: value.clone() for key, value in checkpoint.items()}
    loaded = load_official_state_dict(model, checkpoint)
    assert loaded.missing_keys == loaded.unexpected_keys == []
    assert list(loaded.extras) == EXTRAS.get(published, [])
    back = to_official_state_dict(model, loaded.extras)
    assert back.keys() == originals.keys()
    for key, value in back.items():
        assert value.dtype == originals[key].dtype, key
        assert torch.equal(value, originals[key]), key
        assert torch.equal(checkpoint[key], originals[key]), key
        assert value.is_contiguous()
    tensors = [*back.values(), *model.state_dict().values()]  # none shares memory with another
    assert len({value.untyped_storage().data_ptr() for value in tensors}) == len(tensors)


@pytest.mark.parametrize("beta", [0, 0.1, 0.3, 0.7, 1])
def test_other_shares_of_channels(beta):
    model = create_model("vgg7_64", width=10, beta=beta, num_classes=7)
    shapes = shapes_of(model)
    for k, width in enumerate([10, 10, 20, 20, 40, 40]):
        num_shared = round(beta * width)
        assert shapes[f"classifers.{k}.fc_p.weight"] == [7, num_shared]
        assert shapes[f"classifers.{k}.fc_s.weight"] == [7, width - num_shared]
        if k < 5:
            assert shapes[f"feature_extractors.{k + 1}.conv_p.weight"][1] == num_shared
            assert shapes[f"feature_extractors.{k + 1}.conv_s.weight"][1] == width - num_shared
    checkpoint = random_checkpoint(shapes)
    load_official_state_dict(model, checkpoint)
    back = to_official_state_dict(model)
    assert all(torch.equal(back[key], value) for key, value in checkpoint.items())


def test_another_dtype_is_converted():
    model = create_model("vgg7_64", width=4, dtype=torch.float64)
    checkpoint = random_checkpoint(shapes_of(model))
    load_official_state_dict(model, checkpoint)
    back = to_official_state_dict(model)
    assert back["classifers.0.fc_p.weight"].dtype == torch.float64
    assert all(torch.equal(back[key], value.to(back[key].dtype)) for key, value in checkpoint.items())


# What does not fit.


@pytest.fixture
def vgg():
    """A model, a checkpoint that fits it, and a way to see that the model is as it was."""
    model = create_model("vgg7_64", width=4, num_classes=3)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    checkpoint = random_checkpoint(shapes_of(model))

    def fails(match, **options):
        with pytest.raises(ValueError, match=match):
            load_official_state_dict(model, checkpoint, **options)
        assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())

    return model, checkpoint, fails


@pytest.mark.parametrize("strict", [True, False])
def test_a_wrong_shape_is_named(vgg, strict):
    _, checkpoint, fails = vgg
    checkpoint["feature_extractors.2.conv_s.weight"] = torch.randn(8, 3, 3, 3)
    fails(
        r"misfits \(1\): feature_extractors\.2\.conv_s\.weight \(ours: blocks\.2\.conv\.weight\), of shape "
        r"\(8, 3, 3, 3\) and not \(8, 2, 3, 3\)\. Create the model with",
        strict=strict,
    )


def test_another_beta_is_another_shape(vgg):
    _, checkpoint, fails = vgg
    other = create_model("vgg7_64", width=4, num_classes=3, beta=0.75)
    checkpoint |= to_official_state_dict(other)
    fails(r"misfits \(22\): feature_extractors\.1\.conv_p\.weight .* and 2 more\. .*num_classes and beta")
    assert load_official_state_dict(other, checkpoint).missing_keys == []


def test_missing_and_unexpected_keys(vgg):
    model, checkpoint, fails = vgg
    del checkpoint["feature_extractors.3.bn.num_batches_tracked"]
    del checkpoint["classifers.5.fc_p.weight"]
    checkpoint["classifers.6.fc_p.weight"] = torch.zeros(3, 2)
    fails(
        r"got one with missing keys \(2\): feature_extractors\.3\.bn\.num_batches_tracked \(ours: blocks\.3\.bn\."
        r"num_batches_tracked\), classifers\.5\.fc_p\.weight \(ours: exits\.5\.linear\.weight\); "
        r"unexpected keys \(1\): classifers\.6\.fc_p\.weight\. "
    )
    head = model.exits[5].linear.weight.clone()
    loaded = load_official_state_dict(model, checkpoint, strict=False)
    assert loaded.missing_keys == ["feature_extractors.3.bn.num_batches_tracked", "classifers.5.fc_p.weight"]
    assert loaded.unexpected_keys == ["classifers.6.fc_p.weight"]
    assert torch.equal(model.exits[5].linear.weight, head)  # half of it does not make a whole
    assert torch.equal(model.blocks[0].conv.weight, checkpoint["feature_extractors.0.0.weight"])


def test_everything_wrong_is_told_in_few_words(vgg):
    _, checkpoint, fails = vgg
    keys = list(checkpoint)
    for key in keys:
        checkpoint[f"module.{key}"] = checkpoint.pop(key)
    fails(
        r"missing keys \(54\): .* and 34 more; unexpected keys \(54\): module\.feature_extractors\.0\.0\.weight, .* "
        r"and 34 more\. "
    )


def test_something_else_than_a_tensor(vgg):
    _, checkpoint, fails = vgg
    checkpoint["classifers.0.fc_s.weight"] = [1, 2]
    fails(r"classifers\.0\.fc_s\.weight \(ours: exits\.0\.linear\.weight\), a list and no tensor")


def test_a_backbone_of_somebody_else():
    from torch import nn

    from dfs_engine import attach_exits

    backbone = nn.Sequential(nn.Conv2d(3, 4, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
    model = attach_exits(backbone, ["0"], example_input=torch.randn(1, 3, 4, 4))
    with pytest.raises(ValueError, match=r"published families vgg, .*, got a AttachedModel, of which"):
        to_official_state_dict(model)


# The function: the published forward, written on the published keys, gives our logits.


def checkpoint_for(model) -> dict[str, torch.Tensor]:
    """Random and tame, in float64."""
    checkpoint = random_checkpoint(shapes_of(model))
    for key, value in checkpoint.items():
        if key.endswith("running_var"):
            value.abs_().add_(0.5)
        elif value.dim() > 1:
            value.mul_(value[0].numel() ** -0.5)
    for key in checkpoint:
        if f"backbone_model.{key}" in checkpoint:
            checkpoint[key] = checkpoint[f"backbone_model.{key}"]
    return {key: value.double() if value.is_floating_point() else value for key, value in checkpoint.items()}


class Keys:
    """Layers by their published keys, in evaluation mode."""

    def __init__(self, checkpoint: dict[str, torch.Tensor], prefix: str = "") -> None:
        self.checkpoint, self.prefix = checkpoint, prefix

    def __call__(self, name: str) -> "Keys":
        return Keys(self.checkpoint, f"{self.prefix}{name}.")

    def __contains__(self, name: str) -> bool:
        return any(key.startswith(f"{self.prefix}{name}.") for key in self.checkpoint)

    def __getitem__(self, name: str) -> torch.Tensor | None:
        return self.checkpoint.get(f"{self.prefix}{name}")

    def conv(self, input, **options):
        return F.conv2d(input, self["weight"], self["bias"], **options)

    def bn(self, input):
        return F.batch_norm(input, self["running_mean"], self["running_var"], self["weight"], self["bias"])

    def linear(self, input):
        return F.linear(input, self["weight"], self["bias"])

    def norm(self, input, eps):
        return F.layer_norm(input, input.shape[-1:], self["weight"], self["bias"], eps)


def assert_same_logits(model, input, expected):
    logits = model.eval()(input)
    for index, (actual, other) in enumerate(zip(logits, expected, strict=True)):
        assert_close(f"logits[{index}]", actual, other)


@pytest.mark.parametrize("beta", [0.3, 0.5])
def test_vgg_as_published(beta):
    model = create_model("vgg7_64", width=6, beta=beta, num_classes=5, dtype=torch.float64)
    checkpoint = checkpoint_for(model)
    load_official_state_dict(model, checkpoint)
    keys, input = Keys(checkpoint), torch.randn(2, 3, 16, 16, dtype=torch.float64)
    feature, expected = (
        keys("feature_extractors.0.2").bn(keys("feature_extractors.0.0").conv(input, padding=1).relu()),
        [],
    )
    for k in range(6):
        if k > 0:
            block = keys(f"feature_extractors.{k}")
            plus, sub = feature.split(
                [round(beta * feature.size(1)), feature.size(1) - round(beta * feature.size(1))], 1
            )
            feature = block("conv_p").conv(plus, padding=1) + block("conv_s").conv(sub, padding=1)
            feature = block("bn").bn(feature.relu())
        if k % 2 == 1:
            feature = F.max_pool2d(feature, 2)
        mean, head = feature.mean((2, 3)), keys(f"classifers.{k}")
        plus, sub = mean.split([round(beta * mean.size(1)), mean.size(1) - round(beta * mean.size(1))], 1)
        expected.append(head("fc_p").linear(plus) + head("fc_s").linear(sub))
    assert_same_logits(model, input, expected)


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_resnet_as_published(name):
    need(name)
    model = create_model(name, width=4, num_classes=5, dtype=torch.float64)
    checkpoint = checkpoint_for(model)
    load_official_state_dict(model, checkpoint)
    keys, input = Keys(checkpoint), torch.randn(2, 3, 32, 32, dtype=torch.float64)

    def sep_conv(keys, input):
        width = input.size(1)
        hidden = keys("0").conv(input, stride=2, padding=1, groups=width)
        hidden = keys("2").bn(keys("1").conv(hidden)).relu()
        hidden = keys("4").conv(hidden, padding=1, groups=width)
        return keys("6").bn(keys("5").conv(hidden)).relu()

    feature, expected = keys("bn1").bn(keys("conv1").conv(input, padding=1)).relu(), []
    for stage in (1, 2, 3, 4):
        index = 0
        while f"layer{stage}.{index}" in keys:
            block, hidden = keys(f"layer{stage}.{index}"), feature
            convs = [n for n in (1, 2, 3) if f"conv{n}" in block]
            for n in convs:
                size = block(f"conv{n}")["weight"].size(2)
                strided = stage > 1 and index == 0 and n == (2 if len(convs) == 3 else 1)
                hidden = block(f"conv{n}").conv(hidden, stride=2 if strided else 1, padding=size // 2)
                hidden = block(f"bn{n}").bn(hidden)
                hidden = hidden.relu() if n != convs[-1] else hidden
            if "downsample" in block:
                stride = 2 if stage > 1 else 1
                feature = block("downsample.1").bn(block("downsample.0").conv(feature, stride=stride))
            feature = (hidden + feature).relu()
            index += 1
        gated = feature
        if stage < 4:
            gate = keys(f"attention{stage}.1").bn(sep_conv(keys(f"attention{stage}.0.op"), feature)).relu()
            gated = feature * F.interpolate(gate, scale_factor=2, mode="bilinear").sigmoid()
            for j in range(4 - stage):
                gated = sep_conv(keys(f"scala{stage}.{j}.op"), gated)
        expected.append(keys(f"fc{stage}").linear(gated.mean((2, 3))))
    assert_same_logits(model, input, expected)


@pytest.mark.parametrize(
    ("name", "options"),
    [("msdnet_cifar", {}), ("msdnet_cifar", {"bottleneck": False}), ("msdnet_imagenet", {"growth": 4, "channels": 4})],
)
def test_msdnet_as_published(name, options):
    need(name)
    model = create_model(name, num_classes=5, dtype=torch.float64, **options)
    checkpoint = checkpoint_for(model)
    load_official_state_dict(model, checkpoint)
    is_large = name == "msdnet_imagenet"
    keys, input = Keys(checkpoint), torch.randn(2, 3, *([64, 64] if is_large else [32, 32]), dtype=torch.float64)

    def unit(keys, input, stride=1, first=0):
        conv = keys(str(first))
        output = conv.conv(input, stride=stride, padding=conv["weight"].size(2) // 2)
        return keys(str(first + 1)).bn(output).relu()

    def path(keys, input, stride=1):
        if "3" not in keys:
            return unit(keys, input, stride)
        return unit(keys, unit(keys, input), stride, first=3)

    scales, expected = [], []
    for k in range(model.num_exits):
        index = 0
        while f"blocks.{k}.{index}" in keys:
            layer = keys(f"blocks.{k}.{index}")
            if (k, index) == (0, 0):
                if is_large:
                    scales = [F.max_pool2d(unit(layer("layers.0"), input, 2), 3, 2, 1)]
                else:
                    scales = [unit(layer("layers.0.net"), input)]
                while f"layers.{len(scales)}" in layer:
                    scales.append(unit(layer(f"layers.{len(scales)}.net"), scales[-1], 2))
            elif "m" in layer:
                scales = [unit(layer(f"m.{s}.net"), scale) for s, scale in enumerate(scales)]
            else:
                kept = sum(f"layers.{s}" in layer for s in range(len(scales)))
                made = []
                for s, scale in enumerate(scales[len(scales) - kept :]):
                    parts, this = [scale], layer(f"layers.{s}")
                    if "conv_down" in this:
                        parts.append(path(this("conv_down.net"), scales[len(scales) - kept + s - 1], 2))
                    made.append(torch.cat([*parts, path(this("conv_normal.net"), scale)], 1))
                scales = made
            index += 1
        head = keys(f"classifier.{k}")
        hidden = unit(head("m.1.net"), unit(head("m.0.net"), scales[-1], 2), 2)
        expected.append(head("linear.1").linear(hidden.mean((2, 3))))
    assert_same_logits(model, input, expected)


def test_vit_as_published():
    need("vit_tiny_patch16_224")
    import timm

    options = {"num_classes": 5, "img_size": 32, "depth": 5, "embed_dim": 24, "num_heads": 3}
    model = create_model("vit_tiny_patch16_224", start_block=2, dtype=torch.float64, **options)
    checkpoint = checkpoint_for(model)
    load_official_state_dict(model, checkpoint)
    stock = timm.create_model("vit_tiny_patch16_224", **options).double().eval()
    prefix = "backbone_model."
    stock.load_state_dict({key[len(prefix) :]: value for key, value in checkpoint.items() if key.startswith(prefix)})
    input, outputs = torch.randn(2, 3, 32, 32, dtype=torch.float64), []
    for block in stock.blocks:
        block.register_forward_hook(lambda _m, _i, output: outputs.append(output))
    last, keys = stock(input), Keys(checkpoint)
    expected = [
        keys(f"middle_heads.{k}").linear(keys(f"middle_norms.{k}").norm(tokens, 1e-6)[:, 0])
        for k, tokens in enumerate(outputs[2:4])
    ]
    assert_same_logits(model, input, [*expected, last])


def test_vit_whose_two_copies_differ():
    need("vit_tiny_patch16_224")
    options = {"num_classes": 5, "img_size": 32, "depth": 3, "embed_dim": 24, "num_heads": 3, "start_block": 1}
    model = create_model("vit_tiny_patch16_224", **options)
    checkpoint = random_checkpoint(shapes_of(model))
    checkpoint["blocks.1.attn.qkv.weight"] = checkpoint["blocks.1.attn.qkv.weight"] + 1
    with pytest.raises(
        ValueError,
        match=r"misfits \(1\): blocks\.1\.attn\.qkv\.weight \(ours: blocks\.0\.vit\.blocks\.1\.attn\.qkv\.weight\), "
        r"not the same tensor as backbone_model\.blocks\.1\.attn\.qkv\.weight",
    ):
        load_official_state_dict(model, checkpoint)


def test_bert_as_published():
    need("bert")
    from transformers import BertConfig, BertForSequenceClassification

    sizes = {
        "vocab_size": 50, "hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 3, "intermediate_size": 40,
        "max_position_embeddings": 16,
    }  # fmt: skip
    model = create_model("bert", num_classes=5, config=BertConfig(**sizes), dtype=torch.float64)
    checkpoint = checkpoint_for(model)
    checkpoint["bert.embeddings.position_ids"] = torch.arange(16)[None]  # older transformers saved it
    assert list(load_official_state_dict(model, checkpoint).extras) == ["bert.embeddings.position_ids"]
    stock = BertForSequenceClassification(BertConfig(**sizes, num_labels=5)).double().eval()
    mine = stock.state_dict().keys()
    stock.load_state_dict({key: value for key, value in checkpoint.items() if key in mine})
    ids = torch.randint(50, (3, 9))
    output, keys = stock(ids, output_hidden_states=True), Keys(checkpoint)
    expected = [
        keys(f"middle_classifier_layers.{k}").linear(
            keys(f"middle_pooler_layers.{k}.dense").linear(hidden[:, 0]).tanh()
        )
        for k, hidden in enumerate(output.hidden_states[1:-1])
    ]
    assert_same_logits(model, ids, [*expected, output.logits])
