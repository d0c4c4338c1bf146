"""EMR-Merging (Huang et al., NeurIPS 2024)."""

from collections.abc import Generator
from typing import Literal

import torch
from torch import Tensor

from calmerge._measure import Measure, Pass
from calmerge._merged import Merged
from calmerge._signature import check, raise_together
from calmerge._task_vectors import TaskVectors
from calmerge._weights import Site
from calmerge.pieces.blend import summed
from calmerge.pieces.elect import agree
from calmerge.pieces.patch import mask_patches


def emr(tvs: TaskVectors, *, rescale: Literal["official", "l1"] = "official") -> Merged:
    """One unified vector, and for each task one bit mask and one number: elect, mask, rescale. Nothing to tune.

    gamma = sign(sum_t tau_t), 0 counting as minus; M_t = 1[tau_t gamma > 0]; tau_uni = gamma max_t |tau_t * M_t|;
    theta_t = theta_0 + lambda_t M_t * tau_uni, lambda_t = (size of tau_t) / (size of M_t * tau_uni).

    Args:
        tvs: task vectors of T experts.
        rescale: size is the sum over tensors of the mean magnitude (`official`: small tensors weigh as much as large
            ones), or the sum of all magnitudes (`l1`: the paper's formula).

    >>> import torch; from calmerge import task_vectors
    >>> experts = {"a": {"w": torch.tensor([2.0, -1.0, 0.5])}, "b": {"w": torch.tensor([1.0, 3.0, -0.5])}}
    >>> merged = emr(task_vectors({"w": torch.zeros(3)}, experts))
    >>> merged.shared["w"], merged.for_task("a")["w"]
    (tensor([ 2.0000,  3.0000, -0.5000]), tensor([3.5000, 0.0000, 0.0000]))

    Source: Huang, Ye, Chen, He, Yue, Ouyang, "EMR-Merging: Tuning-Free High-Performance Model Merging", NeurIPS 2024;
    harveyhuang18/EMR_Merging (no licence file).
    Differences: with an empty mask lambda_t is 0 / 0 in the official code; here it is 0, which leaves the base.
    """
    raise_together(check(emr, {"rescale": rescale}))
    signs = tvs.reduce(lambda tau, site: summed(tau).sign())
    agreeing = agree(tvs, signs)
    unified = agreeing.reduce(lambda tau, sign, site: torch.where(sign > 0, tau.amax(0), tau.amin(0)), signs)
    masks = agreeing.transform(lambda tau, site: tau != 0)
    masked = masks.transform(lambda on, v, site: v.where(on, 0.0), unified)
    sizes = _sizes(tvs, masked, mean=rescale == "official")
    return Merged(unified, mask_patches(masks, sizes.map(lambda s: torch.where(s[1] > 0, s[0] / s[1], 0.0))))


def _sizes(tvs: TaskVectors, masked: TaskVectors, *, mean: bool) -> Measure:
    """The sizes of two stacks of task vectors, [2, T]: sums of magnitudes, or of every tensor's mean magnitude."""

    def sizes(tau: Tensor, masked: Tensor, site: Site) -> Tensor:
        n = tvs.specs[site.name].numel if mean else 1
        both = torch.stack([tau, masked]).reshape(2, len(tau), -1)
        return both.abs().sum(-1, dtype=torch.float64) / max(1, n)

    def rounds() -> Generator[Pass, Tensor, Tensor]:
        return (yield sizes)

    return Measure((tvs, masked), rounds, passes=1)
