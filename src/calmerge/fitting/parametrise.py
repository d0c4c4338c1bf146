"""What a fit may move: ways to make a delta of parameters, each a start and a lazy, differentiable merge.

A `Parametrisation` knows nothing of losses; `fit` pulls dLoss/dtheta back through it tensor by tensor.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from calmerge._task_vectors import TaskVectors
from calmerge._weights import Computed, Weights
from calmerge.fitting.fit import Params
from calmerge.pieces.blend import summed


@dataclass(frozen=True)
class Parametrisation:
    """Where a fit begins, and the delta that its parameters stand for.

    Attributes:
        start: the parameters before the first update.
        merged: from parameters to a delta.
    """

    start: Params
    merged: Callable[[Params], Weights]


def layer_coefficients(start: Weights, tvs: TaskVectors) -> Parametrisation:
    """One number per task and tensor, on top of a start: delta(l) = start(l) + sum_t lambda[t, l] tau_t(l), lambda = 0.

    >>> tvs = task_vectors({"w": torch.zeros(1)}, {"a": {"w": torch.ones(1)}})
    >>> layer_coefficients(tvs.of("a"), tvs).merged({"w": torch.tensor([2.0])})["w"]
    tensor([3.])
    """
    return Parametrisation(
        {name: torch.zeros(len(tvs.tasks)) for name in tvs.specs},
        lambda params: _whole(
            lambda s, tau, site: s + torch.tensordot(params[site.name].to(tau), tau, dims=1), start, tvs
        ),
    )


def element_coefficients(start: Weights, tvs: TaskVectors) -> Parametrisation:
    """One number per task and entry, on top of a start: delta = start + sum_t c_t tau_t, elementwise, c = 0.

    Held in memory: T x P parameters.

    >>> tvs = task_vectors({"w": torch.zeros(2)}, {"a": {"w": torch.ones(2)}})
    >>> element_coefficients(tvs.of("a"), tvs).merged({"w": torch.tensor([[2.0, 0.0]])})["w"]
    tensor([3., 1.])
    """
    return Parametrisation(
        {name: torch.zeros(len(tvs.tasks), *spec.shape) for name, spec in tvs.specs.items()},
        lambda params: _whole(lambda s, tau, site: s + (params[site.name] * tau).sum(0), start, tvs),
    )


def element_masks(start: Weights, tvs: TaskVectors, *, logit: float = 5.0) -> Parametrisation:
    """One soft mask per task, between a start and the task's vector: delta = start + sum_t sigma(m_t) (tau_t - start).

    For one task this is the mask of CALM. Logits begin at `-logit`.

    >>> tvs = task_vectors({"w": torch.zeros(1)}, {"a": {"w": torch.ones(1)}})
    >>> element_masks(tvs.of("a").map(lambda t, site: 0 * t), tvs).merged({"w": torch.zeros(1, 1)})["w"]
    tensor([0.5000])
    """
    return Parametrisation(
        {name: torch.full((len(tvs.tasks), *spec.shape), -logit) for name, spec in tvs.specs.items()},
        lambda params: _whole(lambda s, tau, site: s + (params[site.name].sigmoid() * (tau - s)).sum(0), start, tvs),
    )


def span(start: Weights, reach: Weights, *, limit: float | None = None) -> Parametrisation:
    """One number per entry, in units of how far the experts moved it, on top of a start.

    delta = start + clamp(u, -limit, limit) reach, u = 0 at first.

    With `reach` = sum_t |tau_t| an entry that no expert moved stays, and an optimizer's step is in proportion to it.

    Args:
        start: a delta.
        reach: how far each entry may go, non-negative.
        limit: the largest |u|; None bounds nothing.

    >>> from calmerge import StateDict
    >>> start, reach = StateDict({"w": torch.ones(2)}), StateDict({"w": torch.tensor([0.0, 2.0])})
    >>> span(start, reach, limit=1.0).merged({"w": torch.tensor([5.0, 5.0])})["w"]
    tensor([1., 3.])
    """

    def used(u: Tensor) -> Tensor:
        return u if limit is None else u.clamp(-limit, limit)

    return Parametrisation(
        {name: torch.zeros(spec.shape) for name, spec in start.specs.items()},
        lambda params: _whole(lambda s, r, site: s + used(params[site.name]) * r, start, reach),
    )


def reach(tvs: TaskVectors) -> Weights:
    """How far the experts moved each entry, all together: sum_t |tau_t|.

    >>> tvs = task_vectors({"w": torch.zeros(1)}, {"a": {"w": torch.ones(1)}, "b": {"w": -torch.ones(1)}})
    >>> reach(tvs)["w"]
    tensor([2.])
    """
    return tvs.reduce(lambda tau, site: summed(tau.abs()))


def moved(tvs: TaskVectors) -> Weights:
    """1 where some expert moved an entry, 0 where none did.

    >>> tvs = task_vectors({"w": torch.zeros(2)}, {"a": {"w": torch.tensor([0.5, 0.0])}})
    >>> moved(tvs)["w"]
    tensor([1., 0.])
    """
    return tvs.reduce(lambda tau, site: (tau != 0).any(0).float())


def _whole(fn: Callable[..., Tensor], *inputs: Weights) -> Weights:
    return Computed(fn, inputs, inputs[0].specs, elementwise=False)
