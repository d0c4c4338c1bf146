"""mergekit's `breadcrumbs` and `breadcrumbs_ties`: neither the largest nor the smallest entries of a tensor."""

from collections.abc import Sequence
from typing import Annotated

from torch import Tensor

from calmerge._signature import Interval
from calmerge._task_vectors import TaskVectors
from calmerge._weights import Site, Weights
from calmerge.pieces.fuse import fuse
from calmerge.pieces.largest import largest
from calmerge.pieces.mask import masked
from calmerge.pieces.per_model import FractionPerModel, PerModel, checked
from calmerge.pieces.rescale import restore_l1


def mergekit_breadcrumbs(
    tvs: TaskVectors,
    *,
    weight: PerModel,
    density: FractionPerModel = (1.0,),
    gamma: FractionPerModel = (0.01,),
    normalize: bool = False,
    rescale: bool = False,
    lambda_: Annotated[float, Interval()] = 1.0,
) -> Weights:
    """Drop the largest and the smallest entries of every tensor, then add up by weight, as mergekit's `breadcrumbs`.

    Of the n magnitudes of a tensor the int(gamma n) largest go, and so many of the smallest that int(density n) stay;
    where not that many can, fewer of the largest go. delta = lambda sum_t w_t tau_hat_t.

    Args:
        tvs: task vectors of T experts.
        weight: w, one number for each model or one for all.
        density: share of each tensor that is kept, one number for each model or one for all, in [0, 1].
        gamma: share of each tensor dropped as too large, one number for each model or one for all, in [0, 1].
        normalize: whether to divide by the sum of the weights (by 1 where that is 0).
        rescale: whether each thinned tensor is scaled back to its former L1 norm.
        lambda_: a factor on the result.

    >>> import torch; from calmerge import task_vectors
    >>> tvs = task_vectors({"w": torch.zeros(4)}, {"a": {"w": torch.tensor([9.0, 3.0, -2.0, 1.0])}})
    >>> mergekit_breadcrumbs(tvs, weight=[1.0], density=[0.5], gamma=[0.25])["w"]
    tensor([ 0.,  3., -2.,  0.])

    Source: "breadcrumbs" of arcee-ai/mergekit 0.1.5 (LGPL-3.0; Goddard et al., arXiv 2024); Davari, Belilovsky,
    ECCV 2024.
    Differences: counted per tensor, where paper and official code have layers and rows. Equal magnitudes at a cut are
    chosen by their place (see `largest`), there by an unstable sort.
    """
    given = {"weight": weight, "density": density, "gamma": gamma, "normalize": normalize, "rescale": rescale}
    each = checked(mergekit_breadcrumbs, tvs, given | {"lambda_": lambda_})
    kept = keep_middle(tvs, each["density"], each["gamma"])
    kept = restore_l1(kept, tvs) if rescale else kept
    return fuse(kept, each["weight"], vote=False, normalize=normalize, scale=lambda_)


def mergekit_breadcrumbs_ties(
    tvs: TaskVectors,
    *,
    weight: PerModel,
    density: FractionPerModel = (1.0,),
    gamma: FractionPerModel = (0.01,),
    normalize: bool = False,
    rescale: bool = False,
    lambda_: Annotated[float, Interval()] = 1.0,
) -> Weights:
    """As `mergekit_breadcrumbs` with a vote on signs, as mergekit's `breadcrumbs_ties`.

    s = sign(sum_t w_t tau_hat_t), where 0 counts as plus; only the tasks with that sign are added up.

    Args:
        tvs: task vectors of T experts.
        weight: w, one number for each model or one for all; they count in the vote.
        density: share of each tensor that is kept, one number for each model or one for all, in [0, 1].
        gamma: share of each tensor dropped as too large, one number for each model or one for all, in [0, 1].
        normalize: whether to divide by the weights of those that agree.
        rescale: whether each thinned tensor is scaled back to its former L1 norm.
        lambda_: a factor on the result.

    >>> import torch; from calmerge import task_vectors
    >>> experts = {"a": {"w": torch.tensor([9.0, 3.0, -2.0, 1.0])}, "b": {"w": torch.tensor([9.0, -4.0, -2.0, 1.0])}}
    >>> tvs = task_vectors({"w": torch.zeros(4)}, experts)
    >>> mergekit_breadcrumbs_ties(tvs, weight=[1.0], density=[0.5], gamma=[0.25])["w"]
    tensor([ 0., -4., -4.,  0.])

    Source: "breadcrumbs_ties" of arcee-ai/mergekit 0.1.5 (LGPL-3.0; Goddard et al., arXiv 2024); Davari, Belilovsky,
    ECCV 2024.
    Differences: as `mergekit_breadcrumbs`.
    """
    given = {"weight": weight, "density": density, "gamma": gamma, "normalize": normalize, "rescale": rescale}
    each = checked(mergekit_breadcrumbs_ties, tvs, given | {"lambda_": lambda_})
    kept = keep_middle(tvs, each["density"], each["gamma"])
    kept = restore_l1(kept, tvs) if rescale else kept
    return fuse(kept, each["weight"], vote=True, normalize=normalize, scale=lambda_)


def keep_middle(tvs: TaskVectors, density: Sequence[float], gamma: Sequence[float]) -> TaskVectors:
    """Task vectors without the largest and the smallest entries of every tensor.

    >>> import torch; from calmerge import task_vectors
    >>> tvs = task_vectors({"w": torch.zeros(4)}, {"a": {"w": torch.tensor([9.0, 3.0, 2.0, 1.0])}})
    >>> keep_middle(tvs, [0.25], [0.25])["w"]
    tensor([[0., 3., 0., 0.]])
    """
    shares = list(zip(density, gamma, strict=True))

    def top(name: str, n: int) -> list[int]:  # too large
        return [min(int(g * n), n - int(d * n)) for d, g in shares]

    def rest(name: str, n: int) -> list[int]:  # not too small
        return [min(int(g * n) + int(d * n), n) for d, g in shares]

    def middle(tau: Tensor, large: Tensor, not_small: Tensor, site: Site) -> Tensor:
        return masked(tau, not_small & ~large)

    return tvs.transform(middle, largest(tvs, top), largest(tvs, rest))
