"""Twin-Merging (Lu et al., NeurIPS 2024): a shared expert, thin exclusive ones, and a router between them."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated

import torch
from torch import Tensor

from calmerge._merged import Merged
from calmerge._run import Run
from calmerge._signature import Count, Fraction, Interval, Positive, Seed, check, raise_together
from calmerge._task_vectors import Merge, TaskVectors, materialise
from calmerge._weights import Site, add
from calmerge.fitting.routing import fit_router
from calmerge.methods.task_arithmetic import task_arithmetic
from calmerge.pieces.factor_patch import factor_patches
from calmerge.pieces.router import pooled
from calmerge.tasks.base import Tasks


def twin_merging(
    tvs: TaskVectors, *, inner: Merge | None = None, keep: Fraction = 0.1, skip: Sequence[str] = ()
) -> Merged:
    """One model that all tasks share, and for each task the leading directions of what its expert has beyond it.

    theta_s = theta_0 + inner(tau);  v_t = SVD_r(theta_t - theta_s), r = max(1, floor(d min(m, n)));
    theta = theta_s + v_t for inputs whose task is known.

    Other tensors than matrices are kept whole, and so are matrices that their factors would not make smaller. Of an
    m x n matrix r (m + n) numbers are stored for each task, of a square one 2 d of it, beside the shared vector. Holds
    T copies of one tensor, and factors of its size in float64.

    Args:
        tvs: task vectors of T experts.
        inner: the merge that makes the shared expert; Task Arithmetic at 0.29 when None.
        keep: d, share of the rank kept, in [0, 1]; 0 keeps nothing, and every task has the shared expert.
        skip: shell patterns of matrices that are kept whole.

    >>> import torch; from calmerge import task_vectors
    >>> experts = {"a": {"w": torch.full((9, 9), 2.0)}, "b": {"w": torch.ones(9, 9)}}
    >>> tvs = task_vectors({"w": torch.zeros(9, 9)}, experts)
    >>> merged = twin_merging(tvs, keep=0.2)
    >>> merged.shared["w"][0, :2], merged.for_task("a")["w"][0, :2].round(decimals=4)  # 0.29 (2 + 1), and a's own 2
    (tensor([0.8700, 0.8700]), tensor([2., 2.]))

    Source: Lu, Fan, Wei, Qu, Chen, Cheng, "Twin-Merging: Dynamic Integration of Modular Expertise in Model Merging",
    NeurIPS 2024; LZY-the-boys/Twin-Merging (MIT).
    Differences: the official code leaves biases out of the merge and loads those of the true task's expert; here they
    belong to what is kept whole. It merges the factors of adapters one by one; here the updates that they make.
    Matrices that the official code would blow up by factors stay whole.
    """
    raise_together(check(twin_merging, {"keep": keep, "skip": skip}))
    shared = inner(tvs) if inner else task_arithmetic(tvs, scale=0.29)

    def exclusive(tau: Tensor, merged: Tensor, site: Site) -> Tensor:
        return tau - merged

    kept = tvs if keep else tvs.only_names([])
    return Merged(shared, factor_patches(kept.transform(exclusive, shared), keep, skip))


def twin_merging_routed(
    tvs: TaskVectors,
    *,
    tasks: Tasks,
    inner: Merge | None = None,
    keep: Fraction = 0.1,
    skip: Sequence[str] = (),
    steps: Annotated[int, Interval(0)] = 300,
    lr: Positive = 5e-4,
    batch: Count = 256,
    dropout: Annotated[float, Interval(0, 1, open_high=True)] = 0.5,
    hold_out: Fraction = 0.1,
    seed: Seed = 0,
    run: Run | None = None,
) -> Merged:
    """Twin-Merging with a router: every input gets a model of its own, mixed by how much of each task it has.

    w = softmax(R(f(x; theta_s)));  theta(x) = theta_s + sum_t w_t v_t.

    f are the features that heads are given, R is Linear(d, 2d) - BatchNorm - LeakyReLU - Dropout - Linear(2d, 2d) -
    BatchNorm - LeakyReLU - Dropout - Linear(2d, T), trained to tell which task's pool an input is of.

    Args:
        tvs: task vectors of T experts.
        tasks: a model that tells its features, and unlabelled pools.
        inner: the merge that makes the shared expert; Task Arithmetic at 0.29 when None.
        keep: share of the rank kept of exclusive experts, in [0, 1].
        skip: shell patterns of matrices that are kept whole.
        steps: updates of the router with AdamW.
        lr: their step size at first; it falls to 0 in a straight line.
        batch: inputs in each update, of all tasks together.
        dropout: share of the hidden units that are dropped while training, in [0, 1).
        hold_out: share of every pool on which the best update is chosen; 0 takes the last.
        seed: decides start, batches, dropped units, and what is held out.
        run: progress, resumable state, and the trace.

    Held in memory: the features of all pools, and the shared model. To run it takes T + 1 models, since exclusive
    experts are unfolded, and mixes one for all inputs of the same weights, told apart to 1/256.

    Raises:
        DataError: a task has no pool, or one too small for `hold_out`; or the model does not tell its features.
        FitError: a loss is not finite.

    >>> import inspect
    >>> inspect.signature(twin_merging_routed).parameters["lr"].default
    0.0005

    Source: Lu, Fan, Wei, Qu, Chen, Cheng, "Twin-Merging: Dynamic Integration of Modular Expertise in Model Merging",
    NeurIPS 2024; LZY-the-boys/Twin-Merging (MIT).
    Differences: those of `twin_merging`. The official router is trained for 50 passes in batches of 1024, and its best
    epoch is chosen on the test features it is then judged on; here a part of the pools is held out. As there, an input
    gets the head of its true task: it is the weights that are routed.
    """
    options = {"steps": steps, "lr": lr, "batch": batch, "dropout": dropout, "hold_out": hold_out, "seed": seed}
    raise_together(check(twin_merging_routed, {"tasks": tasks, "keep": keep, "skip": skip, **options}))
    merged = twin_merging(tvs, inner=inner, keep=keep, skip=skip)
    shared = materialise(merged.shared)
    theta = materialise(add(tvs.base.only_names(tvs.specs), shared, dtype=torch.float32))
    features = {task: pooled(tasks.features(theta, task)) for task in tvs.tasks}
    router = fit_router(
        features, steps=steps, lr=lr, batch=batch, dropout=dropout, hold_out=hold_out, seed=seed, run=run,
        key=f"{options}{tvs.fingerprint}{shared.fingerprint}",
    )  # fmt: skip
    return replace(merged, shared=shared, router=router)
