"""Making up for what was dropped."""

import torch

from calmerge._measure import Measure, PerTensor, total
from calmerge._task_vectors import TaskVectors
from calmerge.pieces.blend import per_task, sums


def restore_l1(thinned: TaskVectors, tvs: TaskVectors) -> TaskVectors:
    """Thinned task vectors times what gives every tensor of every task the L1 norm that it had before.

    factor = sum_p |tau_p| / sum_p |tau_hat_p|; 1 where nothing is left.

    >>> from calmerge import task_vectors
    >>> tvs = task_vectors({"w": torch.zeros(3)}, {"a": {"w": torch.tensor([3.0, 1.0, -2.0])}})
    >>> restore_l1(tvs.transform(lambda tau, site: tau.where(tau == 3, 0.0)), tvs)["w"]
    tensor([[6., 0., 0.]])
    """

    def factor(name: str) -> Measure:
        before, after = (total(w.only_names([name]), lambda tau: sums(tau.abs())) for w in (tvs, thinned))
        return before.map(lambda norm, left: torch.where(left > 0, norm / left, 1.0), after)

    factors = PerTensor({name: factor(name) for name in tvs.specs}, factor=True)
    return thinned.transform(lambda tau, c, site: tau * per_task(c, tau), factors)
