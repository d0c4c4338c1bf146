"""Task vectors of one length."""

import torch
from torch import Tensor

from calmerge._measure import total
from calmerge._task_vectors import TaskVectors
from calmerge._weights import Site
from calmerge.pieces.blend import per_task, squares


def equal_norms(tvs: TaskVectors) -> TaskVectors:
    """Task vectors scaled to the mean of their norms, so that no expert outweighs the others by its size alone.

    tau_hat_t = tau_t * mean_s ||tau_s|| / ||tau_t||, norms over the whole model. A vector of zeros stays.

    Args:
        tvs: task vectors of T experts.

    >>> import torch; from calmerge import task_vectors
    >>> experts = {"a": {"w": torch.tensor([3.0, 4.0])}, "b": {"w": torch.tensor([0.0, 1.0])}}
    >>> equal_norms(task_vectors({"w": torch.zeros(2)}, experts))["w"]
    tensor([[1.8000, 2.4000],
            [0.0000, 3.0000]])

    Source: the data-free part of DisTaC, ICLR 2026, which distils the scaled experts afterwards.
    """

    def scaled(tau: Tensor, squared: Tensor, site: Site) -> Tensor:
        norms = squared.sqrt()
        return tau * per_task(torch.where(norms > 0, norms.mean() / norms, 1.0), tau)

    return tvs.transform(scaled, total(tvs, squares))
