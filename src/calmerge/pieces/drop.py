"""Dropping entries at random."""

import torch
from torch import Tensor

from calmerge._random import bernoulli
from calmerge._signature import Fraction, Seed, check, raise_together
from calmerge._task_vectors import TaskVectors
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
    if rate == 0:
        return tvs
    factor = 1 / (1 - rate) if rescale and rate < 1 else 1.0

    def dropped(tau: Tensor, site: Site) -> Tensor:
        shape = tuple(tau.shape[1:])
        result = torch.empty_like(tau)
        for t, task in enumerate(tvs.tasks):
            gone = bernoulli(shape, rate, seed, site.name, task, offset=site.offset)
            kept = (~gone).view(torch.uint8).to(tau.device)  # a product with booleans takes four times as long
            torch.mul(tau[t], kept, out=result[t]).mul_(factor)
        return result

    return tvs.transform(dropped)
