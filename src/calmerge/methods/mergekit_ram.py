"""mergekit's `ram` and `ramplus_tl`: for updates that touch few entries."""

from calmerge._signature import NonNegative, check, raise_together
from calmerge._task_vectors import TaskVectors
from calmerge._weights import Weights
from calmerge.methods.ram import ram, ram_plus


def mergekit_ram(tvs: TaskVectors, *, epsilon: NonNegative = 1e-5) -> Weights:
    """Every entry's mean over the tasks that changed it, as mergekit's `ram`.

    c_p = #{t: |tau_t,p| > epsilon}; delta_p = sum of these tau_t,p / c_p, and 0 where nobody changed it.

    Args:
        tvs: task vectors of T experts.
        epsilon: changes up to this size are none; an absolute number, wrong for coarsely rounded weights.

    >>> import torch; from calmerge import task_vectors
    >>> experts = {"a": {"w": torch.tensor([1.0, 0.0, 2.0])}, "b": {"w": torch.tensor([0.0, 3.0, 4.0])}}
    >>> mergekit_ram(task_vectors({"w": torch.zeros(3)}, experts))["w"]
    tensor([1., 3., 3.])

    Source: "ram" of arcee-ai/mergekit 0.1.5 (LGPL-3.0; Goddard et al., arXiv 2024); RAM, arXiv 2026 (2601.13572).
    """
    raise_together(check(mergekit_ram, {"epsilon": epsilon}))
    return ram(tvs, threshold=epsilon)


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

    >>> import torch; from calmerge import task_vectors
    >>> experts = {"a": {"w": torch.tensor([1.0, 0.0, 2.0])}, "b": {"w": torch.tensor([0.0, 3.0, 4.0])}}
    >>> mergekit_ramplus_tl(task_vectors({"w": torch.zeros(3)}, experts))["w"]
    tensor([1.0200, 3.0600, 3.0000])

    Source: "ramplus_tl" of arcee-ai/mergekit 0.1.5 (LGPL-3.0; Goddard et al., arXiv 2024); RAM+, arXiv 2026
    (2601.13572).
    """
    raise_together(check(mergekit_ramplus_tl, {"r": r, "alpha": alpha, "epsilon": epsilon}))

    return ram_plus(tvs, rate=r, most=alpha, threshold=epsilon)
