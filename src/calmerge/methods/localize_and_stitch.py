"""Localize-and-Stitch (He et al., TMLR 2025)."""

import json
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from calmerge._run import Run
from calmerge._signature import (
    Count,
    Fraction,
    KeepFraction,
    NonNegative,
    Positive,
    Seed,
    check,
    raise_together,
)
from calmerge._task_vectors import TaskVectors, materialise
from calmerge._weights import Weights
from calmerge.fitting.masks import Regulariser, Search, consensus_mask
from calmerge.fitting.samplers import shuffled
from calmerge.methods.calm import credible_pools
from calmerge.pieces.blend import summed
from calmerge.pieces.mask import pack
from calmerge.pieces.stitch import stitch
from calmerge.pieces.trim import from_rank
from calmerge.report.traces import CalmTrace
from calmerge.tasks.base import Batches, Tasks


def localize_and_stitch(
    tvs: TaskVectors,
    *,
    tasks: Tasks,
    steps: Count = 10,
    lr: Positive | Literal["auto"] = "auto",
    share: KeepFraction = 0.01,
    batch: Count = 128,
    batches: Count = 8,
    regulariser: Regulariser = "binarise",
    alpha: NonNegative = 1.0,
    top: Fraction = 1e-5,
    logit: Positive = 5.0,
    frozen: Sequence[str] = (),
    seed: Seed = 0,
    order: Batches | None = None,
    run: Run | None = None,
) -> Weights:
    """The few entries of each task vector that bring its expert back, found by a mask a task, and put together.

    For every task on its own: one logit S per entry, `steps` updates at theta_0 + sigma(S) tau_t,
        S <- S - lr G tau_t sigma'(S) + alpha s(S) sigma'(S),    gamma_t = [S > 0];
    then stitched: theta = theta_0 + sum_t gamma_t tau_t / sum_j gamma_j, so that entries that several tasks want are
    averaged.

    Args:
        tvs: task vectors of T experts.
        tasks: the model, its frozen heads, and unlabelled pools.
        steps: updates a task ("epochs").
        lr: step size; `auto` as in `calm`, whose mask this is.
        share: of all entries, what `auto` aims to take.
        batch: examples per batch.
        batches: batches per update.
        regulariser: `binarise` pushes logits away from 0 (the official code), `l1` pushes all down (the paper).
        alpha: its weight.
        top: entries that start on: the largest |tau_t|, strictly above the floor(top * N)-th.
        logit: start of these, and the negative of all others.
        frozen: shell patterns of tensors that keep the base's values, as embeddings do in the official language code.
        seed: decides which examples are drawn.
        order: the batches of every update, instead of random ones.
        run: progress, resumable state, and the trace.

    Held in memory: four times the merged tensors, and one bit per entry and task.

    Raises:
        DataError: a task has no pool.
        FitError: a loss is not finite.

    >>> import inspect
    >>> inspect.signature(localize_and_stitch).parameters["steps"].default
    10

    Source: He, Hu, Lin, Zhang, Zhao, "Localize-and-Stitch: Efficient Model Merging via Sparse Task Arithmetic",
    TMLR 2025; uiuctml/Localize-and-Stitch (MIT).
    Differences: the official code takes 64 labelled examples of each class of the training split; here it is the
    unlabelled pool with the expert's predictions as labels. The step size is found automatically.
    """
    search = Search(lr, share, steps, batch, batches, regulariser, alpha, top, logit, tuple(frozen), "copy", seed)
    given = {name: value for name, value in search._asdict().items() if name != "rest"}
    raise_together(check(localize_and_stitch, {"tasks": tasks} | given))
    run = run or Run()
    tvs = tvs.to(tasks.device)
    pools = credible_pools(tvs, tasks, ratio=1.0, sampling="all", run=run)
    key = json.dumps(search) + tvs.fingerprint
    masks: dict[str, dict[str, Tensor]] = {}
    trace = CalmTrace(start=[], stages=[])
    for task in tvs.tasks:
        tau = tvs.of(task)
        nothing = tau.map(lambda w, site: torch.zeros_like(w))
        draw = order or shuffled({task: pools[task].pool}, size=batch, count=batches, seed=f"{seed} {task}")
        _, mask, record = consensus_mask(
            nothing, tau, tvs.base, tasks, [task], draw, search, run=run.within(task), key=key
        )
        masks[task] = {name: pack(m) for name, m in mask.items()}
        trace.stages.append(record)
    run.trace["localize_and_stitch"] = trace
    return materialise(stitch(tvs, masks))


def localize_and_stitch_dataless(tvs: TaskVectors, *, keep: KeepFraction = 0.05) -> Weights:
    """The largest entries of each task vector, put together: Localize-and-Stitch without data.

    gamma_t = [|tau_t| >= its floor(K N)-th largest value];  theta = theta_0 + sum_t gamma_t tau_t / sum_j gamma_j.

    Args:
        tvs: task vectors of T experts.
        keep: K, fraction of entries kept per task, counted over the whole model, in (0, 1]; at least one entry is kept.
            Entries equal to the threshold are.

    >>> tau = {"a": {"w": torch.tensor([3.0, 1.0, 0.5, 0.0])}, "b": {"w": torch.tensor([1.0, 0.0, -4.0, 0.5])}}
    >>> localize_and_stitch_dataless(task_vectors({"w": torch.zeros(4)}, tau), keep=0.25)["w"]
    tensor([ 3.,  0., -4.,  0.])

    Source: He, Hu, Lin, Zhang, Zhao, "Localize-and-Stitch: Efficient Model Merging via Sparse Task Arithmetic",
    TMLR 2025; uiuctml/Localize-and-Stitch (MIT).
    Differences: the official code keeps what is strictly above the threshold, one entry less; its vision script takes
    10 %. An entry that is exactly 0 counts as not wanted.
    """
    raise_together(check(localize_and_stitch_dataless, {"keep": keep}))
    largest = from_rank(tvs, tvs.numel - max(1, int(keep * tvs.numel)) + 1)
    return largest.reduce(lambda tau, site: summed(tau) / (tau != 0).sum(0).clamp(min=1))
