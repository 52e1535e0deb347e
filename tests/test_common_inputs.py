"""common/inputs.py: what is refused, and in which words. Its checks of pictures are tried in test_bad_input.py."""

import re

import pytest

from common.inputs import check_grid, each_once, refuse
from common.launch import UserError


def test_only_what_is_wrong_is_refused():
    refuse([], "--rows: never said")
    with pytest.raises(UserError, match=r"^--rows: no row of this table$"):
        refuse(["strange"], "--rows: no row of this table")


@pytest.mark.parametrize("values, given", [((), ""), (("a", "b", "a"), "a b a"), ([3, 3], "3 3")])
def test_a_list_names_each_thing_once(values, given):
    with pytest.raises(UserError) as told:
        each_once("--rows", values)
    assert str(told.value) == f"--rows {given}: one or more, each once"


def test_a_list_without_repetition_passes():
    each_once("--rows", ("a", "b"))
    each_once("--gan-seeds", [42])


@pytest.mark.parametrize(
    "grid, word",
    [
        ((2, 1, 1), "--sigma-grid 2 1 1: first, last and step"),
        ((0, 1, 0), "the step >= 0.001"),
        ((0, 1001, 1), "--sigma-grid 0 1001 1: more than 1000 values"),
    ],
)
def test_a_grid_ends_after_it_begins_and_has_few_values(grid, word):
    check_grid("--sigma-grid", 0, 1000, 1)
    check_grid("--sigma-grid", 1.0, 1.0, 0.05)
    with pytest.raises(UserError, match=re.escape(word)):
        check_grid("--sigma-grid", *grid)
