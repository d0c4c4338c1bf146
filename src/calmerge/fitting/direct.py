"""Fits without a model: parameters moved by a loss on tensors that are held, such as features of a pool."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from calmerge._errors import FitError
from calmerge._weights import StateDict
from calmerge.fitting.fit import Fitted, Params, fit
from calmerge.tasks.base import Batch, Batches


def fit_directly(
    start: Params, loss: Callable[[Mapping[str, Tensor], Batch, int], Tensor], batches: Batches, **options: Any
) -> Fitted:
    """The parameters after updates on a loss of their own values.

    Args:
        start: parameters before the first update.
        loss: of parameters, a batch and the number of the update.
        batches: the batches of every update.
        options: those of `fit`: optimizer, steps, schedule, watch, run, label, key.

    Raises:
        FitError: a loss is not finite.

    >>> from functools import partial
    >>> batches = lambda step: [Batch("toy", torch.tensor([0]))]
    >>> sgd = partial(torch.optim.SGD, lr=0.5)
    >>> half_square = lambda p, batch, step: (p["w"] - 3).square() / 2
    >>> fit_directly({"w": torch.tensor(0.0)}, half_square, batches, optimizer=sgd, steps=2).params["w"]
    tensor(2.2500)
    """

    def gradient(theta: Mapping[str, Tensor], step: int) -> dict[str, float]:
        losses: dict[str, float] = {}
        for batch in batches(step):
            value = loss(theta, batch, step)
            if not torch.isfinite(value):
                raise FitError(
                    f"update {step + 1}: the loss of '{batch.task}' is {value.item()}. Are its features finite? A "
                    "smaller step size keeps a loss finite."
                )
            value.backward()  # type: ignore[no-untyped-call]
            losses[batch.task] = losses.get(batch.task, 0.0) + value.item()
        return losses

    zero = StateDict({name: torch.zeros_like(p) for name, p in start.items()})
    return fit(StateDict, start, gradient, base=zero, **options)
