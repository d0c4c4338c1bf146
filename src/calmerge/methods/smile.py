"""SMILE (Tang et al., 2024): experts of low rank in every linear layer, between which each token chooses."""

from collections.abc import Sequence
from typing import Literal

from calmerge._errors import UsageError
from calmerge._merged import Merged
from calmerge._signature import Count, check, raise_together
from calmerge._task_vectors import TaskVectors
from calmerge._weights import StateDict
from calmerge.pieces.factor_patch import patches_of_ranks
from calmerge.pieces.matrices import REST, TABLES, check_patterns, is_matrix
from calmerge.pieces.subspace import SubspaceRouter

SKIP = (*TABLES, "*embedding*")
"""What `skip` is by default: tables, which no token is multiplied with."""


def smile(
    tvs: TaskVectors,
    *,
    rank: Count | None = 32,
    directions: Count = 1,
    top: Count = 1,
    rest: Literal["base", "mean"] = "base",
    skip: Sequence[str] = SKIP,
) -> Merged:
    """The base with an expert of low rank for each task in every linear layer, and a choice among them for each token.

    y = W_0 x + b_0 + sum_{t in top} p_t (U_t S_t V_t^T x + b_t - b_0),  Delta_t ~ U_t S_t V_t^T cut to rank k,
    p = softmax_t |V_t[:, :k_g]^T x|, cut to the best `top` tasks and renormalised.

    Nothing is trained: a token goes where the leading input directions of an expert's update hold most of it, whatever
    their singular values. `for_task` gives the model in which all tokens go to one expert. Of an m x n matrix k (m + n)
    numbers are stored for each task. Holds T copies of one tensor, and factors of its size in float64.

    Args:
        tvs: task vectors of T experts.
        rank: k, of every update; its full rank when None.
        directions: k_g, how many leading directions decide, at most k.
        top: how many experts a token goes to, at most T.
        rest: what is made of tensors beside linear layers and their biases: the base's, or the experts' mean.
        skip: shell patterns of matrices that are no linear layers; by default tables of a vocabulary and of positions.

    Raises:
        UsageError: `directions` above `rank`, or `top` above T.

    >>> import torch; from calmerge import task_vectors
    >>> experts = {"a": {"w": torch.tensor([[2.0, 0.0]])}, "b": {"w": torch.tensor([[0.0, 3.0]])}}
    >>> merged = smile(task_vectors({"w": torch.zeros(1, 2)}, experts), rank=1)
    >>> merged.for_task("b")["w"], merged.router.top
    (tensor([[0., 3.]]), 1)

    Source: Tang, Shen, Luo, Xie, Hu, Zhang, Du, Tao, "SMILE: Zero-Shot Sparse Mixture of Low-Rank Experts Construction
    From Pre-Trained Foundation Models", arXiv 2024; tanganke/fusion_bench (MIT).
    Differences: one rank for all layers, at most their own; layers that no expert changed stay as they are of
    themselves, since what is added is 0.
    """
    raise_together(
        check(smile, {"rank": rank, "directions": directions, "top": top, "rest": rest, "skip": skip})
        + ([f"smile.directions must be at most rank {rank}, got {directions}."] if rank and directions > rank else [])
    )
    if top > len(tvs.tasks):
        raise UsageError(f"smile.top must be at most the number of experts, {len(tvs.tasks)}, got {top}.")
    check_patterns(tvs, [pattern for pattern in skip if pattern not in SKIP])
    ranks = {
        name: min(rank or min(spec.shape), *spec.shape)
        for name, spec in tvs.specs.items()
        if is_matrix(name, len(spec.shape), skip) and spec.numel
    }
    layers = {*ranks, *(name.removesuffix("weight") + "bias" for name in ranks)}
    others = tvs.only_names(name for name in tvs if name not in layers)
    shared = others.reduce(REST["mean"]) if rest == "mean" else StateDict({})
    patches = patches_of_ranks(tvs.only_names(name for name in tvs if name in layers), ranks)
    return Merged(shared, patches, SubspaceRouter(tvs.tasks, directions, top))
