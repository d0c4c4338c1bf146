"""Fisher merging: averages weighted by how much predictions depend on each weight (Matena and Raffel, NeurIPS 2022)."""

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from calmerge._errors import UsageError
from calmerge._measure import total
from calmerge._run import Run
from calmerge._signature import Count, NonNegative, Positive, Seed, check, raise_together
from calmerge._task_vectors import TaskVectors, materialise
from calmerge._weights import Site, Weights
from calmerge.fitting.calibrate import fisher_diagonals
from calmerge.pieces.blend import squares, summed
from calmerge.report.traces import FitTrace
from calmerge.tasks.base import Tasks


def fisher(
    tvs: TaskVectors,
    *,
    tasks: Tasks,
    examples: Count = 256,
    estimator: Literal["exact", "batch_sqrt"] = "exact",
    normalise: bool = True,
    coefficients: Sequence[NonNegative] | None = None,
    floor: Positive = 1e-6,
    batch: Count = 32,
    seed: Seed = 0,
    run: Run | None = None,
) -> Weights:
    """The average of the experts, entry by entry weighted by the diagonal of their Fisher information.

    theta[i] = sum_t lambda_t F_t[i] theta_t[i] / sum_t lambda_t F_t[i],
    F_t[i] = E_x E_{y ~ p_t(y|x)} (d log p_t(y|x) / d theta_i)^2 + floor.

    Args:
        tvs: task vectors of T experts.
        tasks: the model, its heads, and unlabelled pools.
        examples: of each pool.
        estimator: `exact`, one example and class at a time (one drawn class where there are more than 32), or
            `batch_sqrt`, FusionBench's cheap form with cross terms.
        normalise: multiply lambda_t by (1 / |F_t|) / sum_j (1 / |F_j|), |F| the L2 norm over the model.
        coefficients: lambda, one a task in their order; equal when None.
        floor: added to every F; it decides alone where Fishers are much smaller, and the plain average comes out.
        batch: examples in a batch of `batch_sqrt`.
        seed: decides which examples.
        run: progress, and the trace.

    Held in memory: two times the merged tensors; on disk, one Fisher diagonal a task.

    Raises:
        UsageError: not as many coefficients as experts.
        DataError: a task has no pool.

    >>> import inspect
    >>> inspect.signature(fisher).parameters["floor"].default
    1e-06

    Source: Matena, Raffel, "Merging Models with Fisher-Weighted Averaging", NeurIPS 2022; read in
    tanganke/fusion_bench (MIT).
    Differences: the exact estimator is the default, where FusionBench squares after summing over classes and examples.
    A tensor that no prediction depends on has F = floor, and is averaged.
    """
    options = {"examples": examples, "estimator": estimator, "normalise": normalise, "floor": floor, "batch": batch}
    raise_together(check(fisher, {"tasks": tasks, "coefficients": coefficients, "seed": seed, **options}))
    if coefficients is not None and len(coefficients) != len(tvs.tasks):
        raise UsageError(
            f"fisher.coefficients must be {len(tvs.tasks)} numbers, one for each expert, got {list(coefficients)}."
        )
    run, tvs = run or Run(), tvs.to(tasks.device)
    with tempfile.TemporaryDirectory(prefix="calmerge-fisher-") as folder:
        diagonals = fisher_diagonals(
            tvs, tasks, Path(folder), examples=examples, batched=estimator == "batch_sqrt", batch=batch, seed=seed,
            run=run,
        )  # fmt: skip
        merged = materialise(
            fisher_average(tvs, diagonals, coefficients=coefficients, normalise=normalise, floor=floor)
        )
        under = total(diagonals, lambda f: (f < floor).sum(dtype=torch.float64)).value() / (len(tvs.tasks) * tvs.numel)
    run.trace["fisher"] = FitTrace(loss=[], numbers={"share of entries whose Fisher is below the floor": float(under)})
    return merged


def fisher_average(
    tvs: TaskVectors,
    diagonals: Weights,
    *,
    coefficients: Sequence[float] | None = None,
    normalise: bool = True,
    floor: float = 1e-6,
) -> Weights:
    """The average of T experts under given Fisher diagonals; `fisher` says more.

    Args:
        tvs: task vectors.
        diagonals: F, [T, ...] for every tensor.
        coefficients: lambda; equal when None.
        normalise: scale every F by its norm over the model.
        floor: added to every F.

    >>> from calmerge import StateDict
    >>> tvs = task_vectors({"w": torch.zeros(1)}, {"a": {"w": torch.tensor([1.0])}, "b": {"w": torch.tensor([3.0])}})
    >>> F = StateDict({"w": torch.tensor([[3.0], [1.0]])})
    >>> fisher_average(tvs, F, normalise=False)["w"]
    tensor([1.5000])
    """
    weights = torch.tensor(coefficients or [1 / len(tvs.tasks)] * len(tvs.tasks), dtype=torch.float64)
    norms = total(diagonals, squares).map(torch.sqrt)

    def averaged(tau: Tensor, f: Tensor, norm: Tensor, site: Site) -> Tensor:
        lam = weights
        if normalise:
            inverse = 1 / (norm + 1e-6)
            lam = lam * inverse / inverse.sum()
        scaled = (f + floor) * lam.float().reshape(-1, *[1] * (f.dim() - 1)).to(f)
        return summed(scaled * tau) / summed(scaled)

    return tvs.reduce(averaged, diagonals, norms)
