"""FW-Merging: Frank-Wolfe steps towards the checkpoints that help (Chen et al., ICCV 2025)."""

from collections.abc import Mapping, Sequence
from typing import Annotated, Literal

import torch
from torch import Tensor

from calmerge._errors import UsageError, did_you_mean
from calmerge._run import Run
from calmerge._signature import Count, Interval, Positive, Seed, check, raise_together
from calmerge._task_vectors import Merge, TaskVectors, materialise
from calmerge._weights import Site, StateDict, Weights, add
from calmerge.fitting.fit import empty, write
from calmerge.fitting.objectives import entropy, pseudo_label
from calmerge.fitting.samplers import Pool, shuffled, whole_pools
from calmerge.fitting.targets import expert_pools
from calmerge.methods.adamerging import learned_coefficients
from calmerge.methods.task_arithmetic import task_arithmetic
from calmerge.report.traces import FitTrace
from calmerge.tasks.base import Batches, Tasks

Picks = Mapping[str, Sequence[int]]
"""By tensor, the vertices picked, as positions among the experts; the number of experts stands for the start."""


def frank_wolfe(
    tvs: TaskVectors,
    *,
    tasks: Tasks,
    inner: Merge | None = None,
    start: Merge | None = None,
    on: Sequence[str] | None = None,
    objective: Literal["pseudo_label", "entropy"] = "pseudo_label",
    per: Literal["tensor", "task"] = "task",
    centred: bool = False,
    steps: Annotated[int, Interval(0)] = 10,
    step_size: Positive = 0.1,
    samples: Count = 100,
    seed: Seed = 0,
    order: Batches | None = None,
    run: Run | None = None,
) -> Weights:
    """A model moved, step by step, towards the checkpoint that most lowers the loss at the moment.

    theta_0 = the start's merge; for i = 0, 1, ...: g = gradient of the loss at theta;
    s = argmin over the experts and the start's model of sum_l cos(g(l), s(l)), s(l) the full tensor of the checkpoint;
    theta <- theta + gamma inner({s - theta}),  gamma = 2 / (i + 2) * step_size.

    Args:
        tvs: task vectors of a pool of experts, some of which may be irrelevant.
        tasks: the model, its frozen heads, and unlabelled pools.
        inner: the merge that makes a step of the one vector s - theta; Task Arithmetic at 0.3 when None.
        start: the merge it starts from, which joins the pool; `inner` of all experts when None.
        on: the tasks whose loss counts; all when None.
        objective: `pseudo_label`, cross-entropy with the experts' predictions, or `entropy`.
        per: the vertex is one checkpoint for all tensors ("task-wise"), or one for each tensor ("layer-wise").
        centred: compare directions s - theta instead of full tensors, whose cosines the common base dominates.
        steps: Frank-Wolfe iterations.
        step_size: factor of the schedule gamma.
        samples: examples of each task for one gradient.
        seed: decides which examples are drawn.
        order: the batches of every gradient, instead of random ones.
        run: progress and the trace.

    Held in memory: theta, its gradient, the start, and one tensor of one expert, whatever their number.

    Raises:
        UsageError: `on` names no expert.
        DataError: a task has no pool.
        FitError: a loss is not finite.

    >>> import inspect
    >>> inspect.signature(frank_wolfe).parameters["step_size"].default
    0.1

    Source: Chen et al., "FW-Merging: Scaling Model Merging with Frank-Wolfe Optimization", ICCV 2025,
    arXiv 2503.12649; hmarkc/FW-Merging (MIT).
    Differences: a cosine with a zero norm is 0, where the official code gets NaN and loses the candidate; the language
    code's quirk of pulling a tensor to 0 where no cosine is negative is left out; labels are the experts' predictions,
    and the model is in evaluation mode.
    """
    options = {"objective": objective, "per": per, "centred": centred, "steps": steps, "step_size": step_size}
    raise_together(check(frank_wolfe, {"tasks": tasks, "samples": samples, "seed": seed, **options}))
    run, tvs, on = run or Run(), tvs.to(tasks.device), _known(on, tvs)
    step = inner or task_arithmetic
    first = materialise((start or step)(tvs))
    draw = order or _draw(tvs, tasks, on, objective, samples, seed, run)
    gradient = tasks.gradient(entropy if objective == "entropy" else pseudo_label, draw)
    now, losses = first, []
    with run.progress.track("Frank-Wolfe", steps, "step") as bar:
        for i in range(steps):
            theta = empty(tvs, tasks.device)
            write(theta, tvs.base, now)
            losses.append(gradient(theta, i))
            picks = _in_turn([_scores(theta, tvs, first, now, centred)], per)
            gamma = 2 / (i + 2) * step_size
            moved = step(_vertices(tvs, first, now, picks))
            now = materialise(now.map(lambda d, m, site, gamma=gamma: d + gamma * m, moved))
            bar.advance(1, loss=sum(losses[-1].values()))
    run.trace["frank_wolfe"] = FitTrace(
        loss=[sum(found.values()) for found in losses], per_task={t: [found[t] for found in losses] for t in on}
    )
    return now


def frank_wolfe_soft(
    tvs: TaskVectors,
    *,
    tasks: Tasks,
    on: Sequence[str] | None = None,
    objective: Literal["pseudo_label", "entropy"] = "pseudo_label",
    per: Literal["tensor", "task"] = "tensor",
    centred: bool = False,
    steps: Annotated[int, Interval(0)] = 10,
    samples: Count = 100,
    updates: Annotated[int, Interval(0)] = 500,
    lr: Positive = 1e-3,
    batch: Count = 16,
    seed: Seed = 0,
    run: Run | None = None,
) -> Weights:
    """A model moved, step by step, by learned amounts towards the checkpoints that the tasks each find best.

    From the base; in every iteration each task of `on` in turn picks, by its own gradient at the same theta, the best
    checkpoint not picked yet; then theta <- theta + sum_k lambda_k(l) (s_k(l) - theta(l)) with coefficients of least
    entropy (AdaMerging's fit), which start at 0.3 in the first iteration and at 1e-8 afterwards.

    Args:
        tvs: task vectors of a pool of experts.
        tasks: the model, its frozen heads, and unlabelled pools.
        on: the tasks whose loss counts; all when None.
        objective: of the gradients that pick; as for `frank_wolfe`.
        per: vertices for whole models or for each tensor.
        centred: as for `frank_wolfe`.
        steps: Frank-Wolfe iterations.
        samples: examples of each task for one gradient.
        updates: updates of the coefficients in every iteration.
        lr: their step size.
        batch: examples of each task in an update.
        seed: decides which examples are drawn.
        run: progress and the trace.

    Held in memory: theta, its gradient, and one tensor of one expert.

    Raises:
        UsageError: `on` names no expert.
        DataError: a task has no pool.
        FitError: a loss is not finite.

    >>> import inspect
    >>> inspect.signature(frank_wolfe_soft).parameters["updates"].default
    500

    Source: Chen et al., "FW-Merging: Scaling Model Merging with Frank-Wolfe Optimization", ICCV 2025,
    arXiv 2503.12649; the soft variant as in tanganke/fusion_bench (MIT).
    """
    options = {"objective": objective, "per": per, "centred": centred, "steps": steps, "samples": samples, "lr": lr}
    more = {"tasks": tasks, "updates": updates, "batch": batch, "seed": seed}
    raise_together(check(frank_wolfe_soft, options | more))
    run, tvs, on = run or Run(), tvs.to(tasks.device), _known(on, tvs)
    now: StateDict = materialise(tvs.reduce(lambda tau, site: torch.zeros_like(tau[0])))
    draw = _draw(tvs, tasks, on, objective, samples, seed, run)
    loss = entropy if objective == "entropy" else pseudo_label
    for i in range(steps):
        scores = []
        for drawn in draw(i):
            theta = empty(tvs, tasks.device)
            write(theta, tvs.base, now)
            tasks.gradient(loss, lambda step, drawn=drawn: iter([drawn]))(theta, i)  # type: ignore[misc]
            scores.append(_scores(theta, tvs, None, now, centred))
        vectors = _vertices(tvs, None, now, _in_turn(scores, per)).over(add(tvs.base, now, dtype=torch.float32))
        moved = learned_coefficients(
            vectors,
            tasks,
            on,
            per="tensor",
            init=0.3 if i == 0 else 1e-8,
            clamp=False,
            steps=updates,
            lr=lr,
            batch=batch,
            batches=1,
            seed=f"{seed} iteration {i}",
            run=run.within(f"iteration-{i + 1}"),
            label="frank_wolfe_soft",
        )
        now = materialise(now.map(lambda d, m, site: d + m, moved))
    return now


def _known(on: Sequence[str] | None, tvs: TaskVectors) -> list[str]:
    for task in on or ():
        if task not in tvs.tasks:
            raise UsageError(f"on: no expert '{task}'. {did_you_mean(task, tvs.tasks)}")
    return list(on or tvs.tasks)


def _draw(
    tvs: TaskVectors, tasks: Tasks, on: Sequence[str], objective: str, samples: int, seed: int, run: Run
) -> Batches:
    if objective == "entropy":
        pools = whole_pools(tasks, on)
    else:
        soft = expert_pools(tvs.only(on), tasks, run=run)
        pools = {t: Pool(p.indices, p.targets.argmax(1)) for t, p in soft.items() if p.targets is not None}
    return shuffled(pools, size=samples, count=1, seed=seed)


def _scores(
    theta: Mapping[str, Tensor], tvs: TaskVectors, first: Weights | None, now: Weights, centred: bool
) -> dict[str, Tensor]:
    """By tensor, the cosine of the gradient with every candidate, the experts and last the start; 0 for a zero norm."""
    cosines: dict[str, list[Tensor]] = {name: [] for name in theta}
    for candidate in [*(tvs.of(task) for task in tvs.tasks), *([] if first is None else [first])]:
        for name, tensor in theta.items():
            vector = candidate.read(name)
            vector = vector - now.read(name) if centred else vector + tvs.base.read(name).float()
            g = torch.zeros_like(tensor) if tensor.grad is None else tensor.grad
            norms = vector.double().norm() * g.double().norm()
            dot = (vector.double() * g.double()).sum()
            cosines[name].append(torch.where(norms > 0, dot / norms.clamp(min=1e-300), 0.0))
    for tensor in theta.values():
        tensor.grad = None
    return {name: torch.stack(found) for name, found in cosines.items()}


def _in_turn(scores: Sequence[Mapping[str, Tensor]], per: str) -> dict[str, list[int]]:
    """By tensor, one candidate for each of `scores` in turn, the lowest not picked before; as many as there are."""
    picks: dict[str, list[int]] = {name: [] for name in scores[0]}
    for found in scores:
        whole = torch.stack(list(found.values())).sum(0)
        for name, picked in picks.items():
            score = (found[name] if per == "tensor" else whole).clone()
            if len(picked) < len(score):
                score[picked] = torch.inf
                picked.append(int(score.argmin()))
    return picks


def _vertices(tvs: TaskVectors, first: Weights | None, now: Weights, picks: Picks) -> TaskVectors:
    """The vectors from the present model to the picked vertices, as task vectors over it."""
    some = tvs.only(tvs.tasks[: len(next(iter(picks.values())))])
    candidates = [*(tvs.of(task) for task in tvs.tasks), *([] if first is None else [first])]

    def towards(_: Tensor, current: Tensor, site: Site) -> Tensor:
        return torch.stack([candidates[i].read(site.name) - current for i in picks[site.name]])

    return some.transform(towards, now, elementwise=False)
