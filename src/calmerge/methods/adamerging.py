"""AdaMerging and AdaMerging++ (Yang et al., ICLR 2024)."""

import json
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import torch
from torch import Tensor

from calmerge._run import Run
from calmerge._signature import Count, Interval, KeepFraction, Positive, Seed, check, raise_together
from calmerge._task_vectors import TaskVectors, materialise
from calmerge._weights import Weights
from calmerge.fitting.fit import Params, fit
from calmerge.fitting.objectives import entropy
from calmerge.fitting.samplers import shuffled, whole_pools
from calmerge.methods.ties import ties_split
from calmerge.pieces.blend import blend
from calmerge.report.traces import Coefficients
from calmerge.tasks.base import Batches, Tasks


def adamerging(
    tvs: TaskVectors,
    *,
    tasks: Tasks,
    per: Literal["tensor", "task"] = "tensor",
    init: Annotated[float, Interval()] = 0.3,
    clamp: bool = True,
    steps: Annotated[int, Interval(0)] = 500,
    lr: Positive = 1e-3,
    batch: Count = 16,
    batches: Count = 2,
    seed: Seed = 0,
    order: Batches | None = None,
    run: Run | None = None,
) -> Weights:
    """Task Arithmetic with coefficients that minimise the prediction entropy on unlabelled inputs.

    theta(l) = theta_0(l) + sum_t clamp(lambda[l, t], 0, 1) tau_t(l);
    minimise over lambda the sum over tasks of mean_x H(head_t(encoder(x; theta))), H = -sum_c p_c ln p_c.

    Args:
        tvs: task vectors of T experts.
        tasks: the model, its frozen heads, and unlabelled pools.
        per: one coefficient per expert and parameter tensor ("layer-wise" in the paper), or per expert ("task-wise").
        init: start of every coefficient; with `steps=0` the result is Task Arithmetic at this scale.
        clamp: use coefficients clamped to [0, 1]; the raw ones keep moving (their gradient is 0 outside).
        steps: updates with Adam.
        lr: its step size.
        batch: inputs per batch.
        batches: fresh batches per task and update; losses are summed over all of them.
        seed: with the task and the update it decides which inputs are drawn.
        order: the batches of every update, instead of random ones.
        run: progress, resumable state, and the trace.

    Held in memory: theta, its gradient, and one tensor of the T task vectors at a time.

    Raises:
        DataError: a task of `tvs` has no pool.
        FitError: a loss is not finite.

    >>> import inspect
    >>> inspect.signature(adamerging).parameters["steps"].default
    500

    Source: Yang, Wang, Shen, Liu, Guo, Wang, Tao, "AdaMerging: Adaptive Model Merging for Multi-Task Learning",
    ICLR 2024; EnnengYang/AdaMerging (MIT).
    Differences: the official code adapts on the test inputs; here it is the pool that `tasks` names. Batches, Adam
    (betas 0.9, 0.999, no decay), clamping and the summed loss are the official ones.
    """
    options = {"per": per, "init": init, "clamp": clamp, "steps": steps, "lr": lr, "batch": batch, "batches": batches}
    raise_together(check(adamerging, {"tasks": tasks, **options, "seed": seed}))
    return learned_coefficients(
        tvs, tasks, tvs.tasks, per=per, init=init, clamp=clamp, steps=steps, lr=lr, batch=batch, batches=batches,
        seed=seed, order=order, run=run or Run(), label="AdaMerging",
    )  # fmt: skip


def learned_coefficients(
    tvs: TaskVectors,
    tasks: Tasks,
    on: Sequence[str],
    *,
    per: Literal["tensor", "task"],
    init: float,
    clamp: bool,
    steps: int,
    lr: float,
    batch: int,
    batches: int,
    seed: object,
    run: Run,
    label: str,
    order: Batches | None = None,
) -> Weights:
    """The sum of `tvs` with coefficients of least entropy on the pools of the tasks `on`; see `adamerging`."""
    tvs = tvs.to(tasks.device)
    names, n = list(tvs.specs), len(tvs.tasks)
    column = {name: i for i, name in enumerate(names)}
    shape = (n, len(names)) if per == "tensor" else (n,)

    def merged(params: Params) -> Weights:
        def used(name: str) -> Tensor:
            raw = params["coefficients"]
            raw = raw[:, column[name]] if per == "tensor" else raw
            return raw.clamp(0, 1) if clamp else raw

        return blend(tvs, used)

    pools = whole_pools(tasks, on)
    settings = [per, init, clamp, lr, batch, batches, seed, list(on)]
    fitted = fit(
        merged,
        {"coefficients": torch.full(shape, init, device=tasks.device)},
        tasks.gradient(entropy, order or shuffled(pools, size=batch, count=batches, fresh=True, seed=seed)),
        base=tvs.base,
        optimizer=partial(torch.optim.Adam, lr=lr),
        steps=steps,
        run=run,
        label=label,
        key=json.dumps(settings) + tvs.fingerprint,
    )
    lam = fitted.params["coefficients"]
    run.trace[label.lower()] = fitted.trace(
        coefficients=Coefficients(
            tasks=list(tvs.tasks),
            tensors=names if per == "tensor" else ["all tensors"],
            values=lam.reshape(n, -1).T.tolist(),
        ),
    )
    return merged({"coefficients": lam})


def adamerging_pp(
    tvs: TaskVectors,
    *,
    tasks: Tasks,
    keep: KeepFraction = 0.2,
    per: Literal["tensor", "task"] = "tensor",
    init: Annotated[float, Interval()] = 0.3,
    clamp: bool = True,
    steps: Annotated[int, Interval(0)] = 500,
    lr: Positive = 1e-3,
    batch: Count = 16,
    batches: Count = 2,
    seed: Seed = 0,
    run: Run | None = None,
) -> Weights:
    """AdaMerging over task vectors that TIES has trimmed and rid of entries that lost the sign election.

    The trimmed vectors are written to a temporary folder once (T x P numbers on disk, none of them kept in memory).

    Args:
        tvs: task vectors of T experts.
        tasks: the model, its frozen heads, and unlabelled pools.
        keep: fraction of entries that TIES keeps per task, counted over the whole model.
        per: as for `adamerging`, like all that follow.
        init: start of every coefficient.
        clamp: use coefficients clamped to [0, 1].
        steps: updates with Adam.
        lr: its step size.
        batch: inputs per batch.
        batches: fresh batches per task and update.
        seed: decides which inputs are drawn.
        run: progress, resumable state, and the trace.

    >>> import inspect
    >>> inspect.signature(adamerging_pp).parameters["keep"].default
    0.2

    Source: Yang et al., "AdaMerging: Adaptive Model Merging for Multi-Task Learning", ICLR 2024 (AdaMerging++);
    EnnengYang/AdaMerging (MIT).
    """
    with tempfile.TemporaryDirectory(prefix="calmerge-ties-") as folder:
        split = ties_split(tvs, keep=keep).spill(Path(folder))
        merged = adamerging(
            split, tasks=tasks, per=per, init=init, clamp=clamp, steps=steps, lr=lr, batch=batch, batches=batches,
            seed=seed, run=run,
        )  # fmt: skip
        return materialise(merged)
