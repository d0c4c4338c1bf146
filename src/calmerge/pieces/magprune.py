"""Dropping entries at random, small ones more often than large ones."""

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from calmerge._compiled import kernels
from calmerge._errors import UsageError
from calmerge._random import Limits, bernoulli, draws
from calmerge._signature import Fraction, Seed, check, raise_together
from calmerge._task_vectors import TaskVectors
from calmerge._watch import Array
from calmerge._weights import Site
from calmerge.pieces.mask import masked


def magprune(
    tvs: TaskVectors, *, rate: Fraction = 0.5, spread: Fraction = 0.15, rescale: bool = True, seed: Seed = 0
) -> TaskVectors:
    """Task vectors with entries set to 0 at random, by their rank in their row, and the rest scaled to make up for it.

    The entry of rank r = 0..n-1 by magnitude in its row of n is dropped with probability
    p_r = p + epsilon/2 - epsilon r / (n - 1); what stays is divided by 1 - p_r, so that the mean over draws is tau.

    Args:
        tvs: task vectors.
        rate: p, the mean share dropped, in [0, 1].
        spread: epsilon, by how much the probabilities of the smallest and the largest entry differ, in [0, 1]; 0 drops
            all alike, which is DARE. rate - epsilon/2 and rate + epsilon/2 must lie in [0, 1).
        rescale: without it nothing is divided.
        seed: names the draw.

    >>> from calmerge import task_vectors
    >>> tvs = task_vectors({"w": torch.zeros(2, 500)}, {"a": {"w": torch.ones(2, 500)}})
    >>> magprune(tvs, rate=0.75, spread=0.0)["w"].unique()
    tensor([0., 4.])

    Source: what DELLA does before it merges (Deep, Bhardwaj, Poria, arXiv 2024); declare-lab/della.
    Differences: a row is the last dimension; a row of one entry is kept. Equal magnitudes rank by their place.
    """
    raise_together(check(magprune, {"rate": rate, "spread": spread, "rescale": rescale, "seed": seed}))
    low, high = rate - spread / 2, rate + spread / 2
    if low < 0 or high >= 1:
        raise UsageError(
            f"magprune: drop probabilities from {low:g} to {high:g} follow from rate {rate:g} and spread {spread:g}; "
            "they must lie in [0, 1). Choose a smaller spread."
        )
    every = [1 - rate] * len(tvs.tasks)
    return keep_by_rank(tvs, every, [spread / 2] * len(every), rescale="per_element" if rescale else None, seed=seed)


def keep_by_rank(
    tvs: TaskVectors,
    density: Sequence[float],
    epsilon: Sequence[float],
    *,
    rescale: Literal["per_element", "l1"] | None,
    seed: int,
) -> TaskVectors:
    """Task vectors of which each entry stays with a probability that rises with its rank in its row.

    q_r = density - epsilon + 2 epsilon r / (n - 1) for ranks r = 0..n-1; a row of one entry is kept.

    Args:
        tvs: task vectors.
        density: mean of the probabilities, one for each task; 1 or more keeps all.
        epsilon: half of their range.
        rescale: `per_element` divides what stays by its probability, `l1` gives every tensor its former L1 norm.
        seed: names the draw.

    >>> from calmerge import task_vectors
    >>> tvs = task_vectors({"w": torch.zeros(3)}, {"a": {"w": torch.tensor([3.0, 1.0, -2.0])}})
    >>> keep_by_rank(tvs, [0.5], [0.5], rescale=None, seed=0)["w"][0, :2]
    tensor([3., 0.])
    """

    def kept(tau: Tensor, site: Site) -> Tensor:
        n = tvs.specs[site.name].numel
        if not n:
            return tau
        if tau.dim() == 2 and tau.shape[1] < n:  # a part of a vector, which is one row: rank in all of it
            whole = kept(tvs.read(site.name), Site(site.name, 0))
            return whole[:, site.offset : site.offset + tau.shape[1]]
        shape = tuple(tau.shape[1:])
        result = tau.new_empty(tau.shape)
        for t, task in enumerate(tvs.tasks):
            if density[t] >= 1:
                result[t] = tau[t]
                continue
            width = shape[-1] if shape else 1
            chances = density[t] - epsilon[t] + 2 * epsilon[t] * _line(width) if width > 1 else torch.ones(1)
            key = (seed, site.name, task)
            _keep(tau[t], chances, key, site.offset, divided=rescale == "per_element", into=result[t])
            if rescale == "l1":
                result[t] *= _l1(tau[t]) / (_l1(result[t]) or 1.0)
        return result

    return tvs if all(d >= 1 for d in density) else tvs.transform(kept, elementwise=rescale != "l1")


def _keep(
    tensor: Tensor, chances: Tensor, key: tuple[object, ...], offset: int, *, divided: bool, into: Tensor
) -> None:
    """Put the entries that stay with the chance of their rank in their row, perhaps divided by it, and 0 for others."""
    loops = kernels()
    if loops is not None and into.device.type == "cpu" and into.dtype == torch.float32:
        rows, limits, met = _rows(tensor), Limits((1 - chances).numpy()), np.empty((4096, 2), np.int64)
        out = into.detach().numpy().reshape(rows.shape)  # a view, since it is contiguous
        drawn = draws(rows.size, key, offset).reshape(rows.shape)
        count = loops.pruned(rows, drawn, chances.numpy(), limits.upper, divided, out, met, _room(rows))
        if count <= len(met):
            for i, rank in met[:count].tolist():
                out.reshape(-1)[i] *= not limits.decide(rank, offset + i, key)
            return
    chance = _by_rank(_ordered(tensor), chances).reshape(tensor.shape).to(tensor.device)
    gone = bernoulli(tuple(tensor.shape), 1 - chance, *key, offset=offset).to(tensor.device)
    into.copy_(masked(tensor / chance if divided else tensor, ~gone))


def _l1(tensor: Tensor) -> float:
    """The sum of magnitudes; NumPy adds in one order, whatever the number of threads."""
    return float(np.abs(tensor.detach().cpu().numpy()).sum(dtype=np.float64))


def ranks(tensor: Tensor) -> Tensor:
    """For each entry, its rank by magnitude in its last dimension, from 0 for the smallest to 1 for the largest.

    Of equal magnitudes the one further in front ranks lower.

    >>> ranks(torch.tensor([3.0, -1.0, 1.0]))
    tensor([1.0000, 0.0000, 0.5000])
    """
    keys = _ordered(tensor)
    return _by_rank(keys, _line(keys.shape[1])).reshape(tensor.shape)


def _line(n: int) -> Tensor:
    return torch.arange(n, dtype=torch.float32) / max(1, n - 1)


def _ordered(tensor: Tensor) -> Array:
    """[rows, n]: the places of the entries of a row by magnitude, in the lower half of each word."""
    rows, loops = _rows(tensor), kernels()
    if loops is not None:
        keys = np.empty(rows.shape, np.int64)
        loops.ordered(rows, keys, _room(rows))
        return keys
    keys = (rows.view(np.int32) & 0x7FFFFFFF).astype(np.int64) << 32  # magnitudes order like their bits
    keys |= np.arange(rows.shape[1])
    keys.sort(axis=1)  # of one machine word an entry: far quicker than sorting floats and carrying an index
    return keys


def _room(rows: Array) -> Array:
    n = rows.shape[1]
    return np.empty((2, n), np.uint16 if n < 1 << 16 else np.int32)


def _rows(tensor: Tensor) -> Array:
    n = tensor.shape[-1] if tensor.dim() else 1
    return tensor.detach().cpu().float().contiguous().numpy().reshape(-1, n)


def _by_rank(keys: Array, line: Tensor) -> Tensor:
    """`line[r]` where the entry of rank r of its row stands."""
    order = torch.from_numpy(keys & 0xFFFFFFFF)
    return torch.empty(order.shape).scatter_(1, order, line.expand(order.shape))
