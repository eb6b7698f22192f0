import re

import pytest

from dfs_engine.checks import check_choice, split_choices

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


def test_an_unknown_name_in_a_list_is_named():
    with pytest.raises(ValueError, match=r"^variants: expected one of .*, got 'dsf'\. Did you mean 'dfs'\?$"):
        split_choices("variants", "dense,dsf", VALID)
