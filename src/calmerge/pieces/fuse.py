"""The common end of mergekit's task-vector methods: weigh, let signs vote, add up, divide."""

from collections.abc import Sequence

import torch
from torch import Tensor

from calmerge._task_vectors import TaskVectors
from calmerge._weights import Site, Weights
from calmerge.pieces.blend import per_task, summed


def fuse(tvs: TaskVectors, weight: Sequence[float], *, vote: bool, normalize: bool, scale: float = 1.0) -> Weights:
    """One delta from weighted task vectors, those alone that have the elected sign where there is a vote.

    s = sign(sum_t w_t tau_t), where 0 counts as plus; delta = scale * sum_t w_t tau_t / sum_t w_t, both sums over the
    tasks whose w_t tau_t has the sign s (without a vote, over all). An entry of 0 never agrees.

    Args:
        tvs: task vectors, usually thinned out.
        weight: w, one for each task.
        vote: whether signs vote; the weights count before that.
        normalize: whether to divide by the weights; by 1 where they sum to 0.
        scale: a factor on the result.

    >>> from calmerge import task_vectors
    >>> experts = {"a": {"w": torch.tensor([1.0, 2.0])}, "b": {"w": torch.tensor([-1.0, 4.0])}}
    >>> tvs = task_vectors({"w": torch.zeros(2)}, experts)
    >>> fuse(tvs, [1.0, 1.0], vote=True, normalize=True)["w"]
    tensor([1., 3.])
    """

    def fused(tau: Tensor, site: Site) -> Tensor:
        w = per_task(torch.tensor(weight), tau)
        weighted = tau * w
        if vote:
            agrees = agreement(weighted)
            weighted, w = weighted * agrees, w * agrees
        result = summed(weighted)
        if normalize:
            divisor = summed(w)
            empty = divisor == 0 if vote else divisor.abs() < 1e-8
            result = result / divisor.where(~empty, 1.0)
        return result if scale == 1 else result * scale

    return tvs.reduce(fused)


def agreement(tau: Tensor) -> Tensor:
    """1 where an entry has the sign of the sum over tasks, of which 0 counts as plus; 0 elsewhere, and where it is 0.

    >>> agreement(torch.tensor([[1.0, -2.0, 0.0], [-1.0, 1.0, 0.0]]))
    tensor([[1., 1., 0.],
            [0., 0., 0.]])
    """
    sign = torch.where(summed(tau) >= 0, 1.0, -1.0)
    return (tau * sign > 0).to(tau.dtype)
