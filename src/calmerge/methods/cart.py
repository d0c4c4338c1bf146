"""CART (Choi et al., 2024)."""

from collections.abc import Sequence
from typing import Annotated

import torch
from torch import Tensor

from calmerge._signature import Interval, KeepFraction, check, raise_together
from calmerge._task_vectors import TaskVectors
from calmerge._weights import Site, Weights
from calmerge.pieces.blend import averaged, summed
from calmerge.pieces.matrices import TABLES, reduce_matrices
from calmerge.pieces.spectral import truncated


def cart(
    tvs: TaskVectors,
    *,
    keep: KeepFraction = 0.16,
    scale: Annotated[float, Interval()] = 2.3,
    skip: Sequence[str] = TABLES,
    split: Sequence[str] = (),
) -> Weights:
    """The average, plus each expert's deviation from it cut to low rank.

    theta_avg = theta_0 + mean tau_t; D_t = theta_t - theta_avg, cut to max(1, floor(rho r)) singular triples,
    r = min(m, n); theta = theta_avg + alpha sum_t D_t for every matrix, theta_avg for other tensors. As sum_t D_t = 0
    before it is cut, two experts, and rho = 1, give the average whatever alpha.

    Holds T copies of one tensor, and factors of its size in float64.

    Args:
        tvs: task vectors of T experts.
        keep: rho, the share of the rank kept, in (0, 1]; 0.16 is AdaRank's setting.
        scale: alpha; 2.3 for eight tasks on ViT-B/32, 1 for twenty on ViT-L/14, chosen on validation data.
        skip: shell patterns of matrices that are averaged like all other tensors; tables of a vocabulary by default.
        split: shell patterns of matrices that hold query, key and value below each other, to be treated apart.

    >>> import torch; from calmerge import task_vectors
    >>> rows = {"a": [6.0, 0.0], "b": [0.0, 9.0], "c": [0.0, 0.0]}  # mean (2, 3); cut: (4, 0), (0, 6), (0, -3)
    >>> experts = {t: {"w": torch.diag(torch.tensor(d))} for t, d in rows.items()}
    >>> cart(task_vectors({"w": torch.zeros(2, 2)}, experts), keep=0.5, scale=1.0)["w"]
    tensor([[6., 0.],
            [0., 6.]])

    Source: Choi, Kim, Lee, Hong, "Revisiting Weight Averaging for Model Merging", arXiv 2024; code inside
    david3684/AdaRank.
    Differences: the official code treats matrices of attention and MLP alone; here all but those in `skip`.
    """
    raise_together(check(cart, {"keep": keep, "scale": scale, "skip": skip, "split": split}))

    def centred(tau: Tensor, site: Site) -> Tensor:
        mean, rank = averaged(tau), max(1, int(keep * min(tau.shape[1:])))
        if rank >= min(tau.shape[1:]):
            return mean
        return mean + scale * summed(torch.stack([truncated(t - mean, rank) for t in tau]))

    return reduce_matrices(tvs, centred, skip=skip, split=split, copies=len(tvs.tasks) + 20)
