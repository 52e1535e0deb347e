"""--compile: the same numbers, and a word about the minutes that the first call takes."""

import torch

from common.compiling import compiled


def test_first_call_is_announced_and_later_ones_are_silent(capsys, monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    net = torch.nn.Linear(3, 2)
    fast = compiled(net, True, "U-Net", backend="eager")
    x = torch.randn(4, 3)
    assert capsys.readouterr().out == ""
    assert torch.equal(fast(x), net(x)) and torch.equal(fast(input=x), net(x))
    begin, end = capsys.readouterr().out.splitlines()
    assert begin == "--compile: compiling the U-Net, which may take minutes"
    assert end.startswith("--compile: U-Net compiled, first call included, in ") and end.endswith(" s")
    another = compiled(torch.nn.Linear(3, 2), True, "U-Net", backend="eager")  # GaFi trains a hundred ResNets
    assert another(x).shape == (4, 2) and capsys.readouterr().out == ""
    assert compiled(net, False, "U-Net") is net


def test_other_ranks_compile_without_a_word(capsys, monkeypatch):
    world = dict(RANK="1", WORLD_SIZE="2", LOCAL_RANK="1", LOCAL_WORLD_SIZE="2", MASTER_PORT="1")
    for name, value in {**world, "MASTER_ADDR": "localhost"}.items():
        monkeypatch.setenv(name, value)
    fast = compiled(torch.sin, True, "sine", backend="eager")
    assert torch.equal(fast(torch.ones(2)), torch.ones(2).sin()) and capsys.readouterr().out == ""
