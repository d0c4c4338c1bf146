"""DC-Merge (CVPR 2026)."""

from collections.abc import Sequence
from typing import Annotated, Literal

import torch
from torch import Tensor

from calmerge._signature import Count, Interval, KeepFraction, check, raise_together
from calmerge._task_vectors import TaskVectors
from calmerge._weights import Site, Weights
from calmerge.pieces.blend import averaged, summed
from calmerge.pieces.matrices import TABLES, reduce_matrices
from calmerge.pieces.spectral import SVD, polar, svd


def dc_merge(
    tvs: TaskVectors,
    *,
    keep: KeepFraction = 0.001,
    scale: Annotated[float, Interval()] = 1.0,
    rank: Count | None = None,
    smooth: Literal["none", "average", "linear"] = "none",
    at_least: Literal["rank", "official"] = "rank",
    skip: Sequence[str] = TABLES,
    split: Sequence[str] = (),
) -> Weights:
    """Task vectors in one joint basis, their strongest entries there merged by sign election.

    U, V: polar factors of the leading k = floor(r / T) singular vectors of all tasks side by side, as in TSV-M;
    M_t = U^T Delta_t V of Delta_t cut to k triples, and of it the largest entries alone; M = mean over the tasks that
    have the sign of sum_t M_t, 0 outside the T diagonal k x k blocks; Delta = U M V^T for every matrix, the mean of
    tau_t for other tensors; theta = theta_0 + alpha Delta.

    Holds T copies of one tensor, and T + 2 factors of its size in float64.

    Args:
        tvs: task vectors of T experts.
        keep: share of the entries of every core that stays, in (0, 1].
        scale: alpha, chosen on validation data.
        rank: k at most; the adapters' rank for LoRA experts.
        smooth: what the k singular values of a task become, their sum kept: `none` for full fine-tuning; for LoRA
            `average` (all equal; better for B/16 and L/14) or `linear` (an even ramp, its ends at most 5 to 1).
        at_least: how many entries of a core stay where `keep` is little: `rank` at least k, `official` at least 1,
            which is all that a core of up to 44 rows and columns keeps at 0.1 %.
        skip: shell patterns of matrices that are averaged like all other tensors; tables of a vocabulary by default.
        split: shell patterns of matrices that hold query, key and value below each other, to be treated apart.

    >>> import torch; from calmerge import task_vectors
    >>> a, b = torch.diag(torch.tensor([3.0, 0.0])), torch.diag(torch.tensor([0.0, 2.0]))
    >>> dc_merge(task_vectors({"w": torch.zeros(2, 2)}, {"a": {"w": a}, "b": {"w": b}}))["w"]
    tensor([[3., 0.],
            [0., 2.]])

    Source: DC-Merge, CVPR 2026; Tobeginwith/DC-Merge (MIT), whose code is followed.
    Differences: `at_least`; directions that tasks have in common, and those of singular value 0, are left out.
    """
    options = {
        "keep": keep,
        "scale": scale,
        "rank": rank,
        "smooth": smooth,
        "at_least": at_least,
        "skip": skip,
        "split": split,
    }
    raise_together(check(dc_merge, options))

    def joined(tau: Tensor, site: Site) -> Tensor:
        k = min(min(tau.shape[1:]) // len(tau), rank or tau[0].numel())
        if k == 0:
            return averaged(tau)
        parts = [svd(t, k) for t in tau]
        u, v = (polar(torch.cat([getattr(p, side) for p in parts], 1), of=site.name) for side in "uv")
        size = u.shape[1]
        kept = max(k if at_least == "rank" else 1, int(keep * size**2))
        cores = torch.stack([_largest(u.T @ _smoothed(p, smooth).product() @ v, kept) for p in parts])
        agree = cores.where(cores.sign() == summed(cores).sign(), 0.0)
        merged = summed(agree) / (agree != 0).sum(0).clamp(min=1)
        task = torch.cat([torch.full((len(p.s),), t) for t, p in enumerate(parts)]).to(tau.device)
        return u @ merged.where(task[:, None] == task, 0.0) @ v.T

    return reduce_matrices(tvs, joined, skip=skip, split=split, copies=6 * len(tvs.tasks) + 24).map(
        lambda tau, site: tau * scale
    )


def _largest(core: Tensor, kept: int) -> Tensor:
    if kept >= core.numel():
        return core
    cut = core.abs().flatten().kthvalue(core.numel() - kept + 1).values if core.numel() else core.sum()
    return core.where(core.abs() >= cut, 0.0)


def _smoothed(triples: SVD, how: str) -> SVD:
    u, s, v = triples
    if how == "none" or not len(s):
        return triples
    steepest = 1.0 if how == "average" else min(5.0, float(s[0] / s[-1]))
    ramp = torch.linspace(steepest, 1.0, len(s), dtype=s.dtype, device=s.device)
    return SVD(u, ramp * s.sum() / ramp.sum(), v)
