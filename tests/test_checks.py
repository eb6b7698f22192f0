import re
from dataclasses import dataclass

import pytest

from dfs_engine.checks import check_choice, check_numbers, split_choices

VALID = ("dense", "detach", "split", "dfs")


@pytest.mark.parametrize("name", VALID)
def test_a_valid_name_comes_back(name):
    assert check_choice("variant", name, VALID) == name


def test_the_error_names_argument_value_choices_and_the_nearest():
    with pytest.raises(
        ValueError, match=r"^variant: expected one of dense, detach, split, dfs, got 'dsf'\. Did you mean 'dfs'\?$"
    ):
        check_choice("variant", "dsf", iter(VALID))


@pytest.mark.parametrize("value", ["zzz", "", None, 3, ["dfs"]])
def test_no_suggestion_where_nothing_is_near(value):
    with pytest.raises(ValueError, match="expected one of") as error:
        check_choice("variant", value, VALID)
    assert ("Did you mean" in str(error.value)) == (value == ["dfs"])


def test_a_list_comes_back_in_order_without_spaces_and_repeats():
    assert split_choices("variants", " dfs, dense ,dfs,", iter(VALID)) == ["dfs", "dense"]


@pytest.mark.parametrize("value", ["", " ", ",,"])
def test_an_empty_list_is_refused_with_the_choices(value):
    message = f"variants: expected a comma-separated list of dense, detach, split, dfs, got {value!r}."
    with pytest.raises(ValueError, match=re.escape(message)):
        split_choices("variants", value, VALID)


@dataclass
class Numbers:
    share: float = 0.5
    rate: float = 1.0
    count: int | None = None


@pytest.mark.parametrize(
    ("interval", "inside", "outside"),
    [
        (">= 0", (0, 3), (-1e-9, float("inf"), float("nan"), "3", None)),
        ("> 0", (1e-9,), (0, -1)),
        ("[0, 1]", (0, 1), (-1e-9, 1.1)),
        ("[0, 1)", (0, 0.9), (1, -0.1)),
        ("(0, 1)", (0.5,), (0, 1)),
        ("(0, 1]", (0.5, 1), (0, 1.1)),
    ],
)
def test_numbers_lie_in_their_range(interval, inside, outside):
    for value in inside:
        check_numbers(Numbers(share=value), "data.", {interval: ("share",)})
    for value in outside:
        expected = interval if interval.startswith(">") else f"in {interval}"
        message = f"data.share: expected a number {expected}, got {value!r}."
        with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
            check_numbers(Numbers(share=value), "data.", {">= 0": ("rate",), interval: ("share",)})


def test_a_number_that_is_none_by_default_may_be():
    check_numbers(Numbers(), "", {">= 1": ("count",)})
    with pytest.raises(ValueError, match=r"^count: expected a number >= 1, got 0\. Leave it out for its default\.$"):
        check_numbers(Numbers(count=0), "", {">= 1": ("count",)})


def test_an_unknown_name_in_a_list_is_named():
    with pytest.raises(ValueError, match=r"^variants: expected one of .*, got 'dsf'\. Did you mean 'dfs'\?$"):
        split_choices("variants", "dense,dsf", VALID)
