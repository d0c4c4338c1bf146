"""TALL-masks and Consensus Merging (Wang et al., ICML 2024)."""

from collections.abc import Mapping
from typing import Annotated

import torch
from torch import Tensor

from calmerge._errors import UsageError, did_you_mean
from calmerge._merged import Merged
from calmerge._signature import Interval, NonNegative, check, raise_together
from calmerge._task_vectors import Merge, TaskVectors
from calmerge._weights import Site, Weights
from calmerge.pieces.blend import plain_sum
from calmerge.pieces.patch import mask_patches


def tall_masks(
    tvs: TaskVectors,
    *,
    threshold: NonNegative | Mapping[str, NonNegative] = 0.4,
    inner: Merge | None = None,
) -> Merged:
    """One merged vector and one bit mask for each task: near every expert, at one bit more an entry and task.

    m_t = 1[|tau_t| > lambda_t |tau_MTL - tau_t|], strictly; theta_t = theta_0 + m_t * tau_MTL.

    Args:
        tvs: task vectors of T experts.
        threshold: lambda, at least 0; smaller ones give denser masks. The paper chooses among 0.2 to 0.6 on each task's
            validation data: by task, all of them. 0.4 is the middle of that range.
        inner: the merge that gives tau_MTL, at coefficient 1, since a scaled one would give other masks: TIES with
            `combine="sum"`; the sum of the task vectors when not given.

    >>> import torch; from calmerge import task_vectors
    >>> experts = {"a": {"w": torch.tensor([0.5, -0.2, 0.0])}, "b": {"w": torch.tensor([0.1, 0.4, -0.4])}}
    >>> tall_masks(task_vectors({"w": torch.zeros(3)}, experts)).for_task("a")["w"]
    tensor([0.6000, 0.2000, 0.0000])

    Source: Wang, Dimitriadis, Ortiz-Jimenez, Fleuret, Frossard, "Localizing Task Information for Improved Model Merging
    and Compression", ICML 2024; nik-dim/tall_masks (MIT).
    """
    raise_together(check(tall_masks, {"threshold": threshold}))
    shared = plain_sum(tvs) if inner is None else inner(tvs)
    return Merged(shared, mask_patches(task_masks(tvs, shared, threshold)))


def consensus(
    merged: Weights,
    tvs: TaskVectors,
    *,
    k: Annotated[int, Interval(0)] = 2,
    threshold: NonNegative | Mapping[str, NonNegative] = 0.4,
    scale: Annotated[float, Interval()] = 1.0,
) -> Weights:
    """A merged vector where at least k tasks want its entries, by their TALL-masks; 0 elsewhere.

    c_p = #{t : m_t,p = 1}; theta = theta_0 + alpha 1[c >= k] tau_MTL.

    Args:
        merged: tau_MTL, a merge at coefficient 1: `task_arithmetic` with `scale=1`, or `ties` with `combine="sum"`.
        tvs: the task vectors it was made of.
        k: how many tasks must want an entry. 1 drops what no task wants, 2 also what only one does, 0 nothing; more
            than there are tasks leaves the base.
        threshold: lambda of the masks, at least 0, for all tasks or by task, all of them; see `tall_masks`.
        scale: alpha, after masking; chosen on validation data from 0.1 to 1.

    >>> import torch; from calmerge import task_arithmetic, task_vectors
    >>> experts = {"a": {"w": torch.tensor([0.5, 0.3])}, "b": {"w": torch.tensor([0.0, 0.3])}}
    >>> tvs = task_vectors({"w": torch.zeros(2)}, experts)
    >>> consensus(task_arithmetic(tvs, scale=1.0), tvs)["w"]
    tensor([0.0000, 0.6000])

    Source: Wang, Dimitriadis, Ortiz-Jimenez, Fleuret, Frossard, "Localizing Task Information for Improved Model Merging
    and Compression", ICML 2024; nik-dim/tall_masks (MIT).
    """
    raise_together(check(consensus, {"k": k, "threshold": threshold, "scale": scale}))

    def agreed(v: Tensor, masks: Tensor, site: Site) -> Tensor:
        return v.where(masks.sum(0) >= k, 0.0) * scale

    return merged.map(agreed, task_masks(tvs, merged, threshold))


def task_masks(tvs: TaskVectors, merged: Weights, threshold: float | Mapping[str, float]) -> TaskVectors:
    """By task, where its vector is large beside what the others add to the merged one; [T, ...], boolean.

    >>> from calmerge import task_vectors
    >>> tvs = task_vectors({"w": torch.zeros(2)}, {"a": {"w": torch.tensor([1.0, 0.0])}})
    >>> task_masks(tvs, tvs.of("a"), 0.5)["w"]
    tensor([[ True, False]])
    """
    if isinstance(threshold, Mapping) and set(threshold) != set(tvs.tasks):
        wrong = next((t for t in threshold if t not in tvs.tasks), None)
        said = f"no task '{wrong}'. {did_you_mean(wrong, tvs.tasks)}" if wrong is not None else "some tasks have none."
        raise UsageError(f"threshold by task must name all tasks ({', '.join(tvs.tasks)}): {said}")
    lam = torch.tensor([threshold[t] if isinstance(threshold, Mapping) else threshold for t in tvs.tasks])

    def wanted(tau: Tensor, merged: Tensor, site: Site) -> Tensor:
        level = lam.to(tau.device).reshape(-1, *[1] * (tau.dim() - 1))
        return tau.abs() > level * (merged - tau).abs()

    return tvs.transform(wanted, merged)
