"""Memory of a computation on a GPU, counted without one: on the device meta, where tensors are shapes alone."""

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

# What torch.autocast does on CUDA, for the functions that networks spend their memory in: products in bfloat16, sums
# that are sensitive in float32. On the device meta there is no autocast.
IN_BFLOAT16 = ("linear", "conv2d", "scaled_dot_product_attention")
IN_FLOAT32 = ("group_norm", "layer_norm", "softmax", "mse_loss", "cross_entropy")


@dataclass(frozen=True)
class Bytes:
    """held: of the tensors that are still there in the end, what the backward pass needs among them; peak: the most."""

    held: int
    peak: int


def saved_bytes(work: Callable[[], Any], autocast: bool = False) -> Bytes:
    """Bytes of the tensors that work() makes: a forward pass, whose result keeps what its backward pass needs, or both.

    Networks and inputs lie on the device meta; weights are not counted, float32 weights that autocast copies are. As on
    a GPU, attention is fused and keeps q, k, v, its output and a number per row. Checkpointing is counted as it runs.
    Left out: work space of convolutions, fragmentation, the 0.5 to 1 GB of CUDA itself.
    """
    with _Alive() as alive, _as_on_cuda(autocast):
        result = work()  # noqa: F841  # keeps the graph
        return Bytes(alive.now, alive.peak)


class _Alive(TorchDispatchMode):
    """Counts the bytes of all storages made inside, until they are gone."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: dict[int, int] = {}  # of the storages that are alive; 0 for those from outside
        self.now = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for tensor in tree_leaves((args, kwargs)):
            self._meet(tensor, inside=False)
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            self._meet(tensor, inside=True)
        return out

    def _meet(self, tensor: Any, inside: bool) -> None:
        """A view has the storage of another tensor, which was met before: a weight's, say."""
        if not isinstance(tensor, torch.Tensor) or (key := (storage := tensor.untyped_storage())._cdata) in self.sizes:
            return
        self.sizes[key] = storage.nbytes() * inside
        self.now += self.sizes[key]
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._gone, key)

    def _gone(self, key: int) -> None:
        self.now -= self.sizes.pop(key)


class _Attention(torch.autograd.Function):
    """Shapes of fused attention: no matrix of all pairs of positions exists at any time."""

    @staticmethod
    def forward(ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        out = q.new_empty(*q.shape[:-1], v.shape[-1])
        ctx.save_for_backward(q, k, v, out, q.new_empty(q.shape[:-1], dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(torch.empty_like(x) for x in ctx.saved_tensors[:3])


@contextmanager
def _as_on_cuda(autocast: bool) -> Iterator[None]:
    copies: dict[int, torch.Tensor] = {}  # autocast casts a weight once

    def cast(x: Any, dtype: torch.dtype) -> Any:
        if not isinstance(x, torch.Tensor) or not x.is_floating_point() or x.dtype == dtype:
            return x
        if isinstance(x, torch.nn.Parameter) and id(x) not in copies:
            copies[id(x)] = x.to(dtype)
        return copies[id(x)] if isinstance(x, torch.nn.Parameter) else x.to(dtype)

    def casting(function: Callable[..., Any], dtype: torch.dtype) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            args, kwargs = tree_map(lambda x: cast(x, dtype), (args, kwargs))
            return function(*args, **kwargs)

        return call

    stock = {name: getattr(F, name) for name in IN_BFLOAT16 + IN_FLOAT32}
    changed = {"scaled_dot_product_attention": lambda q, k, v, *_, **__: _Attention.apply(q, k, v)}
    if autocast:
        changed = {name: casting(changed.get(name, stock[name]), torch.bfloat16) for name in IN_BFLOAT16}
        changed |= {name: casting(stock[name], torch.float32) for name in IN_FLOAT32}
    for name, function in changed.items():
        setattr(F, name, function)
    try:
        yield
    finally:
        for name, function in stock.items():
            setattr(F, name, function)
