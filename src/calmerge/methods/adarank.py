"""AdaRank: learned choices of singular components (Lee et al., ICLR 2026)."""

import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import torch

from calmerge._run import Run
from calmerge._signature import Count, Fraction, Interval, Positive, Seed, check, raise_together
from calmerge._task_vectors import TaskVectors, materialise
from calmerge._weights import Weights
from calmerge.fitting.fit import fit
from calmerge.fitting.gates import singular_gates
from calmerge.fitting.objectives import entropy
from calmerge.fitting.samplers import shuffled, whole_pools
from calmerge.methods.average import average
from calmerge.pieces.matrices import TABLES
from calmerge.tasks.base import Batches, Tasks


def adarank(
    tvs: TaskVectors,
    *,
    tasks: Tasks,
    start: Literal["base", "average"] = "average",
    keep: Fraction | None = None,
    coefficient: Annotated[float, Interval()] | None = None,
    steps: Annotated[int, Interval(0)] = 1000,
    lr: Positive = 1e-3,
    batch: Count = 16,
    skip: Sequence[str] = TABLES,
    seed: Seed = 0,
    order: Batches | None = None,
    run: Run | None = None,
) -> Weights:
    """A merge whose singular components are each switched on or off, and whose layers are weighted, by entropy.

    theta = theta_o + sum_t lambda[t, l] U_t diag(1[p_t > 1/2] s_t) V_t^T for matrices, sum_t lambda[t, l] tau_t for the
    rest; tau_t = theta_t - theta_o; p = sigma(logit / 10), with its own gradient where the step has none; minimise over
    logits and lambda the entropy of the predictions, summed over tasks.

    Args:
        tvs: task vectors of T experts.
        tasks: the model, its frozen heads, and unlabelled pools.
        start: theta_o: the `base` ("TA + AdaRank"), or the experts' `average` ("CART + AdaRank").
        keep: share of the components, the largest of each matrix, that are on at first; 1 from the base, 0.16 from the
            average when None.
        coefficient: lambda at first; 0.3 from the base, 2.3 from the average when None.
        steps: updates with Adam.
        lr: its step size.
        batch: inputs of each task in an update.
        skip: shell patterns of matrices that are weighted only; tables of a vocabulary by default.
        seed: decides which inputs are drawn.
        order: the batches of every update, instead of random ones.
        run: progress, resumable state, and the trace.

    Held in memory: theta, its gradient and one tensor's triples of all tasks; on disk, twice the experts.

    Raises:
        DataError: a task of `tvs` has no pool.
        FitError: a loss is not finite.

    >>> import inspect
    >>> inspect.signature(adarank).parameters["start"].default
    'average'

    Source: Lee, Choi, Lee, Kim, Hong, "AdaRank: Adaptive Rank Pruning for Enhanced Model Merging", ICLR 2026;
    david3684/AdaRank (no licence file).
    Differences: the official script looks at test accuracy every 500 of 10,000 updates and keeps the best; here the
    last update counts, and the pool is the one that `tasks` names. Matrices are all but those in `skip`.
    """
    options = {"start": start, "keep": keep, "coefficient": coefficient, "steps": steps, "lr": lr, "batch": batch}
    raise_together(check(adarank, {"tasks": tasks, "skip": skip, "seed": seed, **options}))
    run, tvs = run or Run(), tvs.to(tasks.device)
    centre = materialise(average(tvs)) if start == "average" else materialise(tvs.of(tvs.tasks[0]).map(_nothing))
    deviations = tvs.transform(lambda tau, c, site: tau - c, centre)
    pools = whole_pools(tasks, tvs.tasks)
    with tempfile.TemporaryDirectory(prefix="calmerge-adarank-") as folder:
        gates = singular_gates(
            centre,
            deviations,
            Path(folder),
            keep=keep if keep is not None else {"base": 1.0, "average": 0.16}[start],
            coefficient=coefficient if coefficient is not None else {"base": 0.3, "average": 2.3}[start],
            skip=skip,
        )
        fitted = fit(
            gates.merged,
            gates.start,
            tasks.gradient(entropy, order or shuffled(pools, size=batch, count=1, seed=seed)),
            base=tvs.base,
            optimizer=partial(torch.optim.Adam, lr=lr),
            steps=steps,
            run=run,
            label="AdaRank",
            key=f"{options}{seed}{tvs.fingerprint}",
        )
        run.trace["adarank"] = fitted.trace()
        return materialise(gates.merged(fitted.params))


def _nothing(tau: torch.Tensor, site: object) -> torch.Tensor:
    return torch.zeros_like(tau)
