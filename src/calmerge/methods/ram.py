"""RAM and RAM+, for experts that change few weights (arXiv 2026)."""

import torch
from torch import Tensor

from calmerge._measure import count, per_tensor
from calmerge._signature import NonNegative, check, raise_together
from calmerge._task_vectors import TaskVectors
from calmerge._weights import Site, Weights
from calmerge.pieces.blend import per_task, summed


def ram(tvs: TaskVectors, *, threshold: NonNegative = 1e-5) -> Weights:
    """Of every entry the mean over the tasks that changed it, so that what one task alone changed is kept whole.

    m_t = 1[|tau_t| > eps]; theta = theta_0 + sum_t m_t tau_t / max(sum_t m_t, 1).

    Args:
        tvs: task vectors of T experts, sparse ones as reinforcement learning leaves them.
        threshold: eps, at least 0, in the weights' own unit; half-precision noise or rescaled vectors want another.

    >>> import torch; from calmerge import task_vectors
    >>> experts = {"a": {"w": torch.tensor([1.0, 0.0, 2.0])}, "b": {"w": torch.tensor([0.0, 3.0, 4.0])}}
    >>> ram(task_vectors({"w": torch.zeros(3)}, experts))["w"]
    tensor([1., 3., 3.])

    Source: RAM, arXiv 2026 (2601.13572).
    """
    raise_together(check(ram, {"threshold": threshold}))
    return tvs.reduce(lambda tau, site: _mean_of(tau, tau.abs() > threshold))


def ram_plus(
    tvs: TaskVectors, *, rate: NonNegative = 0.1, most: NonNegative = 0.2, threshold: NonNegative = 1e-5
) -> Weights:
    """RAM with what one task alone changed made larger, the more of its changes it shares with others.

    Entries that task t alone changed are multiplied by 1 + r clip(shared_t / unique_t, 0, a): how many entries of the
    tensor it changed with others, and alone.

    Args:
        tvs: task vectors of T experts.
        rate: r, at least 0; with 0 it is RAM.
        most: a, the largest ratio that counts, at least 0.
        threshold: eps of RAM, at least 0.

    >>> import torch; from calmerge import task_vectors
    >>> experts = {"a": {"w": torch.tensor([1.0, 0.0, 2.0])}, "b": {"w": torch.tensor([0.0, 3.0, 4.0])}}
    >>> ram_plus(task_vectors({"w": torch.zeros(3)}, experts))["w"]
    tensor([1.0200, 3.0600, 3.0000])

    Source: RAM+, arXiv 2026 (2601.13572).
    """
    raise_together(check(ram_plus, {"rate": rate, "most": most, "threshold": threshold}))

    def counted(tau: Tensor) -> Tensor:
        changed = (tau.abs() > threshold).reshape(len(tau), -1)
        alone = changed.sum(0) == 1
        return torch.stack([(changed & ~alone).sum(1), (changed & alone).sum(1)])

    def factors(counts: Tensor) -> Tensor:
        return 1 + rate * (counts[0] / counts[1].clamp(min=1)).clamp(max=most)

    def boosted(tau: Tensor, factor: Tensor, site: Site) -> Tensor:
        changed = tau.abs() > threshold
        return _mean_of(tau.where(changed.sum(0) > 1, tau * per_task(factor, tau)), changed)

    return tvs.reduce(boosted, per_tensor(tvs, lambda one: count(one, counted).map(factors), factor=True))


def _mean_of(tau: Tensor, changed: Tensor) -> Tensor:
    return summed(tau.where(changed, 0.0)) / changed.sum(0).clamp(min=1)
