"""The comparison finds what it is for, and says which tensor it was."""

import pytest
import torch

from dfs_engine.validate.tolerances import DTYPES, EXACT, TOLERANCES, assert_close, compare, gradient_scale


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_rounding_to_the_dtype_is_within_the_table_and_ten_tolerances_are_not(dtype):
    expected = torch.randn(300, dtype=torch.float64)
    assert compare("x", expected.to(dtype), expected).ok
    wrong = (expected * (1 + 10 * TOLERANCES[dtype].rms_ratio)).to(dtype)
    assert not compare("x", wrong, expected).ok


def test_one_wrong_element_is_found_in_a_large_tensor():
    expected = torch.randn(1_000_000)
    actual = expected.clone()
    actual[77] += 1e-3
    comparison = compare("x", actual, expected)
    assert comparison.rms_ratio < 1e-5
    assert not comparison.ok


def test_a_small_error_everywhere_is_found_beside_one_large_value():
    expected = torch.randn(10_000)
    expected[0] = 1000
    comparison = compare("x", expected + 2e-4, expected)
    assert comparison.max_ratio < 1e-5
    assert not comparison.ok


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_value_that_is_not_finite_is_a_breach(value):
    actual = torch.zeros(5)
    actual[2] = value
    with pytest.raises(AssertionError, match=r"grad_weight: .*NaN or infinity"):
        assert_close("grad_weight", actual, torch.zeros(5))


def test_missing_wrongly_shaped_and_empty():
    assert not compare("x", None, torch.zeros(3)).ok
    assert not compare("x", torch.zeros(1, 3), torch.zeros(3)).ok
    assert compare("x", torch.zeros(0, 3), torch.zeros(0, 3)).ok


def test_where_the_reference_is_zero_only_zero_will_do():
    assert compare("x", torch.zeros(3), torch.zeros(3)).ok
    assert not compare("x", torch.full((3,), 1e-30), torch.zeros(3)).ok
    assert not compare("x", torch.full((3,), 1e-30), torch.zeros(3), EXACT).ok


def test_a_small_reference_is_judged_by_the_scale_that_is_given():
    expected = torch.full((3,), 1e-8)
    assert not compare("x", expected + 1e-9, expected).ok
    assert compare("x", expected + 1e-9, expected, scale=1e-3).ok
    assert not compare("x", expected + 1e-7, expected, scale=1e-3).ok
    assert not compare("x", expected * 2, expected, scale=1e-9).ok


def test_gradients_of_one_model_are_judged_by_the_largest():
    assert gradient_scale([torch.zeros(3), torch.tensor([2.0, -50.0]), torch.ones(())]) == 0.5
