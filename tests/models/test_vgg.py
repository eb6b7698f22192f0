"""VGG: the published architecture (docs/method.md)."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dfs_engine import create_model, to_official_state_dict
from dfs_engine.validate.tolerances import assert_close

LAYOUT = {"vgg7_64": [64, 64, 128, 128, 256, 256], "vgg16_64": [64] * 2 + [128] * 2 + [256] * 3 + [512] * 6}
POOLED = {"vgg7_64": [1, 3, 5], "vgg16_64": [1, 3, 6, 9, 12]}


@pytest.mark.parametrize(("name", "size"), [("vgg7_64", 32), ("vgg16_64", 224)])
def test_published_sizes(name, size):
    with torch.device("meta"):
        model = create_model(name)
    assert model.input_shape == (3, size, size)
    assert model.num_exits == len(LAYOUT[name])
    shapes = {key: tuple(parameter.shape) for key, parameter in model.named_parameters()}
    convs = [shape for key, shape in shapes.items() if len(shape) == 4]
    assert convs == [(out, into, 3, 3) for out, into in zip(LAYOUT[name], [3, *LAYOUT[name]], strict=False)]
    heads = [shape for shape in shapes.values() if len(shape) == 2]
    assert heads == [(10, channels) for channels in LAYOUT[name]]
    # The first convolution alone has a bias; BatchNorm has a weight and a bias each.
    assert sum(len(shape) == 1 for shape in shapes.values()) == 1 + 2 * model.num_exits


@pytest.mark.parametrize("name", LAYOUT)
def test_forward_is_conv_relu_bn_pool_written_out(name):
    """From the parameters in their order alone, so that the module layout may change and the function may not."""
    model = create_model(name, width=4, num_classes=3, dtype=torch.float64)
    input = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    logits, features = model(input, return_features=True)
    convs = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    heads = [module for module in model.modules() if isinstance(module, nn.Linear)]
    feature = input
    for index, (conv, norm, head) in enumerate(zip(convs, norms, heads, strict=True)):
        feature = F.relu(F.conv2d(feature, conv.weight, conv.bias, padding=1))
        feature = F.batch_norm(feature, None, None, norm.weight, norm.bias, training=True)
        if index in POOLED[name]:
            feature = F.max_pool2d(feature, 2)
        assert_close(f"feature {index}", features[index], feature)
        assert_close(f"logits {index}", logits[index], feature.mean((2, 3)) @ head.weight.t())


@pytest.mark.parametrize("variant", ["dense", "dfs"])
def test_evaluation_uses_running_statistics(variant):
    model = create_model("vgg7_64", width=4, variant=variant, dtype=torch.float64)
    images = torch.randn(6, 3, 16, 16, dtype=torch.float64)
    model(images)
    assert all(norm.num_batches_tracked == 1 for norm in model.modules() if isinstance(norm, nn.BatchNorm2d))
    model.eval()
    together = model(images)
    alone = [model(image[None]) for image in images]
    for index, logits in enumerate(together):
        assert_close(f"logits {index}", torch.cat([one[index] for one in alone]), logits)


def test_options():
    model = create_model("vgg7_64", width=2, in_channels=1)
    assert model.input_shape == (1, 32, 32)
    assert len(model(torch.randn(2, 1, 20, 28))) == 6


@pytest.mark.parametrize("beta", [0.1, 0.5, 1.0])
def test_published_start(beta):
    """The published code's layers, made one after the other from one seed: each part has its own fan-in."""
    torch.manual_seed(3)
    model = create_model("vgg7_64", width=8, num_classes=5, beta=beta)
    tensors = to_official_state_dict(model)
    torch.manual_seed(3)
    first = nn.Conv2d(3, 8, 3, padding=1)
    expected = {"feature_extractors.0.0.weight": first.weight, "feature_extractors.0.0.bias": first.bias}
    channels = None
    for index, width in enumerate([8, 8, 16, 16, 32, 32]):
        parts = {}
        if channels is not None:
            num_shared = round(beta * channels)
            for name, number in (("conv_p", num_shared), ("conv_s", channels - num_shared)):
                if number > 0:
                    parts[f"feature_extractors.{index}.{name}"] = nn.Conv2d(number, width, 3, bias=False)
        channels, num_shared = width, round(beta * width)
        for name, number in (("fc_s", width - num_shared), ("fc_p", num_shared)):
            if number > 0:
                parts[f"classifers.{index}.{name}"] = nn.Linear(number, 5, bias=False)
        expected |= {f"{key}.weight": part.weight for key, part in parts.items()}
    for key, value in expected.items():
        assert torch.equal(tensors[key], value), key
    empty = [key for key, value in tensors.items() if value.numel() == 0]
    others = {key for key in tensors if ".bn." not in key and not key.startswith("feature_extractors.0.2.")}
    assert others == expected.keys() | set(empty)


@pytest.mark.parametrize("init", ["published", "torch"])
def test_the_start_is_the_same_in_every_variant(init):
    def weights(**options):
        torch.manual_seed(0)
        return create_model("vgg7_64", width=4, init=init, **options).state_dict()

    expected = weights(variant="dense")
    for options in ({"variant": "detach"}, {"variant": "split"}, {"variant": "dfs"}, {"reference": False}):
        assert all(torch.equal(value, expected[key]) for key, value in weights(**options).items())


def test_torch_start_is_that_of_whole_layers():
    torch.manual_seed(5)
    model = create_model("vgg7_64", width=4, num_classes=3, init="torch")
    torch.manual_seed(5)
    for into, out, conv, head in zip(
        [3, 4, 4, 8, 8, 16], [4, 4, 8, 8, 16, 16], [block.conv for block in model.blocks], model.exits, strict=True
    ):
        assert torch.equal(conv.weight, nn.Conv2d(into, out, 3, bias=into == 3).weight)
        assert torch.equal(head.linear.weight, nn.Linear(out, 3, bias=False).weight)


def test_config_says_which_start_it_was():
    for init in ("published", "torch"):
        model = create_model("vgg7_64", width=4, init=init)
        assert model.get_config()["init"] == init
        assert create_model(**model.get_config()).get_config() == model.get_config()
    assert create_model("vgg7_64", width=4).get_config()["init"] == "published"
    with pytest.raises(ValueError, match="init: expected one of published, torch, got 'kaiming'"):
        create_model("vgg7_64", init="kaiming")
