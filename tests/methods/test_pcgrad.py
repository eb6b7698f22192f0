import pytest
import torch

from dfs_engine.methods import PCGrad, PCGradConfig, create_method
from dfs_engine.methods.pcgrad import projected_weights


def project(gradients, orders):
    """Algorithm 1 of the paper, on vectors."""
    total = torch.zeros_like(gradients[0])
    for i, order in enumerate(orders):
        d = gradients[i].clone()
        for j in order:
            if j != i and torch.dot(d, gradients[j]) < 0:
                d = d - torch.dot(d, gradients[j]) / gradients[j].square().sum() * gradients[j]
        total += d
    return total


def drawn_orders(num_exits, seed):
    torch.manual_seed(seed)
    return [torch.randperm(num_exits).tolist() for _ in range(num_exits)]


@pytest.mark.parametrize("num_gradients", [2, 3, 7, 13])
def test_weights_are_the_algorithm_on_vectors(num_gradients):
    gradients = torch.randn(num_gradients, 20, dtype=torch.float64)
    gradients -= gradients.mean(0)  # so that there are conflicts
    orders = drawn_orders(num_gradients, 3)
    weights = projected_weights(gradients @ gradients.T, orders)
    torch.testing.assert_close(weights @ gradients, project(gradients, orders))
    assert not torch.allclose(weights, torch.ones(num_gradients, dtype=torch.float64))


def test_without_conflicts_it_is_the_sum():
    gradients = torch.rand(5, 20, dtype=torch.float64)
    assert torch.equal(projected_weights(gradients @ gradients.T, [range(5)] * 5), torch.ones(5, dtype=torch.float64))


def test_the_result_points_against_none_of_two():
    first, second = torch.randn(2, 20, dtype=torch.float64)
    second -= 2 * first
    gradients = torch.stack([first, second])
    direction = projected_weights(gradients @ gradients.T, [range(2)] * 2) @ gradients
    assert (gradients @ direction > 0).all()


def test_absent_gradients_do_no_harm():
    gradients = torch.randn(4, 20, dtype=torch.float64)
    gradients[1] = 0
    orders = drawn_orders(4, 0)
    weights = projected_weights(gradients @ gradients.T, orders)
    assert weights.isfinite().all()
    torch.testing.assert_close(weights @ gradients, project(gradients[[0, 2, 3]], _without(orders, 1)))


def _without(orders, index):
    kept = [order for i, order in enumerate(orders) if i != index]
    return [[j - (j > index) for j in order if j != index] for order in kept]


@pytest.mark.parametrize("include_heads", [False, True])
@pytest.mark.parametrize("reduction", ["sum", "mean", "port"])
def test_step(example, update, rows_of, flattened, assert_update_is, reduction, include_heads):
    model, inputs, target = example
    rows = rows_of(model, inputs, target)
    gradients = flattened(rows, include_heads)
    expected = project(gradients, drawn_orders(model.num_exits, 5))
    if reduction == "mean":
        expected /= model.num_exits
    if reduction == "port":
        flags = [torch.full_like(g, name.startswith("blocks.0.")) for name, g in rows[0].items()]
        (everywhere,) = flattened([dict(zip(rows[0], flags, strict=True))], include_heads)
        expected = torch.where(everywhere > 0, expected / model.num_exits, expected)
    method = create_method("pcgrad", model, reduction=reduction, include_heads=include_heads)
    torch.manual_seed(5)
    assert_update_is(update(model, method, inputs, target), expected, rows, include_heads)


def test_order_is_reproducible_by_seed():
    gradients = torch.randn(7, 10, dtype=torch.float64)
    gramian, method = gradients @ gradients.T, PCGrad()
    results = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        results.append(method.weights(gramian))
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])


def test_bad_options():
    with pytest.raises(ValueError, match=r"pcgrad\.reduction: expected one of sum, mean, port, got 'meen'"):
        PCGradConfig(reduction="meen")
