"""passthrough: one model as it is."""

import torch

from calmerge._task_vectors import TaskVectors
from calmerge._weights import Weights
from calmerge.methods.nearswap import one_expert
from calmerge.pieces.gram import beyond, excess
from calmerge.pieces.per_model import PerModel, checked


def passthrough(tvs: TaskVectors, *, scale: PerModel = (1.0,)) -> Weights:
    """One model as it is, or its weights times a number.

    theta = c theta_1. For blocks that change nothing (block expansion), scale the output projections by 0.

    Args:
        tvs: task vectors of one expert.
        scale: c, one number, for the one model.

    Raises:
        UsageError: there is not exactly one expert.

    >>> from calmerge import task_vectors
    >>> passthrough(task_vectors({"w": torch.ones(1)}, {"a": {"w": torch.tensor([3.0])}}), scale=[0.5])["w"] + 1
    tensor([1.5000])

    Source: "passthrough" of arcee-ai/mergekit (LGPL-3.0; Goddard et al., arXiv 2024), which stacks layers with it.
    """
    one_expert("passthrough", tvs)
    c = torch.tensor(checked(passthrough, tvs, {"scale": scale})["scale"], dtype=torch.float64)
    delta = tvs.reduce(lambda tau, site: tau[0] * float(c))
    over = excess(c)
    return delta.map(lambda tau, base, site: beyond(tau, base, over, site), tvs.base) if over else delta
