"""common/inputs.py: what is refused, and in which words. Its checks of pictures are tried in test_bad_input.py."""

import pytest

from common.inputs import each_once, refuse
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
