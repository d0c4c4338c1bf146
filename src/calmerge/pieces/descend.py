"""Adam on one tensor, for methods whose objective is a formula of the task vectors alone."""

from collections.abc import Callable

import torch
from torch import Tensor


def adam(start: Tensor, gradient: Callable[[Tensor], Tensor], *, lr: float, steps: int) -> Tensor:
    """The tensor after some steps of Adam from `start` (betas 0.9 and 0.999, eps 1e-8, no weight decay).

    Args:
        start: left as it is.
        gradient: in closed form; no graph is built.
        lr: step size; no entry moves by more than about this in one step.
        steps: how many.

    >>> adam(torch.tensor([1.0]), lambda x: 2 * x, lr=0.25, steps=1)
    tensor([0.7500])

    Source: Kingma, Ba, "Adam: A Method for Stochastic Optimization", ICLR 2015.
    """
    x, mean, square = start.clone(), torch.zeros_like(start), torch.zeros_like(start)
    for step in range(1, steps + 1):
        g = gradient(x)
        mean.lerp_(g, 0.1)
        square.mul_(0.999).addcmul_(g, g, value=0.001)
        size = square.sqrt().div_((1 - 0.999**step) ** 0.5).add_(1e-8)
        x.addcdiv_(mean, size, value=-lr / (1 - 0.9**step))
    return x
