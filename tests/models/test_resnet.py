"""ResNet: the published architecture and routing (docs/method.md)."""

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dfs_engine import create_model
from dfs_engine.evaluation.flops import count_flops
from dfs_engine.validate.tolerances import assert_close, gradient_scale

NAMES = ("resnet18", "resnet34", "resnet50")
# Parameters of the published backbones for 1000 classes (torchvision's counts), which our last exit's path has to have.
BACKBONES = {"resnet18": 11_689_512, "resnet34": 21_797_672, "resnet50": 25_557_032}
# The paper's table for CIFAR-100 at 32 pixels, each exit alone: M FLOPs (a multiply-add is one) and M parameters.
PUBLISHED_FLOPS = (169.62, 300.22, 431.05, 559.75)
PUBLISHED_PARAMETERS = (0.43, 0.96, 3.11, 11.17)


def sep_conv(in_channels, out_channels):
    """Shapes of a published separable convolution's tensors, in their order."""
    norm = lambda channels: [(channels,)] * 4 + [()]  # noqa: E731
    half = [(in_channels, 1, 3, 3)]
    first, second = [(in_channels, in_channels, 1, 1)], [(out_channels, in_channels, 1, 1)]
    return [*half, *first, *norm(in_channels), *half, *second, *norm(out_channels)]


def test_an_exit_holds_the_published_tensors():
    with torch.device("meta"):
        model = create_model("resnet18", num_classes=100)
    for index, exit in enumerate(model.exits[:-1]):
        widths = [64 << depth for depth in range(index, 4)]
        expected = sep_conv(widths[0], widths[0]) + [(widths[0],)] * 4 + [()]
        for pair in pairwise(widths):
            expected += sep_conv(*pair)
        shapes = [tuple(tensor.shape) for tensor in exit.state_dict().values()]
        assert shapes == [*expected, (100, 512), (100,)]
    assert [tuple(tensor.shape) for tensor in model.exits[-1].state_dict().values()] == [(100, 512), (100,)]


@pytest.mark.parametrize("name", NAMES)
def test_backbone_is_the_published_one(name):
    with torch.device("meta"):
        model = create_model(name, num_classes=1000, stem="imagenet")
    assert sum(parameter.numel() for parameter in model.reached_parameters(3)) == BACKBONES[name]
    assert model.num_exits == 4
    assert [exit.linear.in_features for exit in model.exits] == [2048 if name == "resnet50" else 512] * 4
    assert not any(conv.bias is not None for conv in model.modules() if isinstance(conv, nn.Conv2d))


@pytest.mark.parametrize(("stem", "size"), [("cifar", 32), ("imagenet", 224)])
def test_stems(stem, size):
    with torch.device("meta"):
        model = create_model("resnet18", stem=stem)
        assert model.input_shape == (3, size, size)
        _, features = model(torch.randn(2, 3, size, size), return_features=True)
    finest = size if stem == "cifar" else size // 4
    shapes = [(2, 64 << index, finest >> index, finest >> index) for index in range(4)]
    assert [tuple(feature.shape) for feature in features] == shapes
    assert model.get_config()["stem"] == stem


def test_bad_stem():
    with pytest.raises(ValueError, match=r"stem: expected one of cifar, imagenet, got 'imagnet'\. Did you mean"):
        create_model("resnet18", stem="imagnet")


def test_counts_of_the_published_table():
    """Each exit alone: the blocks up to it, and its own head. The table's parameters are without the last linear layer.

    Convolutions and linear layers are counted, a multiply-add as one: 0.8 to 2.6 % below the table. ReLU, pooling and
    the gate would add less than 0.4 %; what else the table counts is not known.
    """
    model = create_model("resnet18", num_classes=100, variant="dense").eval()
    counts = {}

    def count(module, inputs, output):
        if isinstance(module, nn.Conv2d):
            counts[module] = output[0].numel() * module.weight[0].numel()
        else:
            counts[module] = module.in_features * module.out_features + module.out_features

    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            module.register_forward_hook(count)
    model(torch.randn(1, 3, 32, 32))
    for index, exit in enumerate(model.exits):
        path = [*model.blocks[: index + 1], exit]
        flops = sum(counts.get(module, 0) for part in path for module in part.modules())
        assert flops == pytest.approx(1e6 * PUBLISHED_FLOPS[index], rel=0.03)
        parameters = sum(parameter.numel() for parameter in model.reached_parameters(index))
        parameters -= sum(parameter.numel() for parameter in exit.linear.parameters())
        assert parameters == pytest.approx(1e6 * PUBLISHED_PARAMETERS[index], rel=0.03)


class WrittenOut:
    """The published network in stock functions, from parameters by name; routing by masks."""

    def __init__(self, parameters, beta, reference):
        self.parameters, self.beta, self.reference = parameters, beta, reference

    def norm(self, x, name):
        return F.batch_norm(x, None, None, self.parameters[f"{name}.weight"], self.parameters[f"{name}.bias"], True)

    def conv(self, x, name, stride=1, groups=1):
        weight = self.parameters[f"{name}.weight"]
        return F.conv2d(x, weight, None, stride, weight.size(-1) // 2, 1, groups)

    def conv_norm(self, x, name, stride=1):
        return self.norm(self.conv(x, f"{name}.conv", stride), f"{name}.bn")

    def residual_block(self, x, name, stride):
        shortcut = x
        if f"{name}.shortcut_conv.weight" in self.parameters:
            shortcut = self.norm(self.conv(x, f"{name}.shortcut_conv", stride), f"{name}.shortcut_bn")
        num_convs = sum(f"{name}.layers.{index}.conv.weight" in self.parameters for index in range(3))
        for index in range(num_convs):
            here = stride if index == num_convs - 2 else 1  # the first of two 3x3, the only one of a bottleneck
            x = self.conv_norm(x, f"{name}.layers.{index}", here)
            x = F.relu(x + shortcut if index == num_convs - 1 else x)
        return x

    def sep_conv(self, x, name):
        for half, stride in ((1, 2), (2, 1)):
            x = self.conv(x, f"{name}.depthwise{half}", stride, groups=x.size(1))
            x = F.relu(self.conv_norm(x, f"{name}.pointwise{half}"))
        return x

    def exit(self, x, name, num_sep_convs):
        if num_sep_convs:
            gate = F.relu(self.norm(self.sep_conv(x, f"{name}.gate"), f"{name}.gate_bn"))
            x = torch.sigmoid(nn.Upsample(scale_factor=2, mode="bilinear")(gate)) * x
        for index in range(num_sep_convs):
            x = self.sep_conv(x, f"{name}.sep_convs.{index}")
        return F.linear(
            x.mean((2, 3)), self.parameters[f"{name}.linear.weight"], self.parameters[f"{name}.linear.bias"]
        )

    def readers(self, feature):
        """[f+, sg(f-)] for the next stage and [sg(f+), f-] for the exit; without referencing zero for sg."""
        mask = torch.zeros(feature.size(1), 1, 1, dtype=feature.dtype)
        mask[: round(self.beta * feature.size(1))] = 1
        return tuple(feature * m + feature.detach() * (1 - m) * self.reference for m in (mask, 1 - mask))

    def __call__(self, images, blocks_per_stage, large):
        x = F.relu(self.conv_norm(images, "blocks.0.stem", 2 if large else 1))
        x = F.max_pool2d(x, 3, 2, 1) if large else x
        logits = []
        for stage, num_blocks in enumerate(blocks_per_stage):
            for index in range(num_blocks):
                name = f"blocks.{stage}.residual_blocks.{index}"
                x = self.residual_block(x, name, 2 if stage > 0 and index == 0 else 1)
            x, seen = self.readers(x) if stage < 3 else (x, x)
            logits.append(self.exit(seen, f"exits.{stage}", 3 - stage))
        return logits


@pytest.mark.parametrize("variant", ["detach", "dfs"])
@pytest.mark.parametrize("reference", [True, False], ids=["reference", "no-reference"])
@pytest.mark.parametrize(
    ("name", "blocks_per_stage", "stem", "size"),
    [
        ("resnet18", (2, 2, 2, 2), "cifar", 16),
        ("resnet18", (2, 2, 2, 2), "imagenet", 64),
        ("resnet34", (3, 4, 6, 3), "cifar", 16),
        ("resnet50", (3, 4, 6, 3), "cifar", 16),
    ],
)
def test_logits_and_gradients_are_those_of_the_network_written_out(
    name, blocks_per_stage, stem, size, reference, variant
):
    dd = {"dtype": torch.float64, "num_classes": 3}
    model = create_model(name, width=4, stem=stem, beta=0.3, reference=reference, variant=variant, **dd)
    parameters = {key: value.detach().clone().requires_grad_() for key, value in model.named_parameters()}
    images = torch.randn(6, 3, size, size, dtype=torch.float64)
    logits = model(images)
    expected = WrittenOut(parameters, 0.3, reference)(images, blocks_per_stage, stem == "imagenet")
    weights = torch.randn(4, 6, 3, dtype=torch.float64)
    for index, pair in enumerate(zip(logits, expected, strict=True)):
        assert_close(f"logits {index}", *pair)
    (torch.stack(logits) * weights).sum().backward()
    (torch.stack(expected) * weights).sum().backward()
    scale = gradient_scale(parameter.grad for parameter in parameters.values())
    for key, parameter in model.named_parameters():
        assert_close(key, parameter.grad, parameters[key].grad, scale=scale)


@pytest.mark.parametrize("variant", ["dense", "detach", "split", "dfs"])
def test_odd_sizes(variant):
    """The gate is brought to the feature's size even where that is not twice its own."""
    model = create_model("resnet18", width=4, in_channels=1, variant=variant)
    assert model.input_shape == (1, 32, 32)
    assert [logits.shape for logits in model(torch.randn(2, 1, 21, 19))] == [(2, 10)] * 4


@pytest.mark.parametrize("variant", ["dense", "dfs"])
def test_evaluation_uses_running_statistics(variant):
    model = create_model("resnet18", width=4, variant=variant, dtype=torch.float64)
    images = torch.randn(6, 3, 16, 16, dtype=torch.float64)
    model(images)
    assert all(norm.num_batches_tracked == 1 for norm in model.modules() if isinstance(norm, nn.BatchNorm2d))
    model.eval()
    alone = [model(image[None]) for image in images]
    for index, logits in enumerate(model(images)):
        assert_close(f"logits {index}", torch.cat([one[index] for one in alone]), logits)


def test_backward_of_dfs_computes_less_at_the_forks():
    """Input gradients of the layers that read a split feature: beta of the deeper path's, 1 - beta of the exit's."""

    def flops(variant, beta=0.5):
        model = create_model("resnet18", width=16, variant=variant, beta=beta, backend="aten")
        return count_flops(model, torch.randn(2, 3, 32, 32))

    assert flops("dfs").forward == flops("detach").forward == flops("dense").forward
    saved = 0
    for index, size in enumerate((32, 16, 8)):
        channels, pixels = 16 << index, 2 * (size // 2) ** 2
        saved += 2 * pixels * (9 + 1) * channels * 2 * channels // 2  # conv1 and shortcut of the next stage
        saved += 2 * pixels * 9 * channels // 2  # the gate's first depthwise convolution
    assert flops("detach").backward - flops("dfs").backward == saved
