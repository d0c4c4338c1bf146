"""mergekit's `ram` and `ramplus_tl`: for updates that touch few entries."""

import torch
from torch import Tensor

from calmerge._measure import per_tensor, total
from calmerge._signature import NonNegative, check, raise_together
from calmerge._task_vectors import TaskVectors
from calmerge._weights import Site, Weights
from calmerge.pieces.blend import per_task, summed


def mergekit_ram(tvs: TaskVectors, *, epsilon: NonNegative = 1e-5) -> Weights:
    """Every entry's mean over the tasks that changed it, as mergekit's `ram`.

    c_p = #{t: |tau_t,p| > epsilon}; delta_p = sum of these tau_t,p / c_p, and 0 where nobody changed it.

    Args:
        tvs: task vectors of T experts.
        epsilon: changes up to this size are none; an absolute number, wrong for coarsely rounded weights.

    >>> from calmerge import task_vectors
    >>> experts = {"a": {"w": torch.tensor([1.0, 0.0, 2.0])}, "b": {"w": torch.tensor([0.0, 3.0, 4.0])}}
    >>> mergekit_ram(task_vectors({"w": torch.zeros(3)}, experts))["w"]
    tensor([1., 3., 3.])

    Source: "ram" of arcee-ai/mergekit 0.1.5 (LGPL-3.0; Goddard et al., arXiv 2024); RAM, arXiv 2026 (2601.13572).
    """
    raise_together(check(mergekit_ram, {"epsilon": epsilon}))
    return tvs.reduce(lambda tau, site: _mean_of_changed(tau, tau.abs() > epsilon))


def mergekit_ramplus_tl(
    tvs: TaskVectors, *, r: NonNegative = 0.1, alpha: NonNegative = 0.2, epsilon: NonNegative = 1e-5
) -> Weights:
    """As `mergekit_ram`, with what one task alone changed made larger, as mergekit's `ramplus_tl`.

    The entries that only task t changed are multiplied by 1 + r min(#shared_t / max(#unique_t, epsilon), alpha), with
    the numbers of its shared and unique changes in the tensor.

    Args:
        tvs: task vectors of T experts.
        r: how much larger at most, times alpha.
        alpha: the largest ratio that counts.
        epsilon: changes up to this size are none.

    >>> from calmerge import task_vectors
    >>> experts = {"a": {"w": torch.tensor([1.0, 0.0, 2.0])}, "b": {"w": torch.tensor([0.0, 3.0, 4.0])}}
    >>> mergekit_ramplus_tl(task_vectors({"w": torch.zeros(3)}, experts))["w"]
    tensor([1.0200, 3.0600, 3.0000])

    Source: "ramplus_tl" of arcee-ai/mergekit 0.1.5 (LGPL-3.0; Goddard et al., arXiv 2024); RAM+, arXiv 2026
    (2601.13572).
    """
    raise_together(check(mergekit_ramplus_tl, {"r": r, "alpha": alpha, "epsilon": epsilon}))

    def counts(tau: Tensor) -> Tensor:  # [T, 2]: unique, shared
        changed = (tau.abs() > epsilon).reshape(len(tau), -1)
        alone = changed.sum(0) == 1
        return torch.stack([(changed & alone).sum(1), (changed & ~alone).sum(1)], 1)

    def merged(tau: Tensor, count: Tensor, site: Site) -> Tensor:
        unique, shared = count.unbind(1)
        boost = 1 + r * (shared / unique.clamp(min=epsilon)).clamp(0, alpha)
        changed = tau.abs() > epsilon
        return _mean_of_changed(tau * torch.where(changed.sum(0) == 1, per_task(boost, tau), 1.0), changed)

    return tvs.reduce(merged, per_tensor(tvs, lambda w: total(w, counts)))


def _mean_of_changed(tau: Tensor, changed: Tensor) -> Tensor:
    return summed(tau.where(changed, 0.0)) / changed.sum(0).clamp(min=1)
