"""Making up for what was dropped."""

import torch
from torch import Tensor

from calmerge._measure import per_tensor, total
from calmerge._task_vectors import TaskVectors
from calmerge._weights import Site
from calmerge.pieces.blend import per_task, sums


def restore_l1(thinned: TaskVectors, tvs: TaskVectors) -> TaskVectors:
    """Thinned task vectors times what gives every tensor of every task the L1 norm that it had before.

    factor = sum_p |tau_p| / sum_p |tau_hat_p|; 1 where nothing is left.

    >>> from calmerge import task_vectors
    >>> tvs = task_vectors({"w": torch.zeros(3)}, {"a": {"w": torch.tensor([3.0, 1.0, -2.0])}})
    >>> restore_l1(tvs.transform(lambda tau, site: tau.where(tau == 3, 0.0)), tvs)["w"]
    tensor([[6., 0., 0.]])
    """

    def scaled(tau: Tensor, before: Tensor, after: Tensor, site: Site) -> Tensor:
        return tau * per_task(torch.where(after > 0, before / after, 1.0), tau)

    return thinned.transform(
        scaled, *(per_tensor(w, lambda w: total(w, lambda tau: sums(tau.abs()))) for w in (tvs, thinned))
    )
