"""Keeping the entries of largest magnitude."""

from typing import Literal

import torch
from torch import Tensor

from calmerge._signature import KeepFraction, check, raise_together
from calmerge._task_vectors import TaskVectors
from calmerge._threshold import Cut, Threshold
from calmerge.pieces.largest import keep_largest


def trim(tvs: TaskVectors, *, keep: KeepFraction = 0.2, scope: Literal["model", "tensor"] = "model") -> TaskVectors:
    """Task vectors with all but the largest entries set to 0, the threshold counted per task over the whole model.

    tau_hat = tau where |tau| >= the k-th smallest |tau|, k = d - int(d * keep); entries equal to it stay, so that
    int(d * keep) + 1 entries are kept where magnitudes are distinct, and all of them where the threshold is 0.

    Args:
        tvs: task vectors.
        keep: fraction of entries kept per task, in (0, 1]; 1 keeps all.
        scope: entries compete over the whole `model` as in the official code, or within each `tensor`: there exactly
            int(n * keep) stay, at least one, as in mergekit and PEFT. With 1 - p for `keep` that is DARE's ablation
            that drops by magnitude.

    >>> import torch; from calmerge import task_vectors
    >>> tvs = task_vectors({"w": torch.zeros(5)}, {"a": {"w": torch.tensor([3.0, -1.0, 2.0, 0.0, 0.5])}})
    >>> trim(tvs, keep=0.2)["w"]
    tensor([[3., 0., 2., 0., 0.]])

    Source: the first step of TIES (Yadav, Tam, Choshen, Raffel, Bansal, NeurIPS 2023); prateeky2806/ties-merging
    (BSD-3-Clause).
    """
    raise_together(check(trim, {"keep": keep, "scope": scope}))
    if scope == "tensor":
        return keep_largest(tvs, lambda name, n: [max(1, int(n * keep))])
    d = tvs.numel
    rank = d - int(d * keep)
    return from_rank(tvs, rank) if rank > 0 else tvs


def from_rank(tvs: TaskVectors, rank: int) -> TaskVectors:
    """Task vectors rid of what is smaller than the `rank`-th smallest magnitude of their task, over the whole model.

    >>> import torch; from calmerge import task_vectors
    >>> tvs = task_vectors({"w": torch.zeros(3)}, {"a": {"w": torch.tensor([3.0, -1.0, 2.0])}})
    >>> from_rank(tvs, 2)["w"]
    tensor([[3., 0., 2.]])
    """

    threshold = Threshold(tvs, rank)
    trimmed = tvs.transform(lambda tau, at, site: _kept(tau, at), threshold)
    trimmed.cut = Cut(threshold, _kept)
    return trimmed


def _kept(tau: Tensor, threshold: Tensor) -> Tensor:
    # what is not above the largest float32 under the threshold goes; under 0 that is a negative one, and nothing does
    below = torch.nextafter(threshold, torch.full_like(threshold, -torch.inf))
    trimmed = torch.empty_like(tau)
    for t, cut in enumerate(below.tolist()):
        torch.hardshrink(tau[t], cut, out=trimmed[t])  # 0 where |tau| <= cut
    return trimmed
