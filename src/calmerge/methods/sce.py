"""SCE: select, calculate, erase (FuseChat-3 line, 2024)."""

from functools import partial

import torch
from torch import Tensor

from calmerge._measure import PerTensor, per_tensor, total
from calmerge._signature import KeepFraction, check, raise_together
from calmerge._task_vectors import TaskVectors
from calmerge._weights import Site, Weights
from calmerge.pieces.blend import averaged, per_task, summed, sums
from calmerge.pieces.fuse import agreement
from calmerge.pieces.largest_sums import largest_and_sums
from calmerge.pieces.mask import masked


def sce(tvs: TaskVectors, *, select_topk: KeepFraction = 1.0) -> Weights:
    """Keep the entries on which the tasks differ most, weigh tasks by their squares, erase minority signs; per tensor.

    1. Select the k = int(K m) entries of largest variance over tasks, of m with any. 2. w_t = mean of tau_t^2 over the
    tensor, normalised over tasks. 3. Erase entries whose sign is not that of sum_t tau_t (0 counts as plus).
    4. delta = sum_t w_t tau_t / sum_t w_t over what is left.

    Args:
        tvs: task vectors of T experts.
        select_topk: K, the share of entries selected, in (0, 1]; 1 selects all. Below 1, entries on which all tasks
            agree exactly have no variance and are dropped.

    >>> from calmerge import task_vectors
    >>> a, b = torch.tensor([1.0, -2.0, 0.0, 4.0]), torch.tensor([1.0, 2.0, 0.0, -1.0])
    >>> sce(task_vectors({"w": torch.zeros(4)}, {"a": {"w": a}, "b": {"w": b}}), select_topk=0.5)["w"]
    tensor([0., 0., 0., 4.])

    Source: Wan, Zhong, Yang, Chen, Quan, "FuseChat: Knowledge Fusion of Chat Models", arXiv 2024 (2408.07990);
    fanqiwan/FuseAI, and "sce" of arcee-ai/mergekit (LGPL-3.0).
    Differences: equal variances at the cut are chosen by their place (see `largest`). Small squares are weighed as
    they are; `mergekit_sce` gives all tasks one weight where the means sum to less than 1e-6, as deltas of language
    models often do.
    """
    raise_together(check(sce, {"select_topk": select_topk}))
    return select_calculate_erase(tvs, select_topk, floor=0.0)


def mergekit_sce(tvs: TaskVectors, *, select_topk: KeepFraction = 1.0) -> Weights:
    """SCE as mergekit's `sce`: tasks count alike where their mean squares are small.

    As `sce`, with w_t = 1/T where sum_t mean(tau_t^2) < 1e-6, and sum_t w_t at least 1e-6 where one divides by it.

    Args:
        tvs: task vectors of T experts.
        select_topk: the share of entries selected in each tensor, in (0, 1]; 1 selects all.

    >>> from calmerge import task_vectors
    >>> tvs = task_vectors({"w": torch.zeros(1)}, {"a": {"w": torch.tensor([3e-4])}, "b": {"w": torch.tensor([1e-4])}})
    >>> mergekit_sce(tvs)["w"], sce(tvs)["w"]
    (tensor([0.0002]), tensor([0.0003]))

    Source: "sce" of arcee-ai/mergekit 0.1.5 (LGPL-3.0; Goddard et al., arXiv 2024); Wan et al., arXiv 2024.
    Differences: equal variances at the cut are chosen by their place (see `largest`), there by an unstable sort.
    """
    raise_together(check(mergekit_sce, {"select_topk": select_topk}))
    return select_calculate_erase(tvs, select_topk, floor=1e-6)


def select_calculate_erase(tvs: TaskVectors, select_topk: float, *, floor: float) -> Weights:
    """The three steps, with all tasks' weights alike where their mean squares sum to less than `floor`.

    >>> from calmerge import task_vectors
    >>> tvs = task_vectors({"w": torch.zeros(1)}, {"a": {"w": torch.tensor([0.2])}, "b": {"w": torch.tensor([0.4])}})
    >>> select_calculate_erase(tvs, 1.0, floor=0.5)["w"]
    tensor([0.3000])
    """
    squares, chosen = tvs.transform(lambda tau, site: tau.square()), tvs
    if select_topk < 1:
        kept, squared = largest_and_sums(tvs.reduce(_varying), select_topk, squares)
        chosen = tvs.transform(lambda tau, stays, site: masked(tau, stays), kept)
    else:
        squared = per_tensor(squares, lambda w: total(w, sums))
    numel = {name: spec.numel for name, spec in tvs.specs.items()}
    means = {name: one.map(partial(_shares, n=numel[name], floor=floor)) for name, one in squared.measures.items()}

    def fused(tau: Tensor, share: Tensor, site: Site) -> Tensor:
        w = per_task(share, tau) * agreement(tau)
        divisor = summed(w)
        return summed(tau * w) / (divisor.clamp(min=floor) if floor else divisor.where(divisor > 0, 1.0))

    return chosen.reduce(fused, PerTensor(means, factor=True))


def _varying(tau: Tensor, site: Site) -> Tensor:
    """T times the variance over tasks, which orders entries as the variance does."""
    return summed((tau - averaged(tau)).square_())


def _shares(square: Tensor, n: int, floor: float) -> Tensor:
    square = square / n
    known = bool(square.sum() > 0) and bool(square.sum() >= floor)
    return square / square.sum() if known else torch.full_like(square, 1 / len(square))
