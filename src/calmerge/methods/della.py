"""DELLA-Merging (Deep, Bhardwaj, Poria, 2024)."""

from typing import Annotated

from calmerge._signature import Fraction, Interval, Seed, check, raise_together
from calmerge._task_vectors import TaskVectors
from calmerge._weights import Weights
from calmerge.methods.task_arithmetic import task_arithmetic
from calmerge.pieces.fuse import fuse
from calmerge.pieces.magprune import magprune


def della(
    tvs: TaskVectors,
    *,
    rate: Fraction = 0.5,
    spread: Fraction = 0.15,
    scale: Annotated[float, Interval()] = 1.0,
    seed: Seed = 0,
) -> Weights:
    """Drop small entries more often than large ones, elect a sign for every entry, merge the entries that have it.

    tau_hat_t = MagPrune(tau_t): the entry of rank r in its row of n is dropped with probability
    p + epsilon/2 - epsilon r / (n - 1), else divided by what is left of 1; s = sign(sum_t tau_hat_t), where 0 counts
    as plus; delta = lambda times the mean of tau_hat_t,p over the tasks with the sign s_p.

    Args:
        tvs: task vectors of T experts.
        rate: p, the mean share dropped, in [0, 1]; no default is published for all models, 0.5 is the middle.
        spread: epsilon, by how much the probabilities of smallest and largest entry differ; both must lie in [0, 1).
        scale: lambda.
        seed: names the draw; results are random, so report several.

    >>> import torch; from calmerge import task_vectors
    >>> experts = {"a": {"w": torch.tensor([1.0, 2.0])}, "b": {"w": torch.tensor([-3.0, 4.0])}}
    >>> della(task_vectors({"w": torch.zeros(2)}, experts), rate=0.0, spread=0.0)["w"]
    tensor([-3.,  3.])

    Source: Deep, Bhardwaj, Poria, "DELLA-Merging: Reducing Interference in Model Merging through Magnitude-Based
    Sampling", arXiv 2024 (2406.11617); declare-lab/della.
    Differences: a sum of 0 counts as plus, as in mergekit; in `ties` it takes the majority sign of the whole model.
    `mergekit_della` restores L1 norms instead of dividing by probabilities, and its epsilon is half of the one here.
    """
    raise_together(check(della, {"rate": rate, "spread": spread, "scale": scale, "seed": seed}))
    pruned = magprune(tvs, rate=rate, spread=spread, seed=seed)
    return fuse(pruned, [1.0] * len(tvs.tasks), vote=True, normalize=True, scale=scale)


def della_linear(
    tvs: TaskVectors,
    *,
    rate: Fraction = 0.5,
    spread: Fraction = 0.15,
    scale: Annotated[float, Interval()] = 0.3,
    seed: Seed = 0,
) -> Weights:
    """Drop small entries more often than large ones, then add up the rest: DELLA without the election.

    delta = lambda sum_t MagPrune(tau_t); see `della`.

    Args:
        tvs: task vectors of T experts.
        rate: p, the mean share dropped, in [0, 1].
        spread: epsilon, by how much the probabilities of smallest and largest entry differ; both must lie in [0, 1).
        scale: lambda; see `task_arithmetic`.
        seed: names the draw; results are random, so report several.

    >>> import torch; from calmerge import task_vectors
    >>> experts = {"a": {"w": torch.tensor([1.0, 2.0])}, "b": {"w": torch.tensor([-3.0, 4.0])}}
    >>> della_linear(task_vectors({"w": torch.zeros(2)}, experts), rate=0.0, spread=0.0, scale=1.0)["w"]
    tensor([-2.,  6.])

    Source: Deep, Bhardwaj, Poria, "DELLA-Merging: Reducing Interference in Model Merging through Magnitude-Based
    Sampling", arXiv 2024 (2406.11617); declare-lab/della.
    """
    raise_together(check(della_linear, {"rate": rate, "spread": spread, "scale": scale, "seed": seed}))
    return task_arithmetic(magprune(tvs, rate=rate, spread=spread, seed=seed), scale=scale)
