"""NuSLERP: spherical interpolation with a weight for each model, also row by row or column by column."""

import torch
from torch import Tensor

from calmerge._task_vectors import TaskVectors
from calmerge._weights import Weights
from calmerge.methods.slerp import cosine, curved, straight, two_models
from calmerge.pieces.gram import Of, along, spanned
from calmerge.pieces.per_model import PerModel, checked

_NO_ARC = 1e-7
"""A sine below this is rounding: parallel vectors, or opposite ones, between which there is no one arc."""


def nuslerp(
    tvs: TaskVectors,
    *,
    weight: PerModel,
    nuslerp_flatten: bool = True,
    nuslerp_row_wise: bool = False,
    of: Of = "deltas",
) -> Weights:
    """Two task vectors interpolated along the arc between them, by their weights.

    tau = [sin((1 - t) Omega) tau_1 + sin(t Omega) tau_2] / sin Omega, t = w_2 / (w_1 + w_2), or 1/2 where the weights
    sum to 0; linear where sin Omega vanishes. Without `nuslerp_flatten`, every vector along the last dimension (each
    row of a matrix) has its own angle Omega.

    Args:
        tvs: task vectors of two experts.
        weight: w, one number for each model or one for all.
        nuslerp_flatten: whether a tensor is one vector; otherwise its rows are, and whole tensors are held.
        nuslerp_row_wise: without `nuslerp_flatten`, takes the vectors along the first dimension instead (each column).
        of: whether task vectors (`deltas`) are interpolated or the experts' `weights`.

    Raises:
        UsageError: there are not two models.

    >>> from calmerge import task_vectors
    >>> experts = {"a": {"w": torch.tensor([1.0, 0.0])}, "b": {"w": torch.tensor([0.0, 2.0])}}
    >>> nuslerp(task_vectors({"w": torch.zeros(2)}, experts), weight=[1.0, 1.0])["w"]
    tensor([0.7071, 1.4142])

    Source: a community method in the form of arcee-ai/mergekit (LGPL-3.0; Goddard et al., arXiv 2024), whose option
    names these are; its `row_wise` means columns too.
    Differences: the angle is found in float64. A vector of zeros counts as orthogonal to the other.
    """
    given = {"weight": weight, "nuslerp_flatten": nuslerp_flatten, "nuslerp_row_wise": nuslerp_row_wise, "of": of}
    two_models("nuslerp", tvs)
    first, second = checked(nuslerp, tvs, given)["weight"]
    t = 0.5 if abs(first + second) < 1e-6 else second / (first + second)

    def arc(gram: Tensor, name: str) -> Tensor:
        omega = torch.acos(cosine(gram))
        return torch.where(torch.sin(omega)[..., None] < _NO_ARC, straight(t), curved(t, omega))

    if nuslerp_flatten:
        return spanned(tvs, arc, of=of)
    return along(tvs, arc, dim=0 if nuslerp_row_wise else -1, of=of)
