import numpy as np
import pytest
import torch

from dfs_engine.methods import CAGrad, CAGradConfig, create_method
from dfs_engine.methods.cagrad import conflict_averse_weights, simplex_weights

optimize = pytest.importorskip("scipy.optimize")


def direction(gradients, c):
    """d of equation 5, by the official code's solver on vectors."""
    num_exits = len(gradients)
    mean = gradients.mean(0)
    radius = c * np.linalg.norm(mean)

    def dual(w):
        return w @ gradients @ mean + radius * np.linalg.norm(w @ gradients)

    scale = np.square(gradients).sum() / num_exits
    found = optimize.minimize(
        lambda w: dual(w) / scale,
        np.full(num_exits, 1 / num_exits),
        bounds=[(0, 1)] * num_exits,
        constraints={"type": "eq", "fun": lambda w: 1 - w.sum()},
        method="SLSQP",
        options={"ftol": 1e-16, "maxiter": 1000},
    )
    combined = found.x @ gradients
    return mean + radius / np.linalg.norm(combined) * combined


def draw(num_gradients, length=40, spread=0.0):
    generator = np.random.default_rng(torch.initial_seed() % 2**32)
    gradients = generator.normal(size=(num_gradients, length)) + generator.normal(size=length)
    return gradients * 10 ** generator.uniform(-spread, spread, size=(num_gradients, 1))


@pytest.mark.parametrize("size", [1e-6, 1.0, 1e6])
@pytest.mark.parametrize("c", [0.1, 0.4, 2.0])
@pytest.mark.parametrize("num_gradients", [2, 3, 7, 13])
def test_direction_is_that_of_the_official_solver(num_gradients, c, size):
    gradients = draw(num_gradients, spread=0.5) * size
    found = conflict_averse_weights(gradients @ gradients.T, c) @ gradients
    expected = direction(gradients, c)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4 * np.abs(expected).max())
    # And no worse than it in what is maximised.
    assert (gradients @ found).min() >= (gradients @ expected).min() - 1e-9 * np.abs(gradients @ expected).max()


@pytest.mark.parametrize("num_gradients", [2, 5, 13])
@pytest.mark.parametrize("spread", [0.0, 1.0, 3.0])
def test_solver_ends_at_the_optimality_conditions(num_gradients, spread):
    gradients = draw(num_gradients, spread=spread)
    gramian = gradients @ gradients.T
    gramian /= np.trace(gramian) / num_gradients
    linear = gramian.mean(1)
    for radius in (0.0, 0.01, 1.0):
        weights = simplex_weights(gramian, linear, radius)
        assert weights.min() >= 0
        assert weights.sum() == pytest.approx(1, abs=1e-12)
        slope = linear + radius * gramian @ weights / np.sqrt(weights @ gramian @ weights)
        assert slope @ weights - slope.min() < 1e-7


def test_on_the_ball_around_the_mean():
    gradients = draw(5)
    found = conflict_averse_weights(gradients @ gradients.T, 0.4) @ gradients
    mean = gradients.mean(0)
    assert np.linalg.norm(found - mean) == pytest.approx(0.4 * np.linalg.norm(mean), rel=1e-9)
    assert (gradients @ found).min() >= (gradients @ mean).min()


def test_without_a_radius_it_is_the_mean():
    gradients = draw(5)
    assert np.array_equal(conflict_averse_weights(gradients @ gradients.T, 0.0), np.full(5, 0.2))
    method = CAGrad(CAGradConfig(c=0.0))
    gramian = torch.from_numpy(gradients @ gradients.T)
    torch.testing.assert_close(method.weights(gramian), torch.ones(5, dtype=torch.float64))


@pytest.mark.parametrize("kind", ["zero", "one absent", "opposed", "equal", "tiny"])
def test_degenerate_gradients(kind):
    gradients = draw(4)
    if kind in ("zero", "one absent"):
        gradients[slice(None) if kind == "zero" else 1] = 0
    if kind == "opposed":
        gradients[1] = -gradients[0]
    if kind == "equal":
        gradients[:] = gradients[0]
    if kind == "tiny":
        gradients *= 1e-20
    found = conflict_averse_weights(gradients @ gradients.T, 0.4) @ gradients
    mean = gradients.mean(0)
    assert np.isfinite(found).all()
    assert np.linalg.norm(found - mean) <= 0.4 * np.linalg.norm(mean) * (1 + 1e-6) + 1e-300
    if kind == "equal":
        np.testing.assert_allclose(found, 1.4 * mean)


@pytest.mark.parametrize("include_heads", [False, True])
@pytest.mark.parametrize(("scale", "rescale"), [("sum", 1), ("mean", 0), ("mean", 2)])
def test_step(example, update, rows_of, flattened, scale, rescale, include_heads):
    model, inputs, target = example
    rows = rows_of(model, inputs, target)
    expected = torch.from_numpy(direction(flattened(rows, include_heads).numpy(), 0.5))
    expected *= model.num_exits if scale == "sum" else 1
    expected /= {0: 1, 1: 1.25, 2: 1.5}[rescale]
    method = create_method("cagrad", model, c=0.5, scale=scale, rescale=rescale, include_heads=include_heads)
    moved = update(model, method, inputs, target)
    # The oracle's w has six digits.
    difference = flattened([moved], include_heads)[0] - expected
    assert difference.norm() < 1e-4 * expected.norm()
    heads = {name: value for name, value in moved.items() if name.startswith("exits.")}
    if not include_heads:
        for name, value in heads.items():
            torch.testing.assert_close(value, sum(row[name] for row in rows), msg=name)


def test_defaults_are_the_official_ones():
    config = CAGradConfig()
    assert (config.c, config.scale, config.rescale, config.include_heads) == (0.4, "sum", 1, False)


def test_bad_options():
    with pytest.raises(ValueError, match=r"cagrad\.c: expected a number >= 0, got -1"):
        CAGradConfig(c=-1.0)
    with pytest.raises(ValueError, match=r"cagrad\.scale: expected one of mean, sum, got 'max'"):
        CAGradConfig(scale="max")
    with pytest.raises(ValueError, match=r"cagrad\.rescale: expected 0, 1 or 2, got 3"):
        CAGradConfig(rescale=3)
