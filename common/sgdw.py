"""SGD with Nesterov momentum and decoupled weight decay, as TensorFlow-addons has it and PyTorch does not."""

from collections.abc import Iterable

import torch


class SGDW(torch.optim.Optimizer):
    """p *= 1 - wd; b = mu b - lr g; p += mu b - lr g, on every parameter.

    Trap: wd is not multiplied by the rate, so at lr 0.001 it is 100 times stronger relative to the gradient than at
    0.1. The rate stands inside the buffer, so after a drop the old velocity lives on for some twenty steps.
    """

    def __init__(self, params: Iterable[torch.nn.Parameter], lr: float, wd: float, momentum: float = 0.9):
        super().__init__(params, dict(lr=lr, wd=wd, momentum=momentum))

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            params, lr, momentum = group["params"], group["lr"], group["momentum"]
            for p in params:
                self.state[p].setdefault("velocity", torch.zeros_like(p))
            velocity, grads = [self.state[p]["velocity"] for p in params], [p.grad for p in params]
            torch._foreach_mul_(params, 1 - group["wd"])
            torch._foreach_mul_(velocity, momentum)
            torch._foreach_add_(velocity, grads, alpha=-lr)
            torch._foreach_add_(params, velocity, alpha=momentum)
            torch._foreach_add_(params, grads, alpha=-lr)
