"""Model Stock (Jang et al., ECCV 2024)."""

from typing import Literal

import torch
from torch import Tensor

from calmerge._measure import Measure, per_tensor, total
from calmerge._signature import check, raise_together
from calmerge._task_vectors import TaskVectors
from calmerge._weights import Gathered, Site, Weights
from calmerge.pieces.blend import averaged
from calmerge.pieces.gram import products


def model_stock(
    tvs: TaskVectors,
    *,
    per: Literal["tensor", "filter"] = "tensor",
    angle: Literal["mean_cosine", "mean_angle"] = "mean_cosine",
    clamp: bool = True,
) -> Weights:
    """The mean of models fine-tuned on one task, drawn to the base by the angle between them.

    cos = mean over pairs of cos(tau_i, tau_j); t = N cos / (1 + (N - 1) cos); theta = theta_0 + t mean_i tau_i.

    Not for different tasks: their vectors are nearly orthogonal, cos = 0, and little but the base is left.

    Args:
        tvs: task vectors of N models of the same task; one alone comes out as it is.
        per: `tensor` has one angle for each tensor, `filter` one for each row of a tensor with two or more dimensions.
        angle: of more than two models: the cosines' mean, or the cosine of the angles' mean (FusionBench). The paper
            has two models and so no choice.
        clamp: a cosine below 0 counts as 0, which keeps t in [0, 1]; the formula itself then subtracts the mean, and
            has no value at -1 / (N - 1).

    >>> import torch; from calmerge import task_vectors
    >>> experts = {"a": {"w": torch.tensor([1.0, 0.0])}, "b": {"w": torch.tensor([0.5, 3**0.5 / 2])}}
    >>> model_stock(task_vectors({"w": torch.zeros(2)}, experts))["w"]
    tensor([0.5000, 0.2887])

    Source: Jang, Yun, Han, "Model Stock: All We Need Is Just a Few Fine-Tuned Models", ECCV 2024.
    Differences: t is clamped by default; a vector of zeros has cosine 0 with any other.
    """
    raise_together(check(model_stock, {"per": per, "angle": angle, "clamp": clamp}))

    def ratio(one: TaskVectors) -> Measure:
        return total(one, products).map(lambda gram: _ratio(gram, angle, clamp))

    def by_row(tau: Tensor, site: Site) -> Tensor:
        each = tau.flatten(2).movedim(0, 1).double()  # [rows, N, n]
        t = _ratio(each @ each.mT, angle, clamp).to(tau)
        return averaged(tau) * t.reshape(-1, *[1] * (tau.dim() - 2))

    matrices = [n for n, spec in tvs.specs.items() if len(spec.shape) > 1 and per == "filter"]
    rows = tvs.only_names(matrices).reduce(by_row)
    whole = tvs.only_names(n for n in tvs if n not in rows)
    drawn = whole.reduce(lambda tau, t, site: averaged(tau) * t.to(tau), per_tensor(whole, ratio, factor=True))
    return Gathered({n: (rows if n in rows else drawn, n) for n in tvs})


def _ratio(gram: Tensor, angle: str, clamp: bool) -> Tensor:
    """t from inner products [..., N, N]."""
    n = gram.shape[-1]
    if n == 1:
        return torch.ones_like(gram[..., 0, 0])
    norms = gram.diagonal(dim1=-2, dim2=-1).sqrt()
    product = norms[..., :, None] * norms[..., None, :]
    i, j = torch.triu_indices(n, n, 1)
    cosines = torch.where(product > 0, gram / product, 0.0)[..., i, j].clamp(-1, 1)
    cos = cosines.mean(-1) if angle == "mean_cosine" else cosines.acos().mean(-1).cos()
    cos = cos.clamp(min=0) if clamp else cos
    return n * cos / (1 + (n - 1) * cos)
