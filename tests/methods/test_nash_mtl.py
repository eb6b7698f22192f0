import numpy as np
import pytest
import torch

from dfs_engine.methods import NashMTL, NashMTLConfig, create_method
from dfs_engine.methods.nash_mtl import bargaining_weights

optimize = pytest.importorskip("scipy.optimize")


def bargain(gramian):
    """G alpha = 1 / alpha, by a general root finder over the logarithms of alpha."""
    start = -np.log(np.sqrt(np.diag(gramian)))
    found = optimize.root(lambda log: np.exp(log) * (gramian @ np.exp(log)) - 1, start, tol=1e-13)
    assert found.success
    return np.exp(found.x)


def draw(num_gradients, length=40):
    generator = np.random.default_rng(torch.initial_seed() % 2**32)
    return generator.normal(size=(num_gradients, length)) + 0.5 * generator.normal(size=length)


@pytest.mark.parametrize("size", [1e-6, 1.0, 1e6])
@pytest.mark.parametrize("num_gradients", [1, 2, 3, 7, 13])
def test_weights_solve_the_equation(num_gradients, size):
    gradients = draw(num_gradients) * size
    gramian = gradients @ gradients.T
    alpha = bargaining_weights(gramian)
    np.testing.assert_allclose(alpha * (gramian @ alpha), 1, rtol=1e-9)
    np.testing.assert_allclose(alpha, bargain(gramian), rtol=1e-8)
    assert np.linalg.norm(alpha @ gradients) == pytest.approx(num_gradients**0.5)


def test_start_does_not_matter():
    gradients = draw(7)
    gramian = gradients @ gradients.T
    starts = (np.ones(7), np.array([1e-4, 1e4, 1, 1, 1e-4, 1e4, 1.0]))
    np.testing.assert_allclose(*(bargaining_weights(gramian, start) for start in starts), rtol=1e-9)


def test_scale_of_one_gradient_does_not_matter():
    """The bargaining solution is invariant to it: axiom 4 of the paper."""
    gradients = draw(4)
    scaled = gradients * np.array([[1.0], [10.0], [0.1], [1.0]])
    one, other = (bargaining_weights(g @ g.T) @ g for g in (gradients, scaled))
    np.testing.assert_allclose(one, other, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("kind", ["zero", "one absent", "opposed", "equal"])
def test_degenerate_gradients_get_bounded_weights(kind):
    gradients = draw(4)
    if kind in ("zero", "one absent"):
        gradients[slice(None) if kind == "zero" else 1] = 0
    if kind == "opposed":
        gradients[1] = -gradients[0]
    if kind == "equal":
        gradients[:] = gradients[0]
    gramian = gradients @ gradients.T
    alpha = bargaining_weights(gramian)
    bound = 2000 / np.sqrt(np.trace(gramian) / 4) if kind != "zero" else 1
    assert (alpha > 0).all()
    assert alpha.max() <= bound
    assert np.linalg.norm(alpha @ gradients) <= 2 * (1 + 1e-9)
    if kind == "equal":
        np.testing.assert_allclose(alpha * (gramian @ alpha), 1, rtol=1e-9)


@pytest.mark.parametrize("max_norm", [1.0, 0.0, 100.0])
def test_step(example, update, rows_of, flattened, assert_update_is, max_norm):
    model, inputs, target = example
    rows = rows_of(model, inputs, target)
    gradients = flattened(rows)
    alpha = torch.from_numpy(bargain((gradients @ gradients.T).numpy()))
    expected = alpha @ gradients
    torch.testing.assert_close(expected.norm().item(), model.num_exits**0.5)
    if max_norm == 1.0:
        expected /= expected.norm()
    heads = {name: sum(a * row[name] for a, row in zip(alpha, rows, strict=True)) for name in rows[0]}
    method = create_method("nash_mtl", model, max_norm=max_norm)
    assert_update_is(update(model, method, inputs, target), expected, rows, heads=heads)
    torch.testing.assert_close(method.alpha, alpha)


def test_weights_may_be_kept_for_some_steps(toy, update, rows_of, flattened, assert_update_is):
    model, inputs, target = toy()
    method = create_method("nash_mtl", model, update_weights_every=2)
    update(model, method, inputs, target)
    kept = method.alpha.clone()
    rows = rows_of(model, inputs, target)
    heads = {name: sum(a * row[name] for a, row in zip(kept, rows, strict=True)) for name in rows[0]}
    expected = kept @ flattened(rows)
    expected /= expected.norm().clamp(min=1)
    moved = update(model, method, inputs, target, micro_batch_size=4)
    assert_update_is(moved, expected, rows, heads=heads)
    assert torch.equal(method.alpha, kept)
    update(model, method, inputs, target)
    assert not torch.equal(method.alpha, kept)
    assert method.num_steps == 3


def test_state_is_in_the_state_dict():
    method = NashMTL(3)
    assert {name: tuple(value.shape) for name, value in method.state_dict().items()} == {"alpha": (3,), "num_steps": ()}
    assert not list(method.parameters())


def test_bad_options():
    with pytest.raises(ValueError, match=r"nash_mtl\.max_norm: expected a number >= 0, got -1"):
        NashMTLConfig(max_norm=-1.0)
    with pytest.raises(ValueError, match=r"nash_mtl\.update_weights_every: expected a number >= 1, got 0"):
        NashMTLConfig(update_weights_every=0)
