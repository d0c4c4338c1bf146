"""LiNeS, layer-increasing network scaling (Wang et al., ICLR 2025)."""

from typing import Annotated, Literal

from torch import Tensor, float64

from calmerge._layers import layers
from calmerge._measure import total
from calmerge._signature import Interval, NonNegative, check, raise_together
from calmerge._task_vectors import TaskVectors
from calmerge._weights import Site, Weights
from calmerge.pieces.blend import plain_sum


def lines(
    merged: Weights,
    tvs: TaskVectors,
    *,
    beta: Annotated[float, Interval()] = 0.5,
    alpha: NonNegative | None = None,
    stacks: Literal["separate", "concat"] = "separate",
) -> Weights:
    """A merged vector with shallow blocks scaled down and deep ones up, in place of one coefficient for all.

    theta = theta_0 + s(l) v, s(l) = alpha + beta l / (L - 1) in block l = 0..L-1; alpha outside the blocks, also for
    final norms and projections; alpha + beta where there is one block only.
    alpha = (||sum_t tau_t||_1 / ||v||_1) / T if not given, norms over the whole model; 1/T after Task Arithmetic.

    Args:
        merged: v, a merge at coefficient 1 (`task_arithmetic` with `scale=1`, `ties`, `consensus`), or one task's
            vector.
        tvs: the task vectors it was made of.
        beta: what the last block gets more than the first; chosen on validation data from 0.1 to 1 (1.5 after TIES).
        alpha: scale of the first block. To keep one expert's task and the base's abilities, `alpha=a, beta=1-a`.
        stacks: an encoder and a decoder count their blocks each for itself, or (`concat`) the decoder goes on where the
            encoder ends.

    >>> import torch; from calmerge import task_arithmetic, task_vectors
    >>> base = {f"{name}.weight": torch.zeros(1) for name in ("embed", "h.0.ln", "h.1.ln", "h.2.ln")}
    >>> tvs = task_vectors(base, {t: {n: w + 1 for n, w in base.items()} for t in ("a", "b")})
    >>> scaled = lines(task_arithmetic(tvs, scale=1.0), tvs, beta=0.5)
    >>> [scaled[n].item() for n in base]
    [1.0, 1.0, 1.5, 2.0]

    Source: Wang, Dimitriadis, Favero, Ortiz-Jimenez, Fleuret, Frossard, "LiNeS: Post-training Layer Scaling Prevents
    Forgetting and Enhances Model Merging", ICLR 2025; wang-kee/LiNeS (MIT).
    Differences: the official code finds blocks by substrings, which fails on T5; here they are found from all names of
    the base together. Numbering beyond CLIP is ours.
    """
    raise_together(check(lines, {"beta": beta, "alpha": alpha, "stacks": stacks}))
    found = layers(tvs.base.specs, stacks=stacks)

    def slope(name: str) -> float:
        if name not in found:
            return 0.0
        at = found[name]
        return beta * at.index / (at.count - 1) if at.count > 1 else beta

    if alpha is not None:
        return merged.map(lambda v, site: v * (alpha + slope(site.name)))

    def scaled(v: Tensor, all_of_it: Tensor, kept: Tensor, site: Site) -> Tensor:
        first = float(all_of_it / kept) / len(tvs.tasks) if kept > 0 else 0.0
        return v * (first + slope(site.name))

    l1 = [total(w, lambda x: x.abs().sum(dtype=float64)) for w in (plain_sum(tvs), merged)]
    return merged.map(scaled, *l1)
