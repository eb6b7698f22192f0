"""VGG: the published architecture (DESIGN section 2)."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dfs_engine import create_model
from dfs_engine.compare import assert_close

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
