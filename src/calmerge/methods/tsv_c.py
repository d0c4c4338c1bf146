"""TSV-Compress (Gargiulo et al., CVPR 2025)."""

from collections.abc import Sequence

from calmerge._merged import Merged
from calmerge._signature import KeepFraction, check, raise_together
from calmerge._task_vectors import TaskVectors
from calmerge._weights import StateDict
from calmerge.pieces.factor_patch import factor_patches


def tsv_c(tvs: TaskVectors, *, keep: KeepFraction = 0.1, skip: Sequence[str] = ()) -> Merged:
    """Every expert by itself, its task vector kept as thin factors: no merge, a bank of experts in little space.

    theta_t = theta_0 + U_t S_t V_t^T, Delta_t cut to max(1, floor(f r)) singular triples, r = min(m, n), for every
    matrix; other tensors are kept whole, and so are matrices that their factors would not make smaller.

    Of an m x n matrix f r (m + n) numbers are stored for each task: 2 f of a square one. Holds T copies of one tensor,
    and factors of its size in float64.

    Args:
        tvs: task vectors of T experts.
        keep: f, share of the rank kept, in (0, 1].
        skip: shell patterns of matrices that are kept whole.

    >>> import torch; from calmerge import task_vectors
    >>> experts = {"a": {"w": torch.full((9, 9), 2.0)}, "b": {"w": torch.eye(9)}}
    >>> bank = tsv_c(task_vectors({"w": torch.zeros(9, 9)}, experts), keep=0.2)
    >>> bank.for_task("a")["w"][0, :3].round(decimals=4), bank.nbytes  # two columns of nine numbers a task
    (tensor([2., 2., 2.]), 144)

    Source: Gargiulo, Crisostomi, Bucarelli, Scardapane, Silvestri, Rodolà, "Task Singular Vectors: Reducing Task
    Interference in Model Merging", CVPR 2025; AntoAndGar/task_singular_vectors (Apache-2.0).
    """
    raise_together(check(tsv_c, {"keep": keep, "skip": skip}))
    return Merged(StateDict({}), factor_patches(tvs, keep, skip))
