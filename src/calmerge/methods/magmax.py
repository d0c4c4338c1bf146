"""MagMax (Marczak et al., ECCV 2024)."""

from typing import Annotated

import torch

from calmerge._signature import Interval, check, raise_together
from calmerge._task_vectors import TaskVectors
from calmerge._weights import Weights


def magmax(tvs: TaskVectors, *, scale: Annotated[float, Interval()] = 0.5) -> Weights:
    """Of every entry the task vector of largest magnitude, times one number.

    theta = theta_0 + lambda tau_m, tau_m,p = tau_t,p of the t with the largest |tau_t,p|.

    Args:
        tvs: task vectors of T experts.
        scale: lambda; chosen on validation data.

    >>> import torch; from calmerge import task_vectors
    >>> experts = {"a": {"w": torch.tensor([3.0, 1.0])}, "b": {"w": torch.tensor([-2.0, -4.0])}}
    >>> magmax(task_vectors({"w": torch.zeros(2)}, experts), scale=1.0)["w"]
    tensor([ 3., -4.])

    Source: Marczak, Twardowski, Trzcinski, Cygert, "MagMax: Leveraging Model Merging for Seamless Continual Learning",
    ECCV 2024.
    Differences: of two equal magnitudes with opposite signs the positive one counts, whatever the order of the experts;
    FusionBench takes the later expert's.
    """
    raise_together(check(magmax, {"scale": scale}))

    def furthest(high: torch.Tensor, low: torch.Tensor) -> torch.Tensor:
        return torch.where(high >= -low, high, low) * scale

    return tvs.reduce(lambda tau, site: furthest(tau.amax(0), tau.amin(0)))
