"""TIES-Merging (Yadav et al., NeurIPS 2023)."""

from typing import Annotated, Literal

from calmerge._signature import Interval, KeepFraction, check, raise_together
from calmerge._task_vectors import TaskVectors
from calmerge._weights import Weights
from calmerge.pieces.elect import agree, disjoint, elect
from calmerge.pieces.trim import trim


def ties(
    tvs: TaskVectors,
    *,
    keep: KeepFraction = 0.2,
    scale: Annotated[float, Interval()] = 1.0,
    combine: Literal["mean", "sum", "max"] = "mean",
    scope: Literal["model", "tensor"] = "model",
    signs: Literal["mass", "normmass", "normfrac"] = "mass",
) -> Weights:
    """Trim each task vector, elect a sign for every entry, merge the entries that have it.

    tau_hat_t = top `keep` of tau_t by magnitude over the whole model; s = sign(sum_t tau_hat_t);
    tau_m,p = mean of tau_hat_t,p over the tasks with sign s_p; theta = theta_0 + lambda tau_m.

    Args:
        tvs: task vectors of T experts.
        keep: K, fraction of entries kept per task, counted over all merged tensors together, in (0, 1].
        scale: lambda; 1 with `mean`. The "TIES" row of many papers is `combine="sum", scale=0.3`.
        combine: `mean` over the entries that agree, their `sum`, or the one of largest magnitude (`max`).
        scope: entries compete over the whole `model` (the paper), or within each `tensor` (mergekit, PEFT), where
            exactly int(n K) stay, at least one.
        signs: elected by the sum over tasks (`mass`, the paper), or by two other rules of the official code; see
            `elect`.

    >>> import torch; from calmerge import task_vectors
    >>> a, b = torch.tensor([3.0, -1.0, 2.0, 0.0, 0.0]), torch.tensor([-2.0, -4.0, 0.0, 0.0, 1.0])
    >>> ties(task_vectors({"w": torch.zeros(5)}, {"a": {"w": a}, "b": {"w": b}}), keep=0.4)["w"]
    tensor([ 3.0000, -2.5000,  2.0000,  0.0000,  1.0000])

    Source: Yadav, Tam, Choshen, Raffel, Bansal, "TIES-Merging: Resolving Interference When Merging Models",
    NeurIPS 2023; prateeky2806/ties-merging (BSD-3-Clause).
    Differences: as the official code, the threshold is global, k = d - int(d K) counts from the smallest, entries equal
    to it stay, and a sum of 0 takes the model's majority sign. keep = 1 keeps all (the official parser fails on it).
    """
    raise_together(check(ties, {"keep": keep, "scale": scale, "combine": combine, "scope": scope, "signs": signs}))
    trimmed = trim(tvs, keep=keep, scope=scope)
    merged = disjoint(trimmed, elect(trimmed, by=signs), combine=combine)
    return merged.map(lambda tau, site: tau * scale)


def ties_split(tvs: TaskVectors, *, keep: KeepFraction = 0.2) -> TaskVectors:
    """Task vectors trimmed and rid of the entries that lost the sign election, not yet merged.

    Args:
        tvs: task vectors of T experts.
        keep: fraction of entries kept per task, counted over the whole model, in (0, 1].

    >>> import torch; from calmerge import task_vectors
    >>> a, b = torch.tensor([3.0, -1.0, 2.0, 0.0, 0.0]), torch.tensor([-2.0, -4.0, 0.0, 0.0, 1.0])
    >>> ties_split(task_vectors({"w": torch.zeros(5)}, {"a": {"w": a}, "b": {"w": b}}), keep=0.4)["w"]
    tensor([[ 3., -1.,  2.,  0.,  0.],
            [ 0., -4.,  0.,  0.,  1.]])

    Source: what AdaMerging++ starts from (Yang et al., ICLR 2024); TIES of Yadav et al., NeurIPS 2023.
    """
    raise_together(check(ties_split, {"keep": keep}))
    trimmed = trim(tvs, keep=keep)
    return agree(trimmed, elect(trimmed))
