"""Arcee Fusion: the important changes of one model."""

import torch
from torch import Tensor

from calmerge._task_vectors import TaskVectors
from calmerge._weights import Site, Weights
from calmerge.methods.nearswap import one_expert


def arcee_fusion(tvs: TaskVectors) -> Weights:
    """The base with the most important changes of the one expert, chosen tensor by tensor.

    importance = |tau| KL(softmax(theta_1) || softmax(theta_0)), the divergence along the last dimension (of each row);
    entries with an importance of at least median + 1.5 (Q3 - Q1) over the tensor become the expert's.

    Args:
        tvs: task vectors of one expert. Whole tensors are held.

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
    return tvs.reduce(_fused, tvs.base, elementwise=False)


def _fused(tau: Tensor, base: Tensor, site: Site) -> Tensor:
    delta = tau[0]
    if delta.numel() < 2:
        return delta  # no entry is more important than the only one
    n, width = delta.numel(), delta.shape[-1]
    rows, old = delta.reshape(-1, width), base.to(delta.device).reshape(-1, width)
    step = max(1, 2**18 // width)  # rows of float64 at a time
    importance = torch.cat([_importance(rows[i : i + step], old[i : i + step]) for i in range(0, len(rows), step)])
    first, median, third = (importance.flatten().kthvalue(q * (n - 1) // 4 + 1).values for q in (1, 2, 3))
    return rows.where(importance >= median + 1.5 * (third - first), 0.0).reshape(delta.shape)


def _importance(delta: Tensor, base: Tensor) -> Tensor:
    p, q = (base.double() + delta).softmax(-1) + 1e-8, base.double().softmax(-1) + 1e-8
    return (delta.abs() * (p * (p / q).log()).sum(-1, keepdim=True).clamp(min=0)).float()
