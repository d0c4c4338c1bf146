"""ProDistill: layer by layer, a merge whose hidden states are those of the experts (Xu et al., ICML 2025)."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Annotated, Literal, NamedTuple

import torch
from torch import Tensor

from calmerge._random import permutation
from calmerge._run import Run
from calmerge._signature import Count, Interval, Positive, Seed, check, raise_together
from calmerge._task_vectors import TaskVectors, materialise
from calmerge._weights import StateDict, Weights
from calmerge.fitting.calibrate import chosen
from calmerge.fitting.fit import fit
from calmerge.fitting.parametrise import Parametrisation, element_coefficients, layer_coefficients
from calmerge.methods.task_arithmetic import task_arithmetic
from calmerge.report.traces import FitTrace
from calmerge.tasks.base import Gradient, Tasks
from calmerge.tasks.blocks import Block, Call, blocks_of, call_of, in_order, run_block
from calmerge.tasks.taps import OpenModel, open_model


class Example(NamedTuple):
    """One batch of a task: what the merged block is called with, and what the expert's block gives."""

    task: str
    call: Call
    target: Tensor


def prodistill(
    tvs: TaskVectors,
    *,
    tasks: Tasks,
    per: Literal["element", "tensor"] = "element",
    init: Annotated[float, Interval()] = 0.3,
    examples: Count = 64,
    epochs: Annotated[int, Interval(0)] = 100,
    lr: Positive = 0.01,
    batch: Count = 32,
    seed: Seed = 0,
    run: Run | None = None,
) -> Weights:
    """Blocks merged one after the other, each so that it gives what the experts' own blocks give.

    theta_l = theta_0 + sum_t A_t tau_t, elementwise, for block l = 1 .. L in turn; minimise over A
    sum_t sum_x | block(x0; theta_l) - block_t(x1) |^2, with x0 behind the merged blocks before l and x1 behind those of
    expert t. Tensors outside the blocks are Task Arithmetic at `init`.

    Args:
        tvs: task vectors of T experts.
        tasks: a model that shows its module, and unlabelled pools.
        per: one coefficient for each element and task, or for each tensor and task.
        init: start of every coefficient.
        examples: of each pool.
        epochs: passes over these for every block, with Adam.
        lr: its step size.
        batch: examples in a batch; tasks are not mixed within one.
        seed: decides which examples, and their order.
        run: progress, resumable state of every block, and the trace.

    Held in memory: one model, the hidden states of all examples at one block, and T coefficients for every entry of it.

    Raises:
        DataError: a task has no pool, or a block with merged tensors is never called.
        FitError: a loss is not finite.

    >>> import inspect
    >>> inspect.signature(prodistill).parameters["examples"].default
    64

    Source: Xu, Li, Zhang, "Scalable Model Merging with Progressive Layer-wise Distillation", ICML 2025
    (arXiv 2502.12706); public code without a licence file.
    Differences: batches hold one task each, where the official code mixes them; the loss is the mean over a batch's
    entries instead of their sum, which Adam's steps do not see.
    """
    options = {"per": per, "init": init, "examples": examples, "epochs": epochs, "lr": lr, "batch": batch, "seed": seed}
    raise_together(check(prodistill, {"tasks": tasks, **options}))
    run, tvs = run or Run(), tvs.to(tasks.device)
    model = open_model(tasks, "its blocks are run one at a time")
    delta = dict(materialise(task_arithmetic(tvs, scale=init)))
    inputs = {t: torch.split(chosen(tasks, t, examples, seed), batch) for t in tvs.tasks}
    found = blocks_of(model, tvs.base, tvs)
    blocks = in_order(found, model, tasks, tvs.tasks[0], _theta(tvs, delta))
    losses: list[float] = []
    for block in blocks:
        seen = _examples(block, model, tvs, tasks, delta, inputs)
        names = list(block.tensors.values())
        own = tvs.only_names(names)
        nothing = StateDict({n: torch.zeros_like(delta[n]) for n in names})
        shape = element_coefficients(nothing, own) if per == "element" else layer_coefficients(nothing, own)
        fitted = fit(
            shape.merged,
            {n: torch.full_like(p, init) for n, p in shape.start.items()},
            _gradient(block, model, tasks, seen, seed),
            base=tvs.base,
            optimizer=partial(torch.optim.Adam, lr=lr),
            steps=epochs * len(seen),
            run=run,
            label=f"ProDistill {block.path}",
            key=f"{options}{block.path}{tvs.fingerprint}",
        )
        delta |= dict(materialise(Parametrisation(shape.start, shape.merged).merged(fitted.params)))
        losses += [sum(step) for step in zip(*fitted.loss.values(), strict=False)]
    run.trace["prodistill"] = FitTrace(loss=losses)
    return StateDict(delta)


def _theta(tvs: TaskVectors, delta: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {n: tvs.base.read(n).float() + delta[n] for n in tvs}


def _examples(
    block: Block,
    model: OpenModel,
    tvs: TaskVectors,
    tasks: Tasks,
    delta: Mapping[str, Tensor],
    inputs: Mapping[str, Sequence[Tensor]],
) -> list[Example]:
    """For every batch, the block's inputs behind the merged blocks, and its outputs in the expert."""
    merged, examples = _theta(tvs, delta), []
    for task in tvs.tasks:
        expert = _theta(tvs, dict(tvs.of(task)))
        for indices in inputs[task]:
            batch, _ = tasks.split(task, "pool").batch(indices)
            target = call_of(block, model, tasks, task, expert, batch).output
            examples.append(Example(task, call_of(block, model, tasks, task, merged, batch), target))
    return examples


def _gradient(block: Block, model: OpenModel, tasks: Tasks, examples: Sequence[Example], seed: int) -> Gradient:
    """The gradient of one batch's squared distance, batches in a new order in every epoch."""

    def at(theta: Mapping[str, Tensor], step: int) -> dict[str, float]:
        order = permutation(len(examples), seed, block.path, step // len(examples))
        task, call, target = examples[int(order[step % len(examples)])]
        with tasks.precision():
            output = run_block(block, model, theta, call)
        loss = (output.float() - target.float()).square().mean()
        loss.backward()  # type: ignore[no-untyped-call]
        return {task: loss.item()}

    return at
