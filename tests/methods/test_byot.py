import pytest
import torch
import torch.nn.functional as F

from dfs_engine.methods import BYOT, ByotConfig, create_method, feature_widths
from dfs_engine.models import create_model

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
    assert feature_widths(model) == [4, 4, 8, 8, 16, 16]
    method = create_method("byot", model, alpha=0.5)
    assert method.config.alpha == 0.5
    assert [tuple(adapter.weight.shape) for adapter in method.adapters] == [(16, width) for width in (4, 4, 8, 8, 16)]
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    logits, features = method.run(model, torch.randn(2, 3, 8, 8))
    method(logits, torch.tensor([1, 2]), features).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize(
    ("option", "value"), [("alpha", 1.5), ("temperature", 0.0), ("lam", -1.0), ("lam", float("nan"))]
)
def test_bad_options(option, value):
    with pytest.raises(ValueError, match=rf"byot.{option}: expected a number"):
        ByotConfig(**{option: value})
