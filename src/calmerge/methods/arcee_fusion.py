"""Arcee Fusion: the important changes of one model."""

from functools import partial

import torch
from torch import Tensor

from calmerge._measure import Measure, kth_magnitude, per_tensor
from calmerge._task_vectors import TaskVectors
from calmerge._weights import Site, Weights
from calmerge.methods.nearswap import one_expert


def arcee_fusion(tvs: TaskVectors) -> Weights:
    """The base with the most important changes of the one expert, chosen tensor by tensor.

    importance = |tau| KL(softmax(theta_1) || softmax(theta_0)), the divergence along the last dimension (of each row);
    entries with an importance of at least median + 1.5 (Q3 - Q1) over the tensor become the expert's.

    Args:
        tvs: task vectors of one expert. Whole tensors are held, in float64.

    Raises:
        UsageError: there is not exactly one expert.

    >>> from calmerge import task_vectors
    >>> expert = {"w": torch.tensor([[0.0, 0.1], [0.1, 0.2], [0.0, 4.0]])}
    >>> arcee_fusion(task_vectors({"w": torch.zeros(3, 2)}, {"a": expert}))["w"]
    tensor([[0., 0.],
            [0., 0.],
            [0., 4.]])

    Source: "arcee_fusion" of arcee-ai/mergekit 0.1.5 (LGPL-3.0; Goddard et al., arXiv 2024).
    Differences: quartiles are exact, x[floor(q (n - 1))] of the sorted values, where mergekit draws a million entries
    of larger tensors. The divergence is found in float64. No benchmark supports the method.
    """
    one_expert("arcee_fusion", tvs)
    importance = tvs.reduce(_importance, tvs.base, elementwise=False)
    quartiles = [per_tensor(importance, partial(_quartile, q)) for q in (1, 2, 3)]

    def fused(tau: Tensor, important: Tensor, first: Tensor, median: Tensor, third: Tensor, site: Site) -> Tensor:
        return tau[0].where(important >= (median + 1.5 * (third - first))[0], 0.0)

    return tvs.reduce(fused, importance, *quartiles)


def _quartile(q: int, weights: Weights) -> Measure:
    return kth_magnitude(weights, q * (weights.numel - 1) // 4 + 1)


def _importance(tau: Tensor, base: Tensor, site: Site) -> Tensor:
    old = base.to(tau.device, torch.float64)
    new = old + tau[0]
    if not tau[0].dim():
        return torch.zeros_like(tau[0])  # the softmax of one number is 1
    p, q = new.softmax(-1) + 1e-8, old.softmax(-1) + 1e-8
    divergence = (p * (p / q).log()).sum(-1, keepdim=True).clamp(min=0)
    return (tau[0].abs() * divergence).float()
