"""Dropping entries at random."""

from collections.abc import Sequence

import torch
from torch import Tensor

from calmerge._flags import Flags
from calmerge._random import bernoulli
from calmerge._signature import Fraction, Seed, check, raise_together
from calmerge._task_vectors import TaskVectors
from calmerge._watch import Array
from calmerge._weights import Site


def drop_and_rescale(tvs: TaskVectors, *, rate: Fraction = 0.9, rescale: bool = True, seed: Seed = 0) -> TaskVectors:
    """Task vectors with a share `rate` of the entries set to 0 at random, the rest divided by 1 - rate.

    tau_hat = (1 - m) * tau / (1 - p), m ~ Bernoulli(p), independent for every task and entry and a function of (seed,
    tensor name, task, entry) alone: neither the order of the experts nor the device changes it.

    Args:
        tvs: task vectors.
        rate: p, the share dropped, in [0, 1]; 0 draws nothing, 1 leaves nothing.
        rescale: without it nothing is divided ("DropOnly", the official code's default).
        seed: names the draw.

    >>> from calmerge import task_vectors
    >>> tvs = task_vectors({"w": torch.zeros(1000)}, {"a": {"w": torch.ones(1000)}})
    >>> drop_and_rescale(tvs, rate=0.75)["w"].unique()
    tensor([0., 4.])

    Source: what DARE does before another method merges (Yu, Yu, Yu, Huang, Li, ICML 2024); yule-BUAA/MergeLM (no
    licence file in the copy read).
    """
    raise_together(check(drop_and_rescale, {"rate": rate, "rescale": rescale, "seed": seed}))
    factor = 1 / (1 - rate) if rescale and rate < 1 else 1.0
    thinned = drop(tvs, [rate] * len(tvs.tasks), seed=seed)
    return thinned if factor == 1 else thinned.transform(lambda tau, site: tau * factor)


def drop(tvs: TaskVectors, rates: Sequence[float], *, seed: int) -> TaskVectors:
    """Task vectors with a share of the entries of each set to 0 at random, the others as they are.

    Args:
        tvs: task vectors.
        rates: the share of each task, in [0, 1]; 0 draws nothing.
        seed: names the draw, as for `drop_and_rescale`.

    >>> from calmerge import task_vectors
    >>> tvs = task_vectors({"w": torch.zeros(3)}, {"a": {"w": torch.ones(3)}, "b": {"w": torch.ones(3)}})
    >>> drop(tvs, [0.0, 1.0], seed=0)["w"]
    tensor([[1., 1., 1.],
            [0., 0., 0.]])
    """

    def draw(name: str, task: int, offset: int, into: Array) -> None:
        rate = rates[task]
        into[:] = bernoulli(into.shape, rate, seed, name, tvs.tasks[task], offset=offset).numpy() if rate else False

    def kept(tau: Tensor, gone: Tensor, site: Site) -> Tensor:
        return tau * (~gone).view(torch.uint8).to(tau.device)  # a product with booleans takes four times as long

    return tvs.transform(kept, Flags(tvs, draw)) if any(rates) else tvs
