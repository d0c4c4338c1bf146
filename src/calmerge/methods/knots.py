"""KnOTS (Stoica et al., ICLR 2025)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from calmerge._signature import Count, NonNegative, check, raise_together
from calmerge._task_vectors import Merge, Stacked, TaskVectors
from calmerge._weights import Computed, Site, Spec, StateDict, Weights
from calmerge.methods.ties import ties
from calmerge.pieces.low_rank import joint_space
from calmerge.pieces.matrices import TABLES, check_patterns, is_matrix
from calmerge.pieces.spectral import svd


def knots(
    tvs: TaskVectors,
    *,
    inner: Merge = ties,
    rank: Count | None = None,
    tolerance: NonNegative = 1e-5,
    skip: Sequence[str] = TABLES,
) -> Weights:
    """Task vectors brought into one basis that they share, merged there by any method, and brought back.

    [Delta_1 .. Delta_T] = U S [V_1^T .. V_T^T] for every matrix; C_t = S V_t^T, so that Delta_t = U C_t exactly;
    Delta = U inner(C_1 .. C_T). `inner` sees all tensors together; those that are no matrices are in it as they are.

    A linear merge gives what it gives without: no basis changes a sum. Holds T copies of one tensor twice, and factors
    of its size in float64; adapters are decomposed by their factors. `inner` computes it once for each of its passes.

    Args:
        tvs: task vectors of T experts.
        inner: the merge in the common basis; the published one is `ties` with a scale from validation (0.6 for vision).
        rank: of every expert's update, where it is known to be low; C_t has T * rank rows then, and a threshold of
            `inner` counts no more than these. Of adapters it is known, and need not be given.
        tolerance: singular values up to this are left out: their rows of C_t are 0.
        skip: shell patterns of matrices that stay as they are, like all other tensors.

    >>> import torch; from calmerge import average, task_vectors
    >>> a, b = torch.tensor([[2.0, 0.0], [2.0, 0.0]]), torch.tensor([[0.0, 4.0], [0.0, 4.0]])
    >>> tvs = task_vectors({"w": torch.zeros(2, 2)}, {"a": {"w": a}, "b": {"w": b}})
    >>> knots(tvs, inner=average)["w"].round(decimals=4)
    tensor([[1., 2.],
            [1., 2.]])

    Source: Stoica, Ramesh, Ecsedi, Choshen, Hoffman, "Model Merging with SVD to Tie the KnOTS", ICLR 2025;
    gstoica27/KnOTS (MIT).
    Differences: the official code merges the modules of adapters alone and decomposes them densely; its option to put
    the matrices below each other, for a common V, is left out.
    """
    raise_together(check(knots, {"inner": inner, "rank": rank, "tolerance": tolerance, "skip": skip}))
    check_patterns(tvs, skip)
    rows = {n: _rows(tvs, n, rank) for n, s in tvs.specs.items() if is_matrix(n, len(s.shape), skip) and s.numel}

    def basis(tau: Tensor, site: Site) -> Tensor:  # [m, k]
        if site.name not in rows:
            return tau.new_zeros(0)
        m, k = tau.shape[1], rows[site.name]
        if tvs.ranks(site.name) is not None:
            u = joint_space([(f.scaled, f.right) for f in tvs.factors(site.name)], tolerance=tolerance)[0]
        else:
            u, s, _ = svd(torch.cat(tuple(tau), 1), k, tolerance=0.0)
            u = u[:, s > tolerance]
        return torch.cat([u[:, :k].float(), tau.new_zeros(m, max(0, k - u.shape[1]))], 1)

    def inside(tau: Tensor, u: Tensor, site: Site) -> Tensor:
        return u.T @ tau if site.name in rows else tau

    def outside(merged: Tensor, u: Tensor, site: Site) -> Tensor:
        return u @ merged if site.name in rows else merged

    bases = tvs.reduce(basis, elementwise=False, copies=8 * len(tvs.tasks) + 8)
    cores = {n: Spec((rows[n], s.shape[1]) if n in rows else s.shape, torch.float32) for n, s in tvs.specs.items()}
    aligned = TaskVectors(
        Stacked(inside, (tvs, bases), cores, elementwise=False), tvs.tasks, StateDict({}),
        experts={t: StateDict({}) for t in tvs.tasks}, skipped=tvs.skipped,
    )  # fmt: skip
    return Computed(outside, (inner(aligned), bases), bases.specs, elementwise=False)


def _rows(tvs: TaskVectors, name: str, rank: int | None) -> int:
    """How many dimensions the task vectors of a matrix can span together."""
    m, n = tvs.specs[name].shape
    known = tvs.ranks(name)
    most = sum(known) if known is not None else len(tvs.tasks) * (rank or n)
    return min(m, most)
