"""Fitting one delta to all tasks at once: a parametrisation, an objective with targets, and label-free stopping."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import NamedTuple

import torch

from calmerge._errors import DataError
from calmerge._run import Run
from calmerge._task_vectors import TaskVectors, materialise
from calmerge._weights import StateDict
from calmerge.fitting.fit import Optimizer, Watch, cosine, empty, fit, write
from calmerge.fitting.parametrise import Parametrisation
from calmerge.fitting.samplers import Pool, shuffled
from calmerge.tasks.base import Batch, Objective, Tasks


class Schedule(NamedTuple):
    """How long and how fast a joint fit goes; methods have arguments of the same names.

    Attributes:
        steps: updates, the step size falling to 0 along a cosine.
        lr: the step size at first.
        batch: examples of each task in every update.
        hold_out: share of every pool on which the best update is chosen; 0 takes the last.
        seed: with the task and the update it decides which examples are drawn.
        balance: divide every task's loss by its value at the start.
    """

    steps: int
    lr: float
    batch: int
    hold_out: float = 0.0
    seed: int = 0
    balance: bool = False


def fit_jointly(
    parametrisation: Parametrisation,
    objective: Objective,
    pools: Mapping[str, Pool],
    schedule: Schedule,
    *,
    tvs: TaskVectors,
    tasks: Tasks,
    features: bool = False,
    optimizer: Callable[..., Optimizer] = torch.optim.Adam,
    run: Run | None = None,
    label: str,
    key: str,
) -> StateDict:
    """The delta after a fit to all tasks together, in memory; the curves stand in `run.trace[label]`.

    Args:
        parametrisation: what moves.
        objective: what is good.
        pools: by task, examples and targets.
        schedule: how long and how fast.
        tvs: gives base, tasks and names.
        tasks: the model and its data.
        features: whether the objective takes `Outputs`.
        optimizer: from the parameters and `lr` to what moves them.
        run: progress and resumable state.
        label: names the progress bar and the state's file.
        key: describes everything that decides the result.

    Raises:
        DataError: a pool is too small to hold anything out.
        FitError: a loss is not finite.
    """
    run = run or Run()
    parts = {task: pool.split(schedule.hold_out, schedule.seed, task) for task, pool in pools.items()}
    for task, (seen, _) in parts.items():
        if not len(seen.indices):
            raise DataError(
                f"task '{task}': its pool of {len(pools[task].indices)} leaves nothing to learn from once "
                f"{schedule.hold_out:g} of it is held out. Give more unlabelled examples, or hold_out: 0."
            )
    scale = _scale(parametrisation, objective, pools, schedule, tvs, tasks, features) if schedule.balance else None
    learn = {task: part[0] for task, part in parts.items()}
    held = {task: part[1] for task, part in parts.items()}
    fitted = fit(
        parametrisation.merged,
        parametrisation.start,
        tasks.gradient(
            objective,
            shuffled(learn, size=schedule.batch, count=1, seed=schedule.seed),
            features=features,
            scale=scale,
        ),
        base=tvs.base,
        optimizer=partial(optimizer, lr=schedule.lr),
        steps=schedule.steps,
        schedule=cosine(schedule.steps),
        watch=_watch(objective, held, tasks, features, scale, schedule.steps) if schedule.hold_out else None,
        run=run,
        label=label,
        key=key,
    )
    run.trace[label] = fitted.trace()
    return materialise(parametrisation.merged(fitted.params))


def _watch(
    objective: Objective,
    held: Mapping[str, Pool],
    tasks: Tasks,
    features: bool,
    scale: Mapping[str, float] | None,
    steps: int,
) -> Watch:
    """The held-out loss summed over tasks, on the scale that is learned on."""
    batches = _all(held, tasks.batch)

    def loss(theta: Mapping[str, torch.Tensor]) -> float:
        found = tasks.loss(objective, theta, batches, features=features)
        return sum(value * (scale[task] if scale else 1.0) for task, value in found.items())

    return Watch(loss, every=max(1, steps // 10), patience=3)


def _scale(
    parametrisation: Parametrisation,
    objective: Objective,
    pools: Mapping[str, Pool],
    schedule: Schedule,
    tvs: TaskVectors,
    tasks: Tasks,
    features: bool,
) -> dict[str, float]:
    """1 / the loss of each task at the start, on one batch, never above 1e3."""
    delta = parametrisation.merged(parametrisation.start)
    theta = empty(delta, tasks.device)
    write(theta, tvs.base, delta)
    first = shuffled(pools, size=4 * schedule.batch, count=1, seed=schedule.seed)(0)
    return {
        task: 1 / max(value, 1e-3) for task, value in tasks.loss(objective, theta, first, features=features).items()
    }


def _all(pools: Mapping[str, Pool], size: int) -> list[Batch]:
    batches = []
    for task, pool in pools.items():
        for i in range(0, len(pool.indices), size):
            targets = None if pool.targets is None else pool.targets[i : i + size]
            batches.append(Batch(task, pool.indices[i : i + size], targets))
    return batches
