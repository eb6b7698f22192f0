import pytest
import torch
import torch.nn.functional as F

from dfs_engine.methods import BYOT, ByotConfig, create_method, feature_widths
from dfs_engine.models import create_model, list_models

WIDTHS = (3, 4, 5)


@pytest.fixture
def exits():
    """(logits, target, features, pooled features) of three exits."""
    logits = [torch.randn(6, 7, dtype=torch.float64, requires_grad=True) for _ in WIDTHS]
    features = [torch.randn(6, width, 2, 3, dtype=torch.float64, requires_grad=True) for width in WIDTHS]
    return logits, torch.randint(7, (6,)), features, [feature.mean((2, 3)) for feature in features]


@pytest.mark.parametrize("t2", [False, True])
@pytest.mark.parametrize("squared", [False, True])
def test_loss_is_the_naive_expression(exits, t2, squared):
    logits, target, features, pooled = exits
    config = ByotConfig(alpha=0.4, temperature=2.5, lam=0.07, t2=t2, squared=squared)
    method = BYOT(WIDTHS, config).double()
    expected = F.nll_loss(logits[2].log_softmax(1), target)
    taught = torch.exp(logits[2] / 2.5) / torch.exp(logits[2] / 2.5).sum(1, keepdim=True)
    for index in range(2):
        expected = expected + 0.6 * F.nll_loss(logits[index].log_softmax(1), target)
        soft = -(taught * (logits[index] / 2.5).log_softmax(1)).sum(1).mean()
        expected = expected + 0.4 * soft * (2.5**2 if t2 else 1)
        adapter = method.adapters[index]
        distance = ((pooled[index] @ adapter.weight.T + adapter.bias - pooled[2]) ** 2).sum()
        expected = expected + 0.07 * (distance if squared else distance.sqrt())
    torch.testing.assert_close(method(logits, target, features), expected)


def test_defaults_are_the_published_ones():
    config = ByotConfig()
    assert (config.alpha, config.temperature, config.lam, config.t2, config.squared) == (0.3, 3.0, 0.03, False, False)


def test_the_teacher_learns_from_the_labels_alone_and_adapters_from_the_distance(exits):
    logits, target, features, _ = exits
    method = BYOT(WIDTHS).double()
    method(logits, target, features).backward()
    of_labels = (logits[2].softmax(1) - F.one_hot(target, 7)).detach() / 6
    torch.testing.assert_close(logits[2].grad, of_labels)
    assert features[2].grad is None
    assert all(feature.grad.abs().sum() > 0 for feature in features[:2])
    assert all(parameter.grad.abs().sum() > 0 for parameter in method.parameters())


def test_tokens_are_averaged_over_their_positions(exits):
    logits, target, features, _ = exits
    method = BYOT(WIDTHS).double()
    tokens = [feature.flatten(2).transpose(1, 2) for feature in features]
    torch.testing.assert_close(method(logits, target, tokens), method(logits, target, features))


def test_averages_are_taken_as_they_come(exits):
    logits, target, features, pooled = exits
    method = BYOT(WIDTHS).double()
    torch.testing.assert_close(method(logits, target, pooled), method(logits, target, features))


def test_without_lam_there_is_nothing_to_adapt(exits):
    logits, target, *_ = exits
    method = BYOT(WIDTHS, ByotConfig(lam=0.0))
    assert not method.needs_features
    assert list(method.parameters()) == []
    assert method(logits, target).isfinite()


def test_built_for_a_model_which_stays_as_it_is():
    model = create_model("vgg7_64", width=4).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert feature_widths(model, "exits") == [4, 4, 8, 8, 16, 16]
    method = create_method("byot", model, alpha=0.5)
    assert method.config.alpha == 0.5
    assert [tuple(adapter.weight.shape) for adapter in method.adapters] == [
        (256, 16 * width) for width in (4, 4, 8, 8, 16)
    ]
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    logits, features = method.run(model, torch.randn(2, 3, 8, 8))
    assert [tuple(feature.shape) for feature in features[:2]] == [(2, 4, 8, 8), (2, 4, 4, 4)]
    method(logits, torch.tensor([1, 2]), features).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize(
    ("option", "value"), [("alpha", 1.5), ("temperature", 0.0), ("lam", -1.0), ("lam", float("nan"))]
)
def test_bad_options(option, value):
    with pytest.raises(ValueError, match=rf"byot.{option}: expected a number"):
        ByotConfig(**{option: value})


def test_unknown_features():
    with pytest.raises(ValueError, match=r"byot\.features: expected one of blocks, exits, got 'stages'"):
        ByotConfig(features="stages")
    with pytest.raises(ValueError, match="return_features: expected one of blocks, exits, got 'stages'"):
        create_model("vgg7_64", width=2)(torch.randn(1, 3, 8, 8), return_features="stages")


@pytest.mark.parametrize("fd_skip", [False, True])
def test_the_second_deepest_exit_may_be_left_out(exits, fd_skip):
    logits, target, features, pooled = exits
    method = BYOT(WIDTHS, ByotConfig(fd_skip=fd_skip)).double()
    distances = method.distances(features)
    expected = [
        (pooled[k] @ adapter.weight.T + adapter.bias - pooled[2]).norm() for k, adapter in enumerate(method.adapters)
    ]
    torch.testing.assert_close(distances, expected[: 1 if fd_skip else 2])
    method(logits, target, features).backward()
    assert (features[1].grad is None) == fd_skip
    assert [adapter.weight.grad is None for adapter in method.adapters] == [False, fd_skip]


# What is compared, family by family.

SMALL = {
    "vgg7_64": ({"width": 8}, 32),
    "vgg16_64": ({"width": 2}, 32),
    "resnet18": ({"width": 8}, 32),
    "msdnet_cifar": ({"channels": 4, "growth": 4, "num_exits": 3}, 32),
    "vit_tiny_patch16_224": (
        {"img_size": 32, "depth": 4, "embed_dim": 24, "num_heads": 3, "start_block": 1, "patch_size": 8},
        32,
    ),
    "bert": (
        {"config": {"vocab_size": 20, "hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 3}},
        None,
    ),
}


def make(name: str, **options):
    if not list_models(name):
        pytest.skip(f"no model {name}")
    if name == "bert":
        pytest.importorskip("transformers")
    own, size = SMALL[name]
    model = create_model(name, num_classes=5, dtype=torch.float64, **own, **options)
    input = torch.randint(20, (4, 7)) if size is None else torch.randn(4, 3, size, size, dtype=torch.float64)
    return model, input


def test_published_adapters():
    """Shapes as in the published checkpoints (tests/models/official_state_dicts.json)."""
    with torch.device("meta"):
        vgg7 = create_method("byot", create_model("vgg7_64", num_classes=100))
        resnet = create_method("byot", create_model("resnet18", num_classes=100))
    shapes = [list(adapter.weight.shape) for adapter in vgg7.adapters]
    assert shapes == [[4096, width] for width in (1024, 1024, 2048, 2048, 4096)]
    assert all(adapter.bias is None for adapter in vgg7.adapters)
    assert sum(parameter.numel() for parameter in vgg7.parameters()) == 41_943_040
    assert [list(adapter.weight.shape) for adapter in resnet.adapters] == [[512, 512]] * 3
    assert [list(adapter.bias.shape) for adapter in resnet.adapters] == [[512]] * 3


@pytest.mark.parametrize("variant", ["dense", "detach", "split", "dfs"])
def test_resnet_compares_what_its_linear_layers_read(variant):
    model, images = make("resnet18", variant=variant)
    method = create_method("byot", model).double()
    logits, features = method.run(model, images)
    assert [tuple(feature.shape) for feature in features] == [(4, 64)] * 4
    for exit, feature, exit_logits in zip(model.exits, features, logits, strict=True):
        torch.testing.assert_close(F.linear(feature, exit.linear.weight, exit.linear.bias), exit_logits)
    for k, distance in enumerate(method.distances(features)):
        adapter = method.adapters[k]
        expected = (features[k] @ adapter.weight.T + adapter.bias - features[3]).norm()
        torch.testing.assert_close(distance, expected)


@pytest.mark.parametrize("name", ["vgg7_64", "vgg16_64"])
def test_vgg_compares_whole_features_pooled_to_one_size(name):
    model, images = make(name)
    method = create_method("byot", model).double()
    _, features = method.run(model, images)
    side = {"vgg7_64": 4, "vgg16_64": 1}[name]
    flat = [F.adaptive_avg_pool2d(feature, side).flatten(1) for feature in features]
    for k, distance in enumerate(method.distances(features)):
        torch.testing.assert_close(distance, (flat[k] @ method.adapters[k].weight.T - flat[-1]).norm())


def gradients_of_features(model, method, input, index):
    """Of one exit's distance: the gradient that each block's feature gets."""
    features = []
    hook = model.fork.register_forward_pre_hook(lambda _, args: features.append(args[0]))
    try:
        _, compared = method.run(model, input)
    finally:
        hook.remove()
    distance = method.distances(compared)[index]
    return torch.autograd.grad(distance, features, allow_unused=True, retain_graph=True), distance


@pytest.mark.parametrize("reference", [True, False])
@pytest.mark.parametrize("variant", ["detach", "split", "dfs"])
@pytest.mark.parametrize("index", [0, 1, 2])
def test_resnet_sends_exactly_zero_to_f_plus(variant, reference, index):
    """The exit's own feature is behind its attention and convolutions, which read f- with gradient alone."""
    model, images = make("resnet18", variant=variant, reference=reference, beta=0.375)
    method = create_method("byot", model).double()
    gradients, _ = gradients_of_features(model, method, images, index)
    for k, gradient in enumerate(gradients):
        if k > index:
            assert gradient is None or gradient.abs().max() == 0
            continue
        num_shared = round(0.375 * gradient.size(1))
        # Its own feature it trains as the exit does; those before it as the deeper path does.
        theirs, own = gradient[:, :num_shared], gradient[:, num_shared:]
        zero, trained = (theirs, own) if k == index else (own, theirs)
        assert zero.abs().max() == 0
        assert trained.abs().max() > 0


def test_vgg_sends_gradient_to_f_plus():
    """As published."""
    model, images = make("vgg7_64", variant="detach")
    method = create_method("byot", model).double()
    _, features = method.run(model, images)
    (gradient,) = torch.autograd.grad(method.distances(features)[1], features[1])
    assert gradient[:, :4].abs().max() > 0
    assert gradient[:, 4:].abs().max() > 0


@pytest.mark.parametrize("name", ["vgg7_64", "resnet18", "msdnet_cifar", "vit_tiny_patch16_224", "bert"])
def test_exits_features_in_every_family(name):
    """What the last layer reads, from the fused form, with the gradients of the published formulation."""
    results = []
    for variant in ("detach", "dfs"):
        torch.manual_seed(0)
        model, input = make(name, variant=variant)
        torch.manual_seed(1)
        method = create_method("byot", model, features="exits").double()
        torch.manual_seed(2)
        input = torch.randn_like(input) if input.is_floating_point() else torch.randint(20, input.shape)
        model.eval()  # no dropout, which draws other elements in other variants
        logits, features = method.run(model, input)
        torch.testing.assert_close(logits, model(input))
        method(logits, torch.arange(4), features).backward()
        results.append((features, {key: value.grad for key, value in model.named_parameters()}))
    (features, gradients), (others, dfs_gradients) = results
    assert all(feature.dim() == 2 for feature in features)
    torch.testing.assert_close(others, features)
    for key, gradient in gradients.items():
        if gradient is not None:
            torch.testing.assert_close(dfs_gradients[key], gradient, msg=key)
