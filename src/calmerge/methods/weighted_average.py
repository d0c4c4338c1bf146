"""Averaging with a weight for each expert."""

from collections.abc import Mapping
from typing import Annotated

import torch
from torch import Tensor

from calmerge._errors import UsageError
from calmerge._signature import Interval, check, raise_together
from calmerge._task_vectors import TaskVectors
from calmerge._weights import Site, Weights
from calmerge.pieces.blend import per_task, summed
from calmerge.pieces.weigh import by_task


def weighted_average(
    tvs: TaskVectors, *, weights: Mapping[str, Annotated[float, Interval()]], normalise: bool = True
) -> Weights:
    """The weighted mean of the experts, or their weighted sum.

    theta = sum_t w_t theta_t / sum_t w_t; without `normalise` theta = sum_t w_t theta_t, whole weights included.

    Args:
        tvs: task vectors of T experts.
        weights: w, by task; 1 for tasks that are not named.
        normalise: divide by the sum of the weights, which must not be 0.

    >>> import torch; from calmerge import task_vectors
    >>> experts = {"cars": {"w": torch.tensor([2.0])}, "dtd": {"w": torch.tensor([4.0])}}
    >>> weighted_average(task_vectors({"w": torch.tensor([1.0])}, experts), weights={"cars": 3.0})["w"] + 1
    tensor([2.5000])

    Source: Wortsman et al., "Model soups", ICML 2022 (soups with learned weights).
    """
    raise_together(check(weighted_average, {"weights": weights, "normalise": normalise}))
    raw = by_task(tvs, "weighted_average.weights", weights)
    if normalise and sum(raw) == 0:
        raise UsageError("weighted_average.weights sum to 0, so that no mean can be formed. Set normalise to false.")
    factors, divisor = torch.tensor(raw), sum(raw) if normalise else 1.0
    delta = tvs.reduce(lambda tau, site: summed(tau * per_task(factors, tau)) / divisor)
    if normalise:
        return delta
    excess = sum(raw) - 1  # the base is in every expert: it counts sum_t w_t times, not once

    def whole(tau: Tensor, base: Tensor, site: Site) -> Tensor:
        return tau + base.to(tau) * excess

    return delta.map(whole, tvs.base)
