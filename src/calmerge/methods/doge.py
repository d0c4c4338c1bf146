"""DOGE (Wei et al., ICML 2025)."""

from collections.abc import Sequence
from typing import Annotated, Literal

import torch
from torch import Tensor

from calmerge._measure import kth_magnitude
from calmerge._signature import Count, Interval, KeepFraction, Positive, check, raise_together
from calmerge._task_vectors import TaskVectors
from calmerge._weights import Site, Weights
from calmerge.pieces.blend import per_task, summed
from calmerge.pieces.descend import adam
from calmerge.pieces.matrices import REST, TABLES, is_matrix, reduce_matrices, transform_matrices
from calmerge.pieces.spectral import svd

Steps = Annotated[int, Interval(0)]


def doge(
    tvs: TaskVectors,
    *,
    keep: KeepFraction = 0.3,
    eta: Positive = 0.07,
    subspace: Count = 6,
    lr: Positive = 1e-4,
    steps: Steps = 400,
    rest: Literal["base", "mean"] = "base",
    skip: Sequence[str] = TABLES,
    split: Sequence[str] = (),
) -> Weights:
    """Task vectors of equal norm, shifted together to where they disturb each other least, trimmed and summed.

    lambda_t = eta / ||tau_t||_F per tensor; v_t = (tau_t + Delta) * m_t as in `doge_vectors`; theta = theta_0 +
    sum_t lambda_t v_t (DOGE-TA).

    Args:
        tvs: task vectors of T experts.
        keep: K, share of entries kept per task, counted over all matrices together, in (0, 1].
        eta: norm of every task's part in every tensor, whatever T; tuned for CLIP, so to be tuned for other models.
        subspace: the shared subspace has 1 / `subspace` of the rank.
        lr: Adam's step, which is absolute.
        steps: Adam's number of steps; lr * steps bounds what an entry moves.
        rest: what other tensors become: the base, as officially, or the mean of the experts.
        skip: shell patterns of matrices that are treated like all other tensors. The official code merges the matrices
            of the encoder's blocks alone: add "*embeddings*" for that.
        split: shell patterns of matrices that hold query, key and value below each other, to be treated apart.

    >>> import torch; from calmerge import task_vectors
    >>> a, b = torch.diag(torch.tensor([3.0, 0.0])), torch.diag(torch.tensor([0.0, 4.0]))
    >>> tvs = task_vectors({"w": torch.zeros(2, 2)}, {"a": {"w": a}, "b": {"w": b}})
    >>> doge(tvs, eta=0.5, steps=0, keep=1.0)["w"]
    tensor([[0.5000, 0.0000],
            [0.0000, 0.5000]])

    Source: Wei, Tang, Shen, Hu, Yuan, Cao, "Modeling Multi-Task Model Merging as Adaptive Projective Gradient Descent",
    ICML 2025; read in tanganke/fusion_bench (MIT).
    Differences: as `doge_vectors`.
    """
    options = {
        "keep": keep, "eta": eta, "subspace": subspace, "lr": lr, "steps": steps, "skip": skip, "split": split,
    }  # fmt: skip
    raise_together(check(doge, {**options, "rest": rest}))
    vectors = doge_vectors(tvs, keep=keep, eta=eta, subspace=subspace, lr=lr, steps=steps, skip=skip, split=split)

    def scaled(tau: Tensor, v: Tensor, site: Site) -> Tensor:
        return summed(v * per_task(coefficients(tau, eta), v))

    return reduce_matrices(tvs, scaled, vectors, skip=skip, split=split, rest=REST[rest])


def doge_vectors(
    tvs: TaskVectors,
    *,
    keep: KeepFraction = 0.3,
    eta: Positive = 0.07,
    subspace: Count = 6,
    lr: Positive = 1e-4,
    steps: Steps = 400,
    skip: Sequence[str] = TABLES,
    split: Sequence[str] = (),
) -> TaskVectors:
    """Task vectors shifted together to where they disturb each other least, and trimmed: a start for other methods.

    Per matrix, with M = sum_t lambda_t (tau_t + Delta) and lambda_t = eta / ||tau_t||_F:
    Delta = argmin sum_j sum_rows <tau_j, tau_j - M>^2, the inner product taken row by row, by Adam from 0, each
    gradient g replaced by g - U U^T g; U are the first floor(r / subspace) left singular vectors of the first
    floor(r / T) left singular vectors of all tau_t, r = min(m, n). Then v_t = (tau_t + Delta) * m_t, m_t the largest
    entries of tau_t.

    Holds T + 4 copies of one tensor, and factors of its size in float64.

    Args:
        tvs: task vectors of T experts.
        keep: K, share of entries kept per task, counted over all matrices together, in (0, 1]; give 1 before a method
            that trims itself, as TIES does.
        eta: the norm that a task's part has in M.
        subspace: the shared subspace, which Delta's gradients may not enter, has 1 / `subspace` of the rank.
        lr: Adam's step, which is absolute.
        steps: Adam's number of steps.
        skip: shell patterns of matrices that are left as they are, like all other tensors.
        split: shell patterns of matrices that hold query, key and value below each other, to be treated apart.

    >>> import torch; from calmerge import task_vectors
    >>> tvs = task_vectors({"w": torch.zeros(1, 4)}, {"a": {"w": torch.tensor([[4.0, -3.0, 2.0, 1.0]])}})
    >>> doge_vectors(tvs, steps=0, keep=0.5)["w"]
    tensor([[[ 4., -3.,  2.,  0.]]])

    Source: Wei, Tang, Shen, Hu, Yuan, Cao, "Modeling Multi-Task Model Merging as Adaptive Projective Gradient Descent",
    ICML 2025; read in tanganke/fusion_bench (MIT).
    Differences: none in the descent: the projection is on gradients, before Adam rescales their entries, so Delta
    itself does enter the subspace. A task vector of zeros has lambda 0 (officially infinite). Before AdaMerging
    (DOGE-AM) the code has one Delta for each task; here all tasks share one.
    """
    options = {
        "keep": keep, "eta": eta, "subspace": subspace, "lr": lr, "steps": steps, "skip": skip, "split": split,
    }  # fmt: skip
    raise_together(check(doge_vectors, options))

    def shifted(tau: Tensor, site: Site) -> Tensor:
        return tau + shift(tau, eta=eta, subspace=subspace, lr=lr, steps=steps)

    moved = transform_matrices(tvs, shifted, skip=skip, split=split, copies=len(tvs.tasks) + 20)
    chosen = tvs.only_names(n for n, spec in tvs.specs.items() if is_matrix(n, len(spec.shape), skip))
    rank = chosen.numel - int(chosen.numel * keep)
    if rank <= 0:
        return moved

    def trimmed(tau: Tensor, v: Tensor, threshold: Tensor, site: Site) -> Tensor:
        return v.where(tau.abs() >= per_task(threshold, tau), 0.0) if site.name in chosen else v

    return tvs.transform(trimmed, moved, kth_magnitude(chosen, rank))


def shift(tau: Tensor, *, eta: float, subspace: int, lr: float, steps: int) -> Tensor:
    """Delta of one matrix, from its task vectors [T, m, n].

    >>> tau = torch.tensor([[[3.0, 0.0], [0.0, 0.0]], [[0.0, 0.0], [0.0, 4.0]]])
    >>> shift(tau, eta=0.5, subspace=6, lr=0.1, steps=1)
    tensor([[0.1000, 0.0000],
            [0.0000, 0.1000]])
    """
    r = min(tau.shape[1:])
    shared = svd(torch.cat([svd(t, r // len(tau)).u for t in tau], 1), r // subspace).u.to(tau)
    lam = coefficients(tau, eta)
    rows = tau.transpose(0, 1).contiguous()  # [m, T, n]
    open_ = (rows * (rows - summed(tau * per_task(lam, tau))[:, None])).sum(2, keepdim=True)  # at Delta = 0

    def gradient(delta: Tensor) -> Tensor:
        gaps = open_ - lam.sum() * (rows @ delta[:, :, None])  # <tau_j, tau_j - M> of every row, [m, T, 1]
        g = -2 * lam.sum() * (gaps.mT @ rows)[:, 0]
        return g - shared @ (shared.T @ g)

    return adam(torch.zeros_like(tau[0]), gradient, lr=lr, steps=steps)


def coefficients(tau: Tensor, eta: float) -> Tensor:
    """lambda_t = eta / ||tau_t||_F, 0 for a vector of zeros.

    >>> coefficients(torch.tensor([[[3.0, 4.0]], [[0.0, 0.0]]]), 0.5)
    tensor([0.1000, 0.0000])
    """
    norms = torch.linalg.vector_norm(tau.flatten(1), dim=1)
    return torch.where(norms > 0, eta / norms, 0.0)
