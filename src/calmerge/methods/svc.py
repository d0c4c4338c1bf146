"""SVC, singular value calibration (2026)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from calmerge._signature import Positive, check, raise_together
from calmerge._task_vectors import TaskVectors
from calmerge._weights import Site, Weights
from calmerge.pieces.matrices import TABLES, reduce_matrices
from calmerge.pieces.spectral import SVD, svd


def svc(
    merged: Weights,
    tvs: TaskVectors,
    *,
    alpha: Positive = 1.0,
    skip: Sequence[str] = TABLES,
    split: Sequence[str] = (),
) -> Weights:
    """A merged delta whose singular values are shrunk where several experts share an output direction.

    Delta = U S V^T; a_r = S_r v_r, b_t,r = Delta_t^T u_r; s_t,r = <a_r, b_t,r> / ||b_t,r||^2, how often expert t's part
    is counted along u_r; gamma_r = T / sum_t max(alpha, s_t,r); S'_r = gamma_r S_r. Other tensors stay as they are.

    Holds T + 1 copies of one tensor, and factors of its size in float64.

    Args:
        merged: what any method made of the task vectors.
        tvs: the task vectors of the T experts that it was made of.
        alpha: the least s that counts; 1 only shrinks (the paper's robust choice), 0.1 may also amplify and suits
            Task Arithmetic with a scale of 0.3.
        skip: shell patterns of matrices that stay as they are; tables of a vocabulary by default.
        split: shell patterns of matrices that hold query, key and value below each other, to be treated apart.

    >>> import torch; from calmerge import task_arithmetic, task_vectors
    >>> tvs = task_vectors({"w": torch.zeros(2, 2)}, {"a": {"w": 3 * torch.eye(2)}, "b": {"w": 3 * torch.eye(2)}})
    >>> svc(task_arithmetic(tvs, scale=1.0), tvs)["w"].abs()  # counted twice: halved
    tensor([[3., 0.],
            [0., 3.]])

    Source: "Singular value calibration", arXiv 2026 (2602.05536); in tanganke/fusion_bench (MIT).
    Differences: none known; the ready-made configuration there has alpha = 0.1.
    """
    raise_together(check(svc, {"alpha": alpha, "skip": skip, "split": split}))

    def calibrated(tau: Tensor, delta: Tensor, site: Site) -> Tensor:
        u, s, v = svd(delta)
        counted = torch.zeros_like(s)
        for t in tau:
            own = u.T @ t.double()  # [r, n], the b_t,r
            share = (s[:, None] * v.T * own).sum(1) / own.square().sum(1).clamp(min=1e-12)
            counted += share.clamp(min=alpha)
        return SVD(u, s * len(tau) / counted, v).product()

    return reduce_matrices(
        tvs, calibrated, merged, skip=skip, split=split, rest=lambda tau, delta, site: delta, copies=20
    )
