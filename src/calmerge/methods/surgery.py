"""Representation Surgery (Yang et al., ICML 2024), and heads re-aligned in closed form: a small patch for each task."""

from collections.abc import Mapping
from functools import partial
from typing import Annotated, Literal, NamedTuple

import torch
from torch import Tensor

from calmerge._errors import DataError
from calmerge._merged import Merged
from calmerge._random import uniform
from calmerge._run import Run
from calmerge._signature import Count, Interval, Positive, Seed, check, raise_together
from calmerge._task_vectors import Merge, TaskVectors, materialise
from calmerge._weights import StateDict, add
from calmerge.fitting.direct import fit_directly
from calmerge.fitting.samplers import Pool, shuffled
from calmerge.methods.task_arithmetic import task_arithmetic
from calmerge.pieces.head_patch import AffinePatch, SurgeryPatch, operated
from calmerge.pieces.least_squares import RIDGES, affine_fit
from calmerge.report.traces import FitTrace
from calmerge.tasks.base import Batch, Tasks


def surgery(
    tvs: TaskVectors,
    *,
    tasks: Tasks,
    inner: Merge | None = None,
    rank: Count = 16,
    steps: Annotated[int, Interval(0)] = 1000,
    lr: Positive = 1e-3,
    batch: Count = 16,
    seed: Seed = 0,
    run: Run | None = None,
) -> Merged:
    """Any merge, and a small net for each task that takes the merge's bias out of the features before the head.

    z' = z - U_t ReLU(D_t z),  minimise mean |z' - z_t(x)| over unlabelled x of task t, with z_t the expert's features.

    Weights and heads stay as they are; what comes out is declared as `realigned`, never among frozen heads.

    Args:
        tvs: task vectors of T experts.
        tasks: a model that tells its features, and unlabelled pools.
        inner: the merge; Task Arithmetic at 0.3 when None.
        rank: r, of D_t [r, d] and U_t [d, r]; D_t starts uniform in +-1 / sqrt(d), U_t at 0, so that nothing changes.
        steps: updates of every task, with Adam.
        lr: their step size.
        batch: inputs of each task in an update.
        seed: decides start and batches.
        run: progress, resumable state, and the trace.

    Held in memory: the merge, and two features of every input in the pools; the model runs over each pool twice. Of a
    task 2 r d numbers are stored.

    Raises:
        DataError: a task has no pool, or the model does not tell its features.
        FitError: a loss is not finite.

    >>> import inspect
    >>> inspect.signature(surgery).parameters["rank"].default
    16

    Source: Yang, Shen, Wang, Guo, Chen, Wang, Tao, "Representation Surgery for Multi-Task Model Merging", ICML 2024;
    EnnengYang/RepresentationSurgery (MIT).
    Differences: the official code adapts on shuffled test sets, two updates in each of 500 rounds over the tasks; here
    it is the pools, and the tasks move side by side. Where a model scales its features to length 1 before the head, as
    the sentence encoders of the suites do, the net comes after that; with CLIP it comes before.
    """
    options = {"rank": rank, "steps": steps, "lr": lr, "batch": batch, "seed": seed}
    raise_together(check(surgery, {"tasks": tasks, **options}))
    run, shared = run or Run(), materialise((inner or task_arithmetic)(tvs))
    seen = seen_by_both(tvs, shared, tasks, run)
    start: dict[str, Tensor] = {}
    for task, both in seen.items():
        d = both.merged.shape[-1]
        start[f"{task}/down"] = (2 * uniform((rank, d), seed, "surgery", task) - 1) * d**-0.5
        start[f"{task}/up"] = torch.zeros(d, rank)

    def loss(p: Mapping[str, Tensor], one: Batch, step: int) -> Tensor:
        assert one.targets is not None
        z = seen[one.task].merged[one.indices]
        return (operated(z, p[f"{one.task}/down"], p[f"{one.task}/up"]) - one.targets).abs().mean()

    pools = {task: Pool(torch.arange(len(both.expert)), both.expert) for task, both in seen.items()}
    fitted = fit_directly(
        start,
        loss,
        shuffled(pools, size=batch, count=1, seed=seed),
        optimizer=partial(torch.optim.Adam, lr=lr),
        steps=steps,
        run=run,
        label="surgery",
        key=f"{options}{tvs.fingerprint}{shared.fingerprint}",
    )
    run.trace["surgery"] = FitTrace(
        loss=[sum(step) for step in zip(*fitted.loss.values(), strict=True)], per_task=fitted.loss
    )
    nets = {task: StateDict({n: fitted.params[f"{task}/{n}"] for n in ("down", "up")}) for task in tvs.tasks}
    return Merged(shared, {task: SurgeryPatch(net) for task, net in nets.items()})


def realign_heads(
    tvs: TaskVectors,
    *,
    tasks: Tasks,
    inner: Merge | None = None,
    target: Literal["features", "logits"] = "features",
    ridge: Positive | Literal["auto"] = "auto",
    run: Run | None = None,
) -> Merged:
    """Any merge, and for each task an affine map that brings what its head is given, or says, nearest to the expert's.

    features: logits = h_t(z + W_t z + c_t),  minimise |z + W z + c - z_t(x)|^2;
    logits:   logits = h_t(z) + W_t z + c_t,  minimise |h_t(z) + W z + c - h_t(z_t(x))|^2;
    both + lambda |W|^2 over unlabelled x of task t: in closed form, no step size, no seed.

    Where the inputs do not tell W it stays 0, and the head as it was. What comes out is declared as `realigned`, never
    among frozen heads.

    Args:
        tvs: task vectors of T experts.
        tasks: a model that tells its features, and unlabelled pools.
        inner: the merge; Task Arithmetic at 0.3 when None.
        target: what is brought near.
        ridge: lambda relative to the mean variance of the features; `auto` takes of 1e-4, 1e-3 ... 10 the one that
            predicts inputs best which are left out.
        run: progress, and the trace.

    Held in memory: the merge, and two features of every input in the pools; the model runs over each pool twice. Of a
    task d (d + 1) numbers are stored, or classes (d + 1).

    Raises:
        DataError: a task has no pool, or the model does not tell its features, or there is no one vector of them for
            an input, where `target` is `logits`.

    >>> import inspect
    >>> inspect.signature(realign_heads).parameters["target"].default
    'features'

    Source: ridge regression from the merged model's features, the linear case of Yang et al., "Representation Surgery
    for Multi-Task Model Merging", ICML 2024.
    """
    raise_together(check(realign_heads, {"tasks": tasks, "target": target, "ridge": ridge}))
    run, shared = run or Run(), materialise((inner or task_arithmetic)(tvs))
    patches: dict[str, AffinePatch] = {}
    numbers: dict[str, float] = {}
    for task, both in seen_by_both(tvs, shared, tasks, run).items():
        x, missing = both.merged, both.expert - both.merged
        if target == "logits":
            if x.dim() > 2:
                raise DataError(f"task '{task}': its head is given one vector a token; use target: features.")
            missing = both.expert_logits - both.merged_logits
        found = affine_fit(
            x.flatten(0, -2), missing.flatten(0, -2), ridges=RIDGES if isinstance(ridge, str) else [ridge]
        )
        patches[task] = AffinePatch.of(target, found.weight.float(), found.bias.float())
        numbers |= {f"ridge of {task}": found.ridge, f"error of {task} on an input left out": found.error}
        numbers[f"error of {task} before"] = missing.double().square().sum(-1).mean().item()
    run.trace["realign_heads"] = FitTrace(loss=[], numbers=numbers)
    run.trained.append(sum(p.stored.numel for p in patches.values()))
    return Merged(shared, patches)


class Seen(NamedTuple):
    """What a task's head is given, [n, ..., d], and says, [n, classes], in the merged model and in the expert."""

    merged: Tensor
    merged_logits: Tensor
    expert: Tensor
    expert_logits: Tensor


def seen_by_both(tvs: TaskVectors, shared: StateDict, tasks: Tasks, run: Run) -> dict[str, Seen]:
    """By task, features and class scores of its pool under a merge and under its expert."""
    theta = materialise(add(tvs.base.only_names(tvs.specs), shared, dtype=torch.float32))
    found = {}
    with run.progress.track("features", 2 * len(tvs.tasks), "pool") as bar:
        for task in tvs.tasks:
            both: list[Tensor] = []
            for weights in (theta, tvs.expert(task)):
                outputs = tasks.outputs(weights, task)
                both += [outputs.features, outputs.logits]
                bar.advance(1, task=task)
            found[task] = Seen(*both)
    return found
