"""mergekit's `dare_linear` and `dare_ties`: random drops made up for by the L1 norm."""

from typing import Annotated

from calmerge._signature import Interval, Seed
from calmerge._task_vectors import TaskVectors
from calmerge._weights import Weights
from calmerge.pieces.drop import drop
from calmerge.pieces.fuse import fuse
from calmerge.pieces.per_model import FractionPerModel, PerModel, checked
from calmerge.pieces.rescale import restore_l1


def mergekit_dare_linear(
    tvs: TaskVectors,
    *,
    weight: PerModel,
    density: FractionPerModel = (1.0,),
    normalize: bool = False,
    rescale: bool = True,
    lambda_: Annotated[float, Interval()] = 1.0,
    seed: Seed = 0,
) -> Weights:
    """Drop entries at random, restore each tensor's L1 norm, add up by weight, as mergekit's `dare_linear`.

    tau_hat_t = m_t tau_t times sum |tau_t| / sum |m_t tau_t| over the tensor, m_t ~ Bernoulli(density_t);
    delta = lambda sum_t w_t tau_hat_t.

    Args:
        tvs: task vectors of T experts.
        weight: w, one number for each model or one for all.
        density: chance of an entry to stay, one number for each model or one for all, in [0, 1]; 1 draws nothing.
        normalize: whether to divide by the sum of the weights (by 1 where that is 0).
        rescale: whether each thinned tensor is scaled back to its former L1 norm.
        lambda_: a factor on the result.
        seed: names the draw.

    >>> from calmerge import task_vectors
    >>> tvs = task_vectors({"w": torch.zeros(100)}, {"a": {"w": torch.ones(100)}})
    >>> float(mergekit_dare_linear(tvs, weight=[1.0], density=[0.3])["w"].sum().round())
    100.0

    Source: "dare_linear" of arcee-ai/mergekit 0.1.5 (LGPL-3.0; Goddard et al., arXiv 2024); Yu et al., ICML 2024.
    Differences: from `dare`, the L1 norm is restored exactly instead of dividing by the density. A draw is a function
    of (seed, tensor, task, entry).
    """
    given = {"weight": weight, "density": density, "normalize": normalize, "rescale": rescale, "lambda_": lambda_}
    each = checked(mergekit_dare_linear, tvs, given | {"seed": seed})
    kept = drop(tvs, [1 - d for d in each["density"]], seed=seed)
    kept = restore_l1(kept, tvs) if rescale else kept
    return fuse(kept, each["weight"], vote=False, normalize=normalize, scale=lambda_)


def mergekit_dare_ties(
    tvs: TaskVectors,
    *,
    weight: PerModel,
    density: FractionPerModel = (1.0,),
    normalize: bool = False,
    rescale: bool = True,
    lambda_: Annotated[float, Interval()] = 1.0,
    seed: Seed = 0,
) -> Weights:
    """As `mergekit_dare_linear` with a vote on signs and no trim, as mergekit's `dare_ties`.

    s = sign(sum_t w_t tau_hat_t), where 0 counts as plus; only the tasks with that sign are added up.

    Args:
        tvs: task vectors of T experts.
        weight: w, one number for each model or one for all; they count in the vote.
        density: chance of an entry to stay, one number for each model or one for all, in [0, 1]; 1 draws nothing.
        normalize: whether to divide by the weights of those that agree.
        rescale: whether each thinned tensor is scaled back to its former L1 norm.
        lambda_: a factor on the result.
        seed: names the draw.

    >>> from calmerge import task_vectors
    >>> experts = {"a": {"w": torch.tensor([1.0, 2.0])}, "b": {"w": torch.tensor([-3.0, 4.0])}}
    >>> mergekit_dare_ties(task_vectors({"w": torch.zeros(2)}, experts), weight=[0.5])["w"]
    tensor([-1.5000,  3.0000])

    Source: "dare_ties" of arcee-ai/mergekit 0.1.5 (LGPL-3.0; Goddard et al., arXiv 2024); Yu et al., ICML 2024.
    Differences: from `dare` with `ties` inside (the DARE-TIES of the official code), nothing is trimmed by magnitude.
    """
    given = {"weight": weight, "density": density, "normalize": normalize, "rescale": rescale, "lambda_": lambda_}
    each = checked(mergekit_dare_ties, tvs, given | {"seed": seed})
    kept = drop(tvs, [1 - d for d in each["density"]], seed=seed)
    kept = restore_l1(kept, tvs) if rescale else kept
    return fuse(kept, each["weight"], vote=True, normalize=normalize, scale=lambda_)
