"""Sign election among task vectors, and merging of those that agree."""

from typing import Literal

import torch
from torch import Tensor

from calmerge._measure import count, total
from calmerge._task_vectors import TaskVectors
from calmerge._threshold import whole_sum
from calmerge._weights import Site, Weights
from calmerge.pieces.blend import per_task, squares, summed

_LARGEST = torch.finfo(torch.float32).max


def elect(tvs: TaskVectors, *, by: Literal["mass", "normmass", "normfrac"] = "mass") -> Weights:
    """The elected sign of every entry, in {-1, 0, 1}: the sign of the sum over tasks.

    s_p = sign(sum_t tau_t,p). Where the sum is 0 (exact cancellation, or nothing left by trimming) s_p is the majority
    sign of the whole model, sign(sum_p s_p); if that is 0 too, s_p stays 0.

    Args:
        tvs: task vectors, usually trimmed.
        by: `mass` is the sum; `normmass` that of signs weighed by an entry's share of its vector's squared norm,
            tau_t,p^2 / ||tau_t||^2; `normfrac` the sign of the entry with the largest such share, plus where two are
            equal.

    >>> import torch; from calmerge import task_vectors
    >>> experts = {"a": {"w": torch.tensor([1.0, 2.0, 3.0])}, "b": {"w": torch.tensor([-1.0, 2.0, -4.0])}}
    >>> elect(task_vectors({"w": torch.zeros(3)}, experts))["w"]
    tensor([ 0.,  1., -1.])
    """
    if by == "mass":
        signs = tvs.reduce(lambda tau, site: _sign(tau))
    else:
        norms = total(tvs, squares)
        shares = tvs.transform(_shares, norms)
        choose = summed if by == "normmass" else _furthest
        signs = shares.reduce(lambda share, site: choose(share).sign())
    if tvs.cut is not None and by == "mass":
        threshold, kept = tvs.cut
        majority = threshold.total(lambda tau, at: _sign(kept(tau, at)), signs)
    else:
        majority = count(signs, whole_sum)

    def settled(sign: Tensor, majority: Tensor, site: Site) -> Tensor:
        return (sign + majority.sign().to(sign) / 2).sign()  # the half decides only where there is no sign

    return signs.map(settled, majority)


def _sign(tau: Tensor) -> Tensor:
    return summed(tau).sign()


def _shares(tau: Tensor, norms: Tensor, site: Site) -> Tensor:
    return tau * tau.abs() / per_task(norms.where(norms > 0, 1.0), tau)


def _furthest(share: Tensor) -> Tensor:
    high, low = share.amax(0), share.amin(0)
    return torch.where(high >= -low, high, low)


def agree(tvs: TaskVectors, signs: Weights) -> TaskVectors:
    """Task vectors with every entry that has not the elected sign set to 0; an elected 0 counts as minus.

    >>> import torch; from calmerge import task_vectors
    >>> experts = {"a": {"w": torch.tensor([1.0, 2.0])}, "b": {"w": torch.tensor([-3.0, 2.0])}}
    >>> tvs = task_vectors({"w": torch.zeros(2)}, experts)
    >>> agree(tvs, elect(tvs))["w"]
    tensor([[ 0.,  2.],
            [-3.,  2.]])
    """

    def agreeing(tau: Tensor, sign: Tensor, site: Site) -> Tensor:
        most = sign.clamp(min=0) * _LARGEST  # with a plus from 0 to the largest, else from its negative to 0
        return tau.clamp(most - _LARGEST, most)

    return tvs.transform(agreeing, signs)


def disjoint(tvs: TaskVectors, signs: Weights, *, combine: Literal["mean", "sum", "max"] = "mean") -> Weights:
    """One delta from the entries that have the elected sign.

    Args:
        tvs: task vectors, usually trimmed.
        signs: elected signs, as from `elect`.
        combine: `mean` divides by the number of agreeing entries, at least 1; `sum` does not; `max` takes the largest
            magnitude with the elected sign.

    >>> import torch; from calmerge import task_vectors
    >>> experts = {"a": {"w": torch.tensor([1.0, 2.0])}, "b": {"w": torch.tensor([-3.0, 4.0])}}
    >>> tvs = task_vectors({"w": torch.zeros(2)}, experts)
    >>> disjoint(tvs, elect(tvs))["w"]
    tensor([-3., 3.])
    """
    agreeing = agree(tvs, signs)
    if combine == "max":
        return agreeing.reduce(lambda tau, sign, site: tau.abs().amax(0) * sign, signs)
    if combine == "sum":
        return agreeing.reduce(lambda tau, site: summed(tau))
    # those that agree have one sign, so the sum of their signs counts them
    return agreeing.reduce(lambda tau, site: summed(tau) / summed(tau.sign()).abs().clamp(min=1))
