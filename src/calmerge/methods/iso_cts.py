"""Iso-CTS (Marczak et al., ICML 2025)."""

from collections.abc import Sequence
from typing import Annotated

import torch
from torch import Tensor

from calmerge._signature import Fraction, Interval, check, raise_together
from calmerge._task_vectors import TaskVectors
from calmerge._weights import Site, Weights
from calmerge.pieces.blend import summed
from calmerge.pieces.matrices import TABLES, reduce_matrices
from calmerge.pieces.spectral import SVD, polar, svd


def iso_cts(
    tvs: TaskVectors,
    *,
    common: Fraction = 0.8,
    scale: Annotated[float, Interval()] = 1.0,
    skip: Sequence[str] = TABLES,
    split: Sequence[str] = (),
) -> Weights:
    """The leading directions of the sum and those of each task outside them, all with the same singular value.

    With r = min(m, n), q = round((r - floor(f r)) / T) and c = r - q T: U_c, S_c, V_c are the first c triples of
    sum_t Delta_t; of every R_t = Delta_t - U_c U_c^T Delta_t the first q triples; U, S, V are all of these side by
    side; Delta = mean(S) polar(U) polar(V)^T for every matrix, the mean of tau_t for other tensors;
    theta = theta_0 + alpha Delta. With q = 0 (few rows or columns) it equals Iso-C.

    Holds T copies of one tensor, and factors of its size in float64.

    Args:
        tvs: task vectors of T experts.
        common: f, the share of the rank given to the sum.
        scale: alpha; chosen on validation data, 1.5 for eight vision tasks.
        skip: shell patterns of matrices that are averaged like all other tensors; tables of a vocabulary by default.
        split: shell patterns of matrices that hold query, key and value below each other, to be treated apart.

    >>> import torch; from calmerge import task_vectors
    >>> a, b = torch.diag(torch.tensor([4.0, 0.0])), torch.diag(torch.tensor([0.0, 2.0]))
    >>> iso_cts(task_vectors({"w": torch.zeros(2, 2)}, {"a": {"w": a}, "b": {"w": b}}), common=0.0)["w"]
    tensor([[3., 0.],
            [0., 3.]])

    Source: Marczak, Magistri, Cygert, Twardowski, Bagdanov, van de Weijer, "No Task Left Behind: Isotropic Model
    Merging with Common and Task-Specific Subspaces", ICML 2025; danielm1405/iso-merging (Apache-2.0).
    Differences: triples of singular value 0 are left out, and directions that depend on others (below 1e-6), instead of
    arbitrary ones filled in. q never takes more than the rank.
    """
    raise_together(check(iso_cts, {"common": common, "scale": scale, "skip": skip, "split": split}))

    def flat(tau: Tensor, site: Site) -> Tensor:
        c, q = dimensions(min(tau.shape[1:]), common, len(tau))
        shared = svd(summed(tau), c)
        if q == 0:
            return shared.isotropic()
        own = [svd(t - shared.u @ (shared.u.T @ t.double()), q) for t in tau]
        u, s, v = (torch.cat(part, -1) for part in zip(*own, shared, strict=True))
        return SVD(polar(u, of=site.name), s, polar(v, of=site.name)).isotropic()

    return reduce_matrices(tvs, flat, skip=skip, split=split, copies=28).map(lambda tau, site: tau * scale)


def dimensions(r: int, common: float, tasks: int) -> tuple[int, int]:
    """How many directions the sum gets, and each task.

    >>> dimensions(768, 0.8, 8)
    (616, 19)
    """
    q = min(round((r - int(common * r)) / tasks), r // tasks)  # halves to the even number, as the official code
    return r - q * tasks, q
