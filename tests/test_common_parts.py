"""A list in parts: each entry is made once, by one process, and a list that is there is not made again."""

import json

import pytest
import torch

from common.distributed import Dist
from common.parts import in_parts

ONE = Dist(rank=0, world=1, local_rank=0, device=torch.device("cpu"))


def test_what_a_killed_run_made_is_not_made_again(tmp_path):
    target, made = tmp_path / "words.json", []

    def make(i):
        if i == 2 and len(made) == 2:
            raise KeyboardInterrupt
        made.append(i)
        return {"entry": i}

    with pytest.raises(KeyboardInterrupt):
        in_parts(target, 4, make, ONE, "words")
    assert not target.exists() and len(list((tmp_path / "parts").iterdir())) == 2
    made.append("again")
    wanted = [{"entry": i} for i in range(4)]
    assert in_parts(target, 4, make, ONE, "words") == json.loads(target.read_text()) == wanted
    assert made == [0, 1, "again", 2, 3] and not (tmp_path / "parts").exists()
    assert in_parts(target, 4, make, ONE, "words") == wanted and len(made) == 5


def test_a_list_of_the_users_own_stays(tmp_path):
    (tmp_path / "words.json").write_text('["mine"]')
    assert in_parts(tmp_path / "words.json", 3, None, ONE, "words") == ["mine"]
