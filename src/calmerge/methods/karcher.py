"""The Karcher (Riemannian) mean of models on a sphere."""

import torch
from torch import Tensor

from calmerge._signature import Count, Positive
from calmerge._task_vectors import TaskVectors
from calmerge._weights import Weights
from calmerge.pieces.gram import Of, lengths, spanned
from calmerge.pieces.per_model import PerModel, checked


def karcher(
    tvs: TaskVectors, *, weight: PerModel = (1.0,), max_iter: Count = 10, tol: Positive = 1e-5, of: Of = "weights"
) -> Weights:
    """The point of a sphere that is nearest to all models along arcs, as long as they are in the mean, per tensor.

    u starts at the normalised mean of x_t = theta_t / |theta_t| and moves along the sphere by
    T = sum_t a_t log_u(x_t) until |T| < tol; theta = (sum_t a_t |theta_t|) u, with weights a that sum to 1.

    Args:
        tvs: task vectors of T experts.
        weight: a, one number for each model or one for all; they are made to sum to 1.
        max_iter: the most moves, at least 1.
        tol: the length of a move at which to stop.
        of: whether the experts' `weights` are merged or their task vectors (`deltas`).

    >>> from calmerge import task_vectors
    >>> experts = {"a": {"w": torch.tensor([1.0, 0.0])}, "b": {"w": torch.tensor([0.0, 2.0])}}
    >>> karcher(task_vectors({"w": torch.zeros(2)}, experts), weight=[1.0, 3.0])["w"]
    tensor([0.6697, 1.6168])

    Source: Karcher, "Riemannian center of mass and mollifier smoothing", CPAM 1977; for model weights "karcher" of
    arcee-ai/mergekit 0.1.5 (LGPL-3.0; Goddard et al., arXiv 2024), which knows equal weights only.
    Differences: all points of the search are sums of the x_t, so that it runs on their inner products, in float64.
    Vectors of zeros count in the length, not in the direction; one opposite to u pulls nowhere. Of a tensor of one
    entry, which has no direction but its sign, the weighted mean is taken, the same where signs agree.
    """
    each = checked(karcher, tvs, {"weight": weight, "max_iter": max_iter, "tol": tol, "of": of})
    share = torch.tensor(each["weight"], dtype=torch.float64)
    share = share / share.sum()

    def mean(gram: Tensor, name: str) -> Tensor:
        norms = lengths(gram)
        if tvs.specs[name].numel == 1:
            return share
        inverse = torch.where(norms > 0, 1 / norms, 0.0)
        return (share @ norms) * inverse * _centre(gram * inverse * inverse[:, None], share, max_iter, tol)

    return spanned(tvs, mean, of=of)


def _centre(gram: Tensor, share: Tensor, max_iter: int, tol: float) -> Tensor:
    """Coefficients over unit vectors of their Karcher mean, from their inner products; vectors of zeros have no say."""
    share = torch.where(gram.diagonal() > 0, share, 0.0)
    if not float(share.sum()):
        return share
    share = share / share.sum()

    def length(c: Tensor) -> Tensor:
        return (c @ gram @ c).clamp(min=0).sqrt()

    u = share / length(share) if length(share) > 1e-8 else torch.eye(len(share), dtype=gram.dtype)[share.argmax()]
    for _ in range(max_iter):
        cos = (gram @ u).clamp(-1, 1)
        angle = torch.acos(cos)
        sin = torch.sin(angle)
        pull = share * torch.where(sin > 1e-7, angle / sin, 1.0)
        move = pull - (pull @ cos) * u
        step = length(move)
        if step < tol:
            break
        u = torch.cos(step) * u + torch.sin(step) / step * move
        u = u / length(u)
    return u
