"""Keeping entries of middle magnitude: neither the largest nor the many small ones."""

from collections.abc import Generator
from types import ModuleType
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from calmerge._compiled import kernels
from calmerge._measure import Measure, Pass, PerTensor, kth_magnitude
from calmerge._signature import Fraction, check, raise_together
from calmerge._task_vectors import TaskVectors
from calmerge._weights import Site
from calmerge.pieces.blend import per_task
from calmerge.pieces.mask import masked


def middle(
    tvs: TaskVectors,
    *,
    keep: Fraction = 0.15,
    outliers: Fraction = 0.006,
    scope: Literal["row", "tensor"] = "row",
    remove_first: bool = True,
) -> TaskVectors:
    """Task vectors with the largest entries set to 0 as outliers, and of the rest all but the largest.

    In every slice of n entries the int(n * outliers) largest go, then the int(n * keep) largest of what is left stay.
    Where magnitudes are equal at a cut, they stay: as many as asked for, or more. Numbers without dimensions stay.

    Args:
        tvs: task vectors.
        keep: share kept, in [0, 1].
        outliers: share of the largest entries that is removed, in [0, 1]; none where n * outliers is below 1.
        scope: a slice is a row along the last dimension, or a whole `tensor`; a vector is one slice in both.
        remove_first: without it, the int(n * keep) largest are taken first and the outliers go from among them.

    >>> from calmerge import task_vectors
    >>> tvs = task_vectors({"w": torch.zeros(5)}, {"a": {"w": torch.tensor([9.0, -8.0, 7.0, 6.0, 5.0])}})
    >>> middle(tvs, keep=0.4, outliers=0.2)["w"]
    tensor([[ 0., -8.,  7.,  0.,  0.]])

    Source: the first step of Model Breadcrumbs (Davari and Belilovsky, ECCV 2024); rezazzr/breadcrumbs (no licence file
    in the copy read).
    """
    options = {"keep": keep, "outliers": outliers, "scope": scope, "remove_first": remove_first}
    raise_together(check(middle, options))

    def ranks(n: int) -> tuple[int, int]:
        """The ranks between which magnitudes stay, 1 for the smallest; crossed where none does."""
        removed, kept = int(n * outliers), int(n * keep)
        above = n - removed if remove_first else n
        return (max(1, above - kept + 1), n - removed) if kept else (1, 0)

    def by_rows(name: str) -> bool:
        return scope == "row" and len(tvs.specs[name].shape) > 1

    def bound(name: str, which: int) -> Measure:
        """A magnitude of a whole tensor, for those that are one slice."""
        spec = tvs.specs[name]
        both = ranks(spec.numel)
        if not spec.shape or not spec.numel or by_rows(name):
            return _constant((0.0, torch.inf)[which])
        if both[0] > both[1]:
            return _constant((torch.inf, 0.0)[which])
        return kth_magnitude(tvs.only_names([name]), both[which])

    def kept(tau: Tensor, low: Tensor, high: Tensor, site: Site) -> Tensor:
        loops = kernels()
        if loops is not None and by_rows(site.name) and tau.numel():
            first, last = ranks(tau.shape[-1])
            return _between(loops, tau, first, last) if first <= last else torch.zeros_like(tau)
        size = tau.detach().cpu().abs().numpy()  # NumPy compares, and finds ranks, in a tenth of torch's time
        least, most = (per_task(bound, tau).cpu().numpy() for bound in (low, high))
        if by_rows(site.name) and tau.numel():
            first, last = ranks(tau.shape[-1])
            if first > last:
                return torch.zeros_like(tau)
            ranked = np.partition(size, sorted({first - 1, last - 1}), axis=-1)
            least, most = ranked[..., first - 1 : first], ranked[..., last - 1 : last]
        return masked(tau, torch.from_numpy((size >= least) & (size <= most)).to(tau.device))

    return tvs.transform(kept, *(PerTensor({name: bound(name, which) for name in tvs.specs}) for which in (0, 1)))


def _between(loops: ModuleType, tau: Tensor, first: int, last: int) -> Tensor:
    rows = tau.detach().cpu().contiguous().numpy().reshape(-1, tau.shape[-1])
    out = np.empty_like(rows)
    loops.between(rows, first, last, out)
    return torch.from_numpy(out).reshape(tau.shape).to(tau.device)


def _constant(value: float) -> Measure:
    def rounds() -> Generator[Pass, Tensor, Tensor]:
        yield from ()
        return torch.tensor([value])

    return Measure((), rounds, passes=0)
