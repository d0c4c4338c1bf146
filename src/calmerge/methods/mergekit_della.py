"""mergekit's `della` and `della_linear`: drops by rank made up for by the L1 norm."""

from collections.abc import Sequence
from typing import Annotated

from calmerge._errors import UsageError
from calmerge._signature import Interval, Seed
from calmerge._task_vectors import TaskVectors
from calmerge._weights import Weights
from calmerge.pieces.fuse import fuse
from calmerge.pieces.magprune import keep_by_rank
from calmerge.pieces.per_model import FractionPerModel, PerModel, checked


def mergekit_della(
    tvs: TaskVectors,
    *,
    weight: PerModel,
    density: FractionPerModel = (1.0,),
    epsilon: FractionPerModel = (0.15,),
    normalize: bool = True,
    rescale: bool = True,
    lambda_: Annotated[float, Interval()] = 1.0,
    seed: Seed = 0,
) -> Weights:
    """Drop small entries more often than large ones, restore L1 norms, vote on signs, as mergekit's `della`.

    An entry stays with a chance that rises with its rank in its row from density - epsilon to density + epsilon; each
    tensor is scaled back to its former L1 norm; then as `mergekit_ties` after its trim.

    Args:
        tvs: task vectors of T experts. Whole tensors are held.
        weight: w, one number for each model or one for all; they count in the vote.
        density: mean chance of an entry to stay, one number for each model or one for all, in [0, 1]; 1 draws nothing.
        epsilon: half of the range of chances, one number for each model or one for all; density - epsilon and
            density + epsilon must lie in (0, 1) where density is below 1.
        normalize: whether to divide by the weights of those that agree.
        rescale: whether each thinned tensor is scaled back to its former L1 norm.
        lambda_: a factor on the result.
        seed: names the draw.

    Raises:
        UsageError: density and epsilon do not fit.

    >>> import torch; from calmerge import task_vectors
    >>> experts = {"a": {"w": torch.tensor([1.0, 2.0])}, "b": {"w": torch.tensor([-3.0, 4.0])}}
    >>> mergekit_della(task_vectors({"w": torch.zeros(2)}, experts), weight=[0.5])["w"]
    tensor([-3.,  3.])

    Source: "della" of arcee-ai/mergekit 0.1.5 (LGPL-3.0; Goddard et al., arXiv 2024); Deep et al., arXiv 2024.
    Differences: from `della`, see there. Ranks are those of float32 numbers, whatever type was asked for. A draw is a
    function of (seed, tensor, task, entry).
    """
    given = {"weight": weight, "density": density, "epsilon": epsilon, "normalize": normalize, "rescale": rescale}
    each = checked(mergekit_della, tvs, given | {"lambda_": lambda_, "seed": seed})
    kept = _pruned("mergekit_della", tvs, each["density"], each["epsilon"], rescale, seed)
    return fuse(kept, each["weight"], vote=True, normalize=normalize, scale=lambda_)


def mergekit_della_linear(
    tvs: TaskVectors,
    *,
    weight: PerModel,
    density: FractionPerModel = (1.0,),
    epsilon: FractionPerModel = (0.15,),
    normalize: bool = False,
    rescale: bool = True,
    lambda_: Annotated[float, Interval()] = 1.0,
    seed: Seed = 0,
) -> Weights:
    """As `mergekit_della` without the vote, as mergekit's `della_linear`.

    delta = lambda sum_t w_t tau_hat_t.

    Args:
        tvs: task vectors of T experts. Whole tensors are held.
        weight: w, one number for each model or one for all.
        density: mean chance of an entry to stay, one number for each model or one for all, in [0, 1]; 1 draws nothing.
        epsilon: half of the range of chances, one number for each model or one for all; see `mergekit_della`.
        normalize: whether to divide by the sum of the weights (by 1 where that is 0).
        rescale: whether each thinned tensor is scaled back to its former L1 norm.
        lambda_: a factor on the result.
        seed: names the draw.

    Raises:
        UsageError: density and epsilon do not fit.

    >>> import torch; from calmerge import task_vectors
    >>> experts = {"a": {"w": torch.tensor([1.0, 2.0])}, "b": {"w": torch.tensor([-3.0, 4.0])}}
    >>> mergekit_della_linear(task_vectors({"w": torch.zeros(2)}, experts), weight=[0.5])["w"]
    tensor([-1.,  3.])

    Source: "della_linear" of arcee-ai/mergekit 0.1.5 (LGPL-3.0; Goddard et al., arXiv 2024); Deep et al., arXiv 2024.
    Differences: as `mergekit_della`.
    """
    given = {"weight": weight, "density": density, "epsilon": epsilon, "normalize": normalize, "rescale": rescale}
    each = checked(mergekit_della_linear, tvs, given | {"lambda_": lambda_, "seed": seed})
    kept = _pruned("mergekit_della_linear", tvs, each["density"], each["epsilon"], rescale, seed)
    return fuse(kept, each["weight"], vote=False, normalize=normalize, scale=lambda_)


def _pruned(
    name: str, tvs: TaskVectors, density: Sequence[float], epsilon: Sequence[float], rescale: bool, seed: int
) -> TaskVectors:
    for share, half in zip(density, epsilon, strict=True):
        if share < 1 and not 0 < share - half <= share + half < 1:
            raise UsageError(
                f"{name}: chances from {share - half:g} to {share + half:g} follow from density {share:g} and epsilon "
                f"{half:g}; they must lie in (0, 1). Choose an epsilon below {min(share, 1 - share):g}."
            )
    return keep_by_rank(tvs, density, epsilon, rescale="l1" if rescale else None, seed=seed)
