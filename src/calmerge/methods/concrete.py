"""Concrete Subspace Learning: Concrete Task Arithmetic and Concrete AdaMerging (Tang et al., 2023)."""

from typing import Annotated, Literal

import torch

from calmerge._run import Run
from calmerge._signature import Count, Interval, Positive, Seed, check, raise_together
from calmerge._task_vectors import TaskVectors, materialise
from calmerge._weights import Weights
from calmerge.fitting.concrete import Draw, Evaluation, final_masks, learn_masks, masked
from calmerge.fitting.objectives import entropy
from calmerge.fitting.samplers import shuffled, whole_pools
from calmerge.methods.adamerging import learned_coefficients
from calmerge.methods.task_arithmetic import task_arithmetic
from calmerge.tasks.base import Batches, Tasks


def concrete_task_arithmetic(
    tvs: TaskVectors,
    *,
    tasks: Tasks,
    scale: Annotated[float, Interval()] = 0.3,
    steps: Annotated[int, Interval(0)] = 2000,
    lr: Positive = 1e-3,
    batch: Count = 16,
    temperature: Positive = 0.5,
    evaluation: Evaluation = "draw",
    seed: Seed = 0,
    order: Batches | None = None,
    run: Run | None = None,
) -> Weights:
    """Task Arithmetic inside a subspace that all experts share, learned so that predictions are sure.

    theta = theta_0 + lambda sum_t m tau_t,  m = sigma((ln(u / (1 - u)) + x) / temperature) / its mean over the tensor,
    u ~ U(0, 1) anew in every update; minimise over x the entropy of the predictions, summed over tasks.

    Args:
        tvs: task vectors of T experts.
        tasks: the model, its frozen heads, and unlabelled pools.
        scale: lambda.
        steps: updates of the mask's logits with Adam, from 0.
        lr: their step size.
        batch: inputs of each task in an update.
        temperature: of the relaxed Bernoulli distribution.
        evaluation: the merge's mask: one more `draw` (the official choice, decided by `seed`), or the `expected` one,
            sigma(x); both scaled to mean 1.
        seed: decides which inputs and masks are drawn.
        order: the batches of every update, instead of random ones.
        run: progress, resumable state, and the trace.

    Held in memory: theta, its gradient, logits, their noise and Adam's two moments: six times the merged tensors.

    Raises:
        DataError: a task of `tvs` has no pool.
        FitError: a loss is not finite.

    >>> import inspect
    >>> inspect.signature(concrete_task_arithmetic).parameters["temperature"].default
    0.5

    Source: Tang, Shen, Luo, Ding, Hu, Du, Tao, "Concrete Subspace Learning based Interference Elimination for
    Multi-task Model Fusion", arXiv 2023 (2312.06173); tanganke/subspace_fusion (no licence file), and
    tanganke/fusion_bench (MIT).
    Differences: adapts on the pool that `tasks` names, where the official code takes the test inputs. Masks are drawn
    from a stream of their own, so that the result does not depend on what was drawn before.
    """
    options = {"scale": scale, "steps": steps, "lr": lr, "batch": batch, "temperature": temperature}
    raise_together(check(concrete_task_arithmetic, {"tasks": tasks, "evaluation": evaluation, "seed": seed, **options}))
    run, tvs = run or Run(), tvs.to(tasks.device)
    fitted = learn_masks(
        tvs,
        ["mask"],
        torch.full((len(tvs.tasks),), scale, device=tasks.device),
        tasks.gradient(entropy, order or _draw(tvs, tasks, batch, seed)),
        Draw(temperature, steps, lr, 1.0, seed),
        inner=False,
        clamp=False,
        run=run,
        label="Concrete",
        key=f"{options}{seed}{tvs.fingerprint}",
    )
    run.trace["concrete_task_arithmetic"] = fitted.trace()
    masks = final_masks(fitted.params, temperature=temperature, evaluation=evaluation, seed=seed)
    return materialise(task_arithmetic(masked(tvs, masks), scale=scale))


def concrete_adamerging(
    tvs: TaskVectors,
    *,
    tasks: Tasks,
    per: Literal["tensor", "task"] = "tensor",
    init: Annotated[float, Interval()] = 0.3,
    clamp: bool = True,
    mask_steps: Annotated[int, Interval(0)] = 1000,
    mask_lr: Positive = 1e-3,
    inner_lr: Positive = 1.0,
    steps: Annotated[int, Interval(0)] = 1000,
    lr: Positive = 1e-3,
    batch: Count = 16,
    temperature: Positive = 0.5,
    evaluation: Evaluation = "draw",
    seed: Seed = 0,
    run: Run | None = None,
) -> Weights:
    """AdaMerging inside a shared subspace: a mask learned over coefficients that each take one crude step, then they.

    Each of `mask_steps` updates: draw m; reset lambda to `init`; one step of Adam (`inner_lr`) on lambda at m fixed;
    one step on the mask's logits at the new lambda and the same m, with fresh inputs. Then one mask is fixed and
    AdaMerging runs for `steps` updates on m tau_t.

    Args:
        tvs: task vectors of T experts.
        tasks: the model, its frozen heads, and unlabelled pools.
        per: one coefficient per expert and tensor ("layer-wise" in the paper), or per expert ("task-wise").
        init: start of every coefficient, in both phases.
        clamp: use coefficients clamped to [0, 1] (the original's default; FusionBench sets it off).
        mask_steps: updates of the mask's logits, from 0.
        mask_lr: their step size.
        inner_lr: step size of the one step that the coefficients take; with 1 it is deliberately crude.
        steps: updates of the coefficients in the second phase; 0 skips it (it can cost accuracy task-wise).
        lr: their step size.
        batch: inputs of each task in an update.
        temperature: of the relaxed Bernoulli distribution.
        evaluation: the fixed mask: one more `draw`, or the `expected` one.
        seed: decides which inputs and masks are drawn.
        run: progress, resumable state, and the trace.

    Held in memory: as for `concrete_task_arithmetic`, and one theta more.

    Raises:
        DataError: a task of `tvs` has no pool.
        FitError: a loss is not finite.

    >>> import inspect
    >>> inspect.signature(concrete_adamerging).parameters["inner_lr"].default
    1.0

    Source: Tang, Shen, Luo, Ding, Hu, Du, Tao, "Concrete Subspace Learning based Interference Elimination for
    Multi-task Model Fusion", arXiv 2023 (2312.06173); tanganke/subspace_fusion (no licence file), and
    tanganke/fusion_bench (MIT).
    Differences: adapts on the pool that `tasks` names. One mask is drawn in an update, as in FusionBench; the original
    draws again at every merge.
    """
    options = {"per": per, "init": init, "clamp": clamp, "mask_steps": mask_steps, "mask_lr": mask_lr}
    more = {"inner_lr": inner_lr, "steps": steps, "lr": lr, "batch": batch, "temperature": temperature, "seed": seed}
    raise_together(check(concrete_adamerging, {"tasks": tasks, "evaluation": evaluation, **options, **more}))
    run, tvs = run or Run(), tvs.to(tasks.device)
    fitted = learn_masks(
        tvs,
        ["mask"],
        torch.full(_shape(tvs, per), init, device=tasks.device),
        tasks.gradient(entropy, _draw(tvs, tasks, batch, seed)),
        Draw(temperature, mask_steps, mask_lr, inner_lr, seed),
        inner=True,
        clamp=clamp,
        run=run,
        label="Concrete",
        key=f"{options}{more}{tvs.fingerprint}",
    )
    masks = final_masks(fitted.params, temperature=temperature, evaluation=evaluation, seed=seed)
    delta = learned_coefficients(
        masked(tvs, masks), tasks, tvs.tasks, per=per, init=init, clamp=clamp, steps=steps, lr=lr, batch=batch,
        batches=1, seed=seed, run=run, label="concrete_adamerging",
    )  # fmt: skip
    return materialise(delta)


def _draw(tvs: TaskVectors, tasks: Tasks, batch: int, seed: int) -> Batches:
    return shuffled(whole_pools(tasks, tvs.tasks), size=batch, count=1, seed=f"{seed} concrete")


def _shape(tvs: TaskVectors, per: str) -> tuple[int, ...]:
    return (len(tvs.tasks), len(tvs)) if per == "tensor" else (len(tvs.tasks),)
