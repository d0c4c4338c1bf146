"""CALM: Consensus-Aware Localized Merging (Yan et al., ICML 2025)."""

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Literal

from calmerge._errors import DataError, UsageError, did_you_mean
from calmerge._run import Run
from calmerge._signature import (
    Count,
    Fraction,
    Interval,
    KeepFraction,
    NonNegative,
    Positive,
    Seed,
    check,
    raise_together,
)
from calmerge._task_vectors import Merge, TaskVectors, materialise
from calmerge._weights import Weights
from calmerge.fitting.fit import empty, write
from calmerge.fitting.masks import Regulariser, Search, consensus_mask
from calmerge.fitting.samplers import Credible, Sampling, credible, shuffled
from calmerge.fitting.targets import expert_logits
from calmerge.methods.task_arithmetic import task_arithmetic
from calmerge.pieces.mask import save_masks
from calmerge.report.traces import CalmTrace, Coverage
from calmerge.tasks.base import Batches, Tasks

log = logging.getLogger("calmerge")


def calm(
    tvs: TaskVectors,
    *,
    tasks: Tasks,
    groups: Sequence[Sequence[str]] | None = None,
    sequential: Annotated[int, Interval(0)] = 2,
    inner: Merge | None = None,
    sampling: Sampling = "class_balanced",
    ratio: KeepFraction = 0.9,
    lr: Positive | Literal["auto"] = "auto",
    share: KeepFraction = 0.3,
    steps: Count = 100,
    batch: Count = 128,
    batches: Count = 2,
    regulariser: Regulariser = "binarise",
    alpha: NonNegative = 1.0,
    top: Fraction = 1e-5,
    logit: Positive = 5.0,
    frozen: Sequence[str] = (),
    rest: Literal["average", "copy"] = "average",
    seed: Seed = 0,
    masks: Path | None = None,
    order: Callable[[int], Batches] | None = None,
    run: Run | None = None,
) -> Weights:
    """Most experts by one cheap sum, then a few one at a time through masks that all tasks seen so far agree on.

    (a) Sampling: of every pool the examples of lowest entropy under the task's own expert, class by class, with the
    expert's predictions as labels. (b) Start: tau_u = 0.3 * sum of the first group's task vectors (or `inner`).
    (c) For every further expert k, with d = tau_k - tau_u and one logit m per entry, `steps` updates of

        theta = theta_0 + (1 - sigma(m)) tau_u + sigma(m) tau_k
        m <- m - lr G d sigma'(m) + alpha s(m) sigma'(m)

    G the gradient summed over the batches of all tasks seen so far, s(m) = 1 if m > 0 else -1 (`binarise`) or -1
    (`l1`); then the binary mask b = [m > 0] decides, tau_u <- (1 - b) tau_u + b tau_k.

    Args:
        tvs: task vectors of T experts.
        tasks: the model, its frozen heads, and unlabelled pools.
        groups: the tasks of the start, then one group of one task for each stage, e.g. `[[a, b, c], [d], [e]]`. A first
            group of two is itself merged by a mask (between tau_1 and tau_2) unless `inner` is given.
        sequential: without `groups`, how many tasks get a stage of their own. Those are chosen whose pseudo-labels the
            start merge of *all* experts misses most often on their credible pools; the one it misses most comes last.
        inner: the merge that the start is made with; Task Arithmetic at 0.3 when None.
        sampling: `class_balanced`, `plain` (lowest entropy of all), or `all`.
        ratio: share of the pool (of each predicted class) that is kept.
        lr: step size. The published 1e7 belongs to the scale of CLIP's gradients. `auto` sets it at the start of every
            stage from F = -lr G d, the force on an entry: so large that the share `share` of all entries would be taken
            within the planned updates if the first gradient stayed as it is.
        share: see `lr`.
        steps: updates of each stage.
        batch: examples per batch.
        batches: batches per task and update.
        regulariser: `binarise` pushes logits away from 0 (the official code), `l1` pushes all down (the paper).
        alpha: its weight; it is not multiplied by lr.
        top: entries that start on: the largest |tau_k| of the model, strictly above its floor(top * N)-th.
        logit: start of these, and the negative of all others.
        frozen: shell patterns of tensors that have no mask; tensors which no task's loss reaches are added to them.
        rest: what becomes of them: 0.5 (tau_u + tau_k) (`average`), or tau_u stays (`copy`).
        seed: with the task, the stage and the update it decides which examples are drawn.
        masks: a folder where the binary masks are written, one file a stage, one bit an entry (see `load_masks`).
        order: the batches of every update by stage, instead of random ones.
        run: progress, resumable state of every stage, and the trace.

    Held in memory: theta, G, tau_u and the logits, four times the merged tensors, whatever the number of experts.

    Raises:
        UsageError: groups that do not fit the experts, or a later group of more than one.
        DataError: a task has no credible example.
        FitError: a loss is not finite.

    >>> import inspect
    >>> inspect.signature(calm).parameters["ratio"].default
    0.9

    Source: Yan, Xu, Jia, Zhang et al., "CALM: Consensus-Aware Localized Merging for Multi-Task Learning", ICML 2025,
    PMLR 267; yankd22/CALM (no licence file: written from a description of the method alone).
    Differences: the official code takes the pool from the test split; here it is the pool that `tasks` names. Its
    regulariser is the default, the paper's L1 an option. `lr="auto"`, `share`, `inner` on a first group of two, and the
    automatic choice of sequential tasks are ours. A batch is a function of the seed; the official code sets none.
    """
    search = Search(lr, share, steps, batch, batches, regulariser, alpha, top, logit, tuple(frozen), rest, seed)
    options = {"tasks": tasks, "sequential": sequential, "sampling": sampling, "ratio": ratio}
    raise_together(check(calm, options | search._asdict()))
    run = run or Run()
    tvs = tvs.to(tasks.device)
    pools = credible_pools(tvs, tasks, ratio=ratio, sampling=sampling, run=run)
    plan = _checked(groups, tvs) if groups else automatic_groups(tvs, tasks, pools, sequential, inner=inner)
    first, rest_of = _start(plan, paired=groups is not None and inner is None)
    tau_u: Weights = materialise((inner or task_arithmetic)(tvs.only(first)) if len(first) > 1 else tvs.of(first[0]))
    key = json.dumps([plan, search, sampling, ratio]) + tvs.fingerprint + tau_u.fingerprint
    trace = CalmTrace(start=first, stages=[], samplers=_coverage(pools, tasks))
    for stage, task in enumerate(rest_of):
        seen = [*first, *rest_of[: stage + 1]]
        draw = (
            order(stage)
            if order
            else shuffled({t: pools[t].pool for t in seen}, size=batch, count=batches, seed=f"{seed} stage {stage}")
        )
        tau_u, mask, record = consensus_mask(
            tau_u, tvs.of(task), tvs.base, tasks, seen, draw, search, run=run.within(f"stage-{stage + 1}"), key=key
        )
        trace.stages.append(record)
        if masks:
            masks.mkdir(parents=True, exist_ok=True)
            save_masks(masks / f"{stage + 1}-{task}.safetensors", mask)
    run.trace["calm"] = trace
    return tau_u


def credible_pools(
    tvs: TaskVectors, tasks: Tasks, *, ratio: float = 0.9, sampling: Sampling = "class_balanced", run: Run | None = None
) -> dict[str, Credible]:
    """By task, the credible examples of its pool, from the logits of the task's own expert.

    With a state folder the logits are kept in it, so that they are computed once.

    Raises:
        DataError: a task keeps no example at all.
    """
    run = run or Run()
    pools = {}
    with run.progress.track("pseudo-labels", len(tvs.tasks), "task") as bar:
        for task in tvs.tasks:
            pools[task] = credible(expert_logits(tvs, tasks, task, run), ratio=ratio, sampling=sampling)
            if not len(pools[task].indices):
                raise DataError(
                    f"task '{task}': no class keeps an example at ratio {ratio}, of a pool of "
                    f"{len(tasks.split(task, 'pool'))}. Give more unlabelled examples, or a ratio nearer to 1."
                )
            for c, (predicted, _) in enumerate(pools[task].coverage.tolist()):
                if not predicted:
                    log.warning(
                        "task '%s': its expert predicts class %s for no example of the pool.",
                        task,
                        _class(tasks, task, c),
                    )
            bar.advance(1, task=task)
    return pools


def automatic_groups(
    tvs: TaskVectors,
    tasks: Tasks,
    pools: Mapping[str, Credible],
    sequential: int,
    *,
    inner: Merge | None = None,
) -> list[list[str]]:
    """The start and the sequential tasks: those whose pseudo-labels a start merge of all experts misses most often.

    Agreement is counted on the credible pools, so that no label is used; ties keep the experts' order.

    Raises:
        UsageError: fewer than one task would be left for the start.
    """
    if sequential >= len(tvs.tasks):
        raise UsageError(
            f"sequential must be less than the number of experts ({len(tvs.tasks)}), got {sequential}: "
            "the start needs one."
        )
    if not sequential:
        return [list(tvs.tasks)]
    theta = empty(tvs, tasks.device)
    write(theta, tvs.base, (inner or task_arithmetic)(tvs))
    agreement = {}
    for task in tvs.tasks:
        predicted = tasks.logits(theta, task).argmax(1)[pools[task].indices]
        agreement[task] = (predicted == pools[task].labels).double().mean().item()
    chosen = sorted(tvs.tasks, key=lambda t: -agreement[t])[-sequential:]
    return [[t for t in tvs.tasks if t not in chosen], *([t] for t in chosen)]


def _checked(groups: Sequence[Sequence[str]], tvs: TaskVectors) -> list[list[str]]:
    named = [task for group in groups for task in group]
    for task in named:
        if task not in tvs.tasks:
            raise UsageError(f"groups: no expert '{task}'. {did_you_mean(task, tvs.tasks)}")
        if named.count(task) > 1:
            raise UsageError(f"groups: '{task}' is named twice.")
    left = [task for task in tvs.tasks if task not in named]
    if left:
        raise UsageError(f"groups: {', '.join(left)} stand in no group; leave the expert out, or add it.")
    if not groups[0] or any(len(group) != 1 for group in groups[1:]):
        raise UsageError(
            "groups: the first holds the start's tasks, every later one exactly one task; "
            f"got {list(map(list, groups))}. Further members of a later group would never enter the merge."
        )
    return [list(group) for group in groups]


def _start(plan: list[list[str]], *, paired: bool) -> tuple[list[str], list[str]]:
    """The tasks that are merged at once, and those that get a mask, in order."""
    later = [task for group in plan[1:] for task in group]
    if paired and len(plan[0]) == 2:
        return plan[0][:1], plan[0][1:] + later
    return plan[0], later


def _coverage(pools: Mapping[str, Credible], tasks: Tasks) -> dict[str, dict[str, Coverage]]:
    return {
        task: {
            _class(tasks, task, c): Coverage(kept=kept, predicted=predicted)
            for c, (predicted, kept) in enumerate(pool.coverage.tolist())
        }
        for task, pool in pools.items()
    }


def _class(tasks: Tasks, task: str, c: int) -> str:
    names = tasks[task].classes
    return names[c] if c < len(names) else str(c)
