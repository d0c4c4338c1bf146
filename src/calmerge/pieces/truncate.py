"""Task vectors of low rank."""

from collections.abc import Sequence

import torch
from torch import Tensor

from calmerge._signature import KeepFraction, check, raise_together
from calmerge._task_vectors import TaskVectors
from calmerge._weights import Site
from calmerge.pieces.matrices import TABLES, transform_matrices
from calmerge.pieces.spectral import truncated


def truncate(
    tvs: TaskVectors, *, keep: KeepFraction = 0.2, skip: Sequence[str] = TABLES, split: Sequence[str] = ()
) -> TaskVectors:
    """Task vectors whose matrices keep their leading singular directions alone; other tensors are unchanged.

    tau_hat_t = U S V^T of tau_t cut to max(1, floor(keep r)) triples, r = min(m, n).

    Holds T copies of one tensor twice, and factors of its size in float64.

    Args:
        tvs: task vectors of T experts.
        keep: share of the rank kept, in (0, 1]; 0.1 to 0.3 before Task Arithmetic or TIES.
        skip: shell patterns of matrices that stay as they are; tables of a vocabulary by default.
        split: shell patterns of matrices that hold query, key and value below each other, to be treated apart.

    >>> import torch; from calmerge import task_vectors
    >>> tvs = task_vectors({"w": torch.zeros(2, 2)}, {"a": {"w": torch.diag(torch.tensor([3.0, 1.0]))}})
    >>> truncate(tvs, keep=0.5)["w"].abs()
    tensor([[[3., 0.],
             [0., 0.]]])

    Source: a step of TSV-Merge (Gargiulo et al., CVPR 2025) that stands alone before any method.
    """
    raise_together(check(truncate, {"keep": keep, "skip": skip, "split": split}))

    def cut(tau: Tensor, site: Site) -> Tensor:
        rank = max(1, int(keep * min(tau.shape[1:])))
        return torch.stack([truncated(t, rank) for t in tau])

    return transform_matrices(tvs, cut, skip=skip, split=split, copies=len(tvs.tasks) + 20)
