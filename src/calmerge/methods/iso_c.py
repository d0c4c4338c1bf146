"""Iso-C (Marczak et al., ICML 2025)."""

from collections.abc import Sequence
from typing import Annotated, Literal

from torch import Tensor

from calmerge._signature import Interval, check, raise_together
from calmerge._task_vectors import TaskVectors
from calmerge._weights import Site, Weights
from calmerge.pieces.blend import summed
from calmerge.pieces.matrices import TABLES, reduce_matrices
from calmerge.pieces.spectral import full_svd, svd


def iso_c(
    tvs: TaskVectors,
    *,
    scale: Annotated[float, Interval()] = 1.0,
    rank: Literal["numerical", "full"] = "numerical",
    skip: Sequence[str] = TABLES,
    split: Sequence[str] = (),
) -> Weights:
    """The sum of the task vectors with all singular values set to their mean.

    sum_t Delta_t = U S V^T; Delta = mean(S) U V^T for every matrix, the mean of tau_t for other tensors;
    theta = theta_0 + alpha Delta.

    Holds T copies of one tensor, and factors of its size in float64.

    Args:
        tvs: task vectors of T experts.
        scale: alpha; chosen on validation data, 1.5 for eight vision tasks, 3.5 to 4.5 for LoRA experts.
        rank: `numerical` takes mean and directions over the singular values that are not 0; `full` over all of them,
            as the official code: of a low-rank sum it shrinks the mean and adds arbitrary directions.
        skip: shell patterns of matrices that are averaged like all other tensors; tables of a vocabulary by default.
        split: shell patterns of matrices that hold query, key and value below each other, to be treated apart.

    >>> import torch; from calmerge import task_vectors
    >>> a, b = torch.diag(torch.tensor([4.0, 0.0])), torch.diag(torch.tensor([0.0, 2.0]))
    >>> iso_c(task_vectors({"w": torch.zeros(2, 2)}, {"a": {"w": a}, "b": {"w": b}}))["w"]
    tensor([[3., 0.],
            [0., 3.]])

    Source: Marczak, Magistri, Cygert, Twardowski, Bagdanov, van de Weijer, "No Task Left Behind: Isotropic Model
    Merging with Common and Task-Specific Subspaces", ICML 2025; danielm1405/iso-merging (Apache-2.0).
    Differences: `rank`; the two are the same where the sum has full rank.
    """
    raise_together(check(iso_c, {"scale": scale, "rank": rank, "skip": skip, "split": split}))

    def flat(tau: Tensor, site: Site) -> Tensor:
        total = summed(tau)
        return (svd(total) if rank == "numerical" else full_svd(total)).isotropic()

    return reduce_matrices(tvs, flat, skip=skip, split=split, copies=20).map(lambda tau, site: tau * scale)
