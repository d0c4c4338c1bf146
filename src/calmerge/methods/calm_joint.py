"""CALM, joint: all tasks agree at once, in the span of their experts, from a spectral start."""

from typing import Annotated, Literal

import torch

from calmerge._run import Run
from calmerge._signature import Count, Interval, Positive, Seed, check, raise_together
from calmerge._task_vectors import Merge, TaskVectors, materialise
from calmerge._weights import Weights
from calmerge.fitting.joint import Schedule, fit_jointly
from calmerge.fitting.objectives import expert_kl
from calmerge.fitting.orthogonal import orthogonal
from calmerge.fitting.parametrise import reach, span
from calmerge.fitting.targets import expert_pools
from calmerge.methods.tsv_m import tsv_m
from calmerge.tasks.base import Tasks
from calmerge.tasks.mixing import mixed


def calm_joint(
    tvs: TaskVectors,
    *,
    tasks: Tasks,
    inner: Merge | None = None,
    steps: Annotated[int, Interval(0)] = 300,
    lr: Positive = 0.03,
    batch: Count = 16,
    fill: Annotated[int, Interval(0)] = 2048,
    optimizer: Literal["adam", "muon"] = "adam",
    seed: Seed = 0,
    run: Run | None = None,
) -> Weights:
    """A spectral merge moved, within reach of the experts, to where all of them agree with it at once.

    theta = theta_0 + tau_s + u r,  r = sum_t |tau_t|, tau_s the start's merge, u = 0 at first;
    minimise over u  sum_t (1 / L_t(0)) 4 KL(softmax(z_t(x) / 2) || softmax(z(x) / 2))  on unlabelled x of every task
    and, where they are few, on mixtures of two of them, z_t the logits of the task's own expert and L_t(0) the task's
    loss at the start, so that a task which is near its expert is not given up for one that is far.

    What it keeps of CALM: one model that all tasks consent to, frozen heads, unlabelled inputs, entries that no expert
    moved stay the base's. What differs: no order of tasks, soft targets of the experts instead of hard labels, one
    number for each entry instead of a mask for each task, a start from which less is left to mend, and mixtures, of
    which an expert can be asked as of any input, so that few inputs are not learned by heart.

    Args:
        tvs: task vectors of T experts.
        tasks: the model, its frozen heads, and unlabelled pools.
        inner: the merge it starts from; TSV-Merge when None.
        steps: updates; the step size falls to 0 along a cosine.
        lr: the step size at first, in units of the reach r of every entry: no entry's scale decides. Chosen with eight
            experts; with two, whose r is smaller, 0.06 was better on both suites (docs/experiments).
        batch: inputs of every task in each update.
        fill: pools with fewer inputs than a quarter of it are filled up with mixtures (`calmerge.tasks.mixing`); 0
            takes them as they are.
        optimizer: `adam`, or `muon`: orthogonal updates of matrices, in which no few directions take all. `muon`, at a
            step size of 0.05, was better on images (by 0.7 % of the experts, docs/benchmarks) and not on texts.
        seed: with the task and the update it decides which inputs are drawn, and with their number what is mixed.
        run: progress, resumable state, and the trace.

    Held in memory: theta, its gradient, the start, the reach, u and Adam's two moments: seven times the merged tensors,
    whatever the number of experts.

    Raises:
        DataError: a task of `tvs` has no pool, or one whose inputs cannot be mixed.
        FitError: a loss is not finite.

    >>> import inspect
    >>> inspect.signature(calm_joint).parameters["lr"].default
    0.03

    Source: calmerge's own, after Yan, Xu, Jia, Zhang et al., "CALM: Consensus-Aware Localized Merging for Multi-Task
    Learning", ICML 2025. A candidate: docs/experiments tells what its parts have been shown to bring, and what not yet.
    """
    options = {"steps": steps, "lr": lr, "batch": batch, "fill": fill, "optimizer": optimizer, "seed": seed}
    raise_together(check(calm_joint, {"tasks": tasks, **options}))
    tvs, tasks = tvs.to(tasks.device), mixed(tasks, fill, seed=seed)
    start = materialise((inner or tsv_m)(tvs))
    parametrisation = span(start, materialise(reach(tvs)))
    return fit_jointly(
        parametrisation,
        expert_kl,
        expert_pools(tvs, tasks, run=run),
        Schedule(steps, lr, batch, seed=seed, balance=True),
        tvs=tvs,
        tasks=tasks,
        optimizer=orthogonal(parametrisation.start) if optimizer == "muon" else torch.optim.Adam,
        run=run,
        label="calm_joint",
        key=f"{options}{tvs.fingerprint}{start.fingerprint}",
    )
