"""torch.compile with a word about it: the first call works for minutes, in which nothing else moves."""

import time
from collections.abc import Callable
from typing import Any

import torch

from common.launch import launched_as

_named: set[str] = set()  # what has been spoken of


def compiled(network: Callable, wanted: bool, name: str, **settings: Any) -> Callable:
    """network as torch.compile(network, **settings) makes it; rank 0 says when that begins and how long it took.

    wanted: --compile; without it the network itself comes back. A further shape, or a further network of this name, may
    compile again without a word.
    """
    if not wanted:
        return network
    fast, silent = torch.compile(network, **settings), launched_as().rank != 0

    def call(*args: Any, **kwargs: Any) -> Any:
        """The compiled network; its first call is announced"""
        if silent or name in _named:
            return fast(*args, **kwargs)
        _named.add(name)
        start = time.monotonic()
        print(f"--compile: compiling the {name}, which may take minutes", flush=True)
        out = fast(*args, **kwargs)
        print(f"--compile: {name} compiled, first call included, in {time.monotonic() - start:.0f} s", flush=True)
        return out

    return call
