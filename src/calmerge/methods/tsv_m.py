"""TSV-Merge (Gargiulo et al., CVPR 2025)."""

from collections.abc import Sequence
from typing import Annotated

import torch
from torch import Tensor

from calmerge._signature import Interval, check, raise_together
from calmerge._task_vectors import TaskVectors
from calmerge._weights import Site, Weights
from calmerge.pieces.blend import averaged
from calmerge.pieces.matrices import TABLES, reduce_matrices
from calmerge.pieces.spectral import polar, svd


def tsv_m(
    tvs: TaskVectors,
    *,
    scale: Annotated[float, Interval()] = 1.0,
    orthogonalize: bool = True,
    skip: Sequence[str] = TABLES,
    split: Sequence[str] = (),
) -> Weights:
    """Each task's leading singular directions, made orthogonal to those of the other tasks.

    Delta_t = U_t S_t V_t^T cut to k = floor(r / T) triples, r = min(m, n); side by side U = [U_1 .. U_T], S, V;
    Delta = polar(U) S polar(V)^T for every matrix, the mean of tau_t for other tensors; theta = theta_0 + alpha Delta.

    Holds T copies of one tensor, and factors of its size in float64.

    Args:
        tvs: task vectors of T experts.
        scale: alpha; 1 is near the optimum for eight tasks, the official code searches 0.1 to 3 on validation data.
        orthogonalize: without it the truncated task vectors are summed (the paper's "rank reduction only").
        skip: shell patterns of matrices that are averaged like all other tensors; tables of a vocabulary by default.
        split: shell patterns of matrices that hold query, key and value below each other, to be treated apart. The
            published numbers of OpenCLIP models are without.

    >>> import torch; from calmerge import task_vectors
    >>> a, b = torch.diag(torch.tensor([3.0, 1.0])), torch.diag(torch.tensor([0.0, 2.0]))
    >>> tsv_m(task_vectors({"w": torch.zeros(2, 2)}, {"a": {"w": a}, "b": {"w": b}}))["w"]
    tensor([[3., 0.],
            [0., 2.]])

    Source: Gargiulo, Crisostomi, Bucarelli, Scardapane, Silvestri, Rodolà, "Task Singular Vectors: Reducing Task
    Interference in Model Merging", CVPR 2025; AntoAndGar/task_singular_vectors (Apache-2.0).
    Differences: triples of singular value 0 are left out instead of filled with arbitrary directions, and so are
    directions that tasks have in common (below 1e-6 of the largest), where the polar factor is not unique. A matrix
    with more tasks than rows or columns is averaged; the official code drops it.
    """
    raise_together(check(tsv_m, {"scale": scale, "orthogonalize": orthogonalize, "skip": skip, "split": split}))

    def joined(tau: Tensor, site: Site) -> Tensor:
        k = min(tau.shape[1:]) // len(tau)
        if k == 0:
            return averaged(tau)
        u, s, v = (torch.cat(part, -1) for part in zip(*(svd(t, k) for t in tau), strict=True))
        if orthogonalize:
            u, v = polar(u, of=site.name), polar(v, of=site.name)
        return u * s @ v.T

    return reduce_matrices(tvs, joined, skip=skip, split=split, copies=24).map(lambda tau, site: tau * scale)
