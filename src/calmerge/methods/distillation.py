"""Plain distillation of the experts into a merged model: every weight that an expert moved is free."""

from typing import Annotated

from calmerge._run import Run
from calmerge._signature import Count, Fraction, Interval, Positive, Seed, check, raise_together
from calmerge._task_vectors import Merge, TaskVectors, materialise
from calmerge._weights import Weights
from calmerge.fitting.joint import Schedule, fit_jointly
from calmerge.fitting.objectives import expert_kl
from calmerge.fitting.parametrise import moved, span
from calmerge.fitting.targets import expert_pools
from calmerge.methods.average import average
from calmerge.tasks.base import Tasks


def distillation(
    tvs: TaskVectors,
    *,
    tasks: Tasks,
    inner: Merge | None = None,
    steps: Annotated[int, Interval(0)] = 300,
    lr: Positive = 1e-4,
    batch: Count = 16,
    hold_out: Fraction = 0.0,
    seed: Seed = 0,
    run: Run | None = None,
) -> Weights:
    """A merge trained on until its predictions are those of every task's own expert: the baseline no paper prints.

    minimise  sum_t 4 KL(softmax(z_t(x) / 2) || softmax(z(x) / 2))  over the weights that some expert moved, on
    unlabelled x of every task, from theta_0 + inner(tau).

    Args:
        tvs: task vectors of T experts.
        tasks: the model, its frozen heads, and unlabelled pools.
        inner: the merge it starts from; averaging when None.
        steps: updates with Adam; its step size falls to 0 along a cosine.
        lr: the step size at first.
        batch: inputs of every task in each update.
        hold_out: share of every pool on which, without labels, the best update is chosen; 0 takes the last.
        seed: with the task and the update it decides which inputs are drawn.
        run: progress, resumable state, and the trace.

    Held in memory: theta, its gradient, the start, which entries may move, the change and Adam's two
    moments: seven times the merged tensors.

    Raises:
        DataError: a task of `tvs` has no pool, or one too small for `hold_out`.
        FitError: a loss is not finite.

    >>> import inspect
    >>> inspect.signature(distillation).parameters["batch"].default
    16

    Source: Hinton, Vinyals, Dean, "Distilling the Knowledge in a Neural Network", arXiv 2015, with T teachers and
    one student that starts as their merge.
    """
    options = {"steps": steps, "lr": lr, "batch": batch, "hold_out": hold_out, "seed": seed}
    raise_together(check(distillation, {"tasks": tasks, **options}))
    tvs = tvs.to(tasks.device)
    start = materialise((inner or average)(tvs))
    return fit_jointly(
        span(start, materialise(moved(tvs))),
        expert_kl,
        expert_pools(tvs, tasks, run=run),
        Schedule(steps, lr, batch, hold_out, seed),
        tvs=tvs,
        tasks=tasks,
        run=run,
        label="distillation",
        key=f"{options}{tvs.fingerprint}{start.fingerprint}",
    )
