"""mergekit's `linear` and `task_arithmetic`."""

from typing import Annotated

import torch
from torch import Tensor

from calmerge._signature import Interval
from calmerge._task_vectors import TaskVectors
from calmerge._weights import Site, Weights
from calmerge.pieces.blend import per_task, summed
from calmerge.pieces.fuse import fuse
from calmerge.pieces.per_model import PerModel, checked


def mergekit_linear(tvs: TaskVectors, *, weight: PerModel, normalize: bool = True) -> Weights:
    """The weighted mean of the experts' weights, as mergekit's `linear`.

    theta = sum_t w_t theta_t / sum_t w_t; without `normalize` it is not divided.

    Args:
        tvs: task vectors of T experts; over a base of zeros where there is no base.
        weight: w, one number for each model or one for all.
        normalize: whether the weights are made to sum to 1.

    >>> import torch; from calmerge import task_vectors
    >>> experts = {"a": {"w": torch.tensor([2.0])}, "b": {"w": torch.tensor([4.0])}}
    >>> mergekit_linear(task_vectors({"w": torch.zeros(1)}, experts), weight=[3.0, 1.0])["w"]
    tensor([2.5000])

    Source: "linear" of arcee-ai/mergekit 0.1.5 (LGPL-3.0; Goddard et al., arXiv 2024); Wortsman et al., "Model soups",
    ICML 2022.
    Differences: none in the numbers; written from a description of the rules, not from the code.
    """
    weights = torch.tensor(checked(mergekit_linear, tvs, {"weight": weight, "normalize": normalize})["weight"])
    divisor = weights.sum() if normalize else torch.ones(())
    excess = float(weights.sum() / divisor) - 1  # what of the base must be added, where the weights do not sum to 1

    def mean(tau: Tensor, site: Site) -> Tensor:
        return summed(tau * per_task(weights, tau)) / divisor.to(tau)

    delta = tvs.reduce(mean)
    return delta.map(lambda tau, base, site: tau + base.to(tau) * excess, tvs.base) if excess else delta


def mergekit_task_arithmetic(
    tvs: TaskVectors,
    *,
    weight: PerModel,
    normalize: bool = False,
    lambda_: Annotated[float, Interval()] = 1.0,
) -> Weights:
    """The weighted sum of the task vectors, as mergekit's `task_arithmetic`.

    delta = lambda sum_t w_t tau_t, divided by sum_t w_t where `normalize` is set.

    Args:
        tvs: task vectors of T experts.
        weight: w, one number for each model or one for all.
        normalize: whether to divide by the sum of the weights (by 1 where that is 0).
        lambda_: a factor on the result.

    >>> import torch; from calmerge import task_vectors
    >>> experts = {"a": {"w": torch.tensor([2.0])}, "b": {"w": torch.tensor([4.0])}}
    >>> mergekit_task_arithmetic(task_vectors({"w": torch.zeros(1)}, experts), weight=[0.5, 1.0])["w"]
    tensor([5.])

    Source: "task_arithmetic" of arcee-ai/mergekit 0.1.5 (LGPL-3.0; Goddard et al., arXiv 2024); Ilharco et al.,
    ICLR 2023.
    Differences: from `task_arithmetic`, a weight for each model.
    """
    each = checked(mergekit_task_arithmetic, tvs, {"weight": weight, "normalize": normalize, "lambda_": lambda_})
    return fuse(tvs, each["weight"], vote=False, normalize=normalize, scale=lambda_)
