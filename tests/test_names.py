import pytest

from dfs_engine.names import check_choice

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
