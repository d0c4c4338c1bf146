"""Training a router to tell from features which task an input is of."""

from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from calmerge._errors import DataError
from calmerge._random import bernoulli
from calmerge._run import Run
from calmerge._weights import StateDict
from calmerge.fitting.direct import fit_directly
from calmerge.fitting.fit import Watch
from calmerge.fitting.samplers import Pool, shuffled
from calmerge.pieces.router import NeuralRouter, router_logits, router_start
from calmerge.report.traces import FitTrace
from calmerge.tasks.base import Batch


def fit_router(
    features: Mapping[str, Tensor],
    *,
    steps: int,
    lr: float,
    batch: int,
    dropout: float,
    hold_out: float,
    seed: int,
    run: Run | None = None,
    key: str = "",
) -> NeuralRouter:
    """A router trained by cross-entropy on which task's features it is given; its trace is `run.trace["router"]`.

    Means and variances of the batch normalise while training, and after it those of all features learned from.

    Args:
        features: by task, [n, d].
        steps: updates with AdamW, its step size falling to 0 in a straight line.
        lr: the step size at first.
        batch: inputs in each update.
        dropout: share of hidden units that are dropped.
        hold_out: share of every task's features on which the best update is chosen.
        seed: decides start, batches and dropped units.
        run: progress, resumable state, and the trace.
        key: describes where the features come from.

    Raises:
        DataError: a task has too few features to hold some out.
        FitError: a loss is not finite.

    >>> clear = {"a": torch.eye(2)[0].expand(8, 2), "b": torch.eye(2)[1].expand(8, 2)}
    >>> router = fit_router(clear, steps=60, lr=0.01, batch=16, dropout=0.0, hold_out=0.0, seed=0)
    >>> router(torch.eye(2)).argmax(1)
    tensor([0, 1])
    """
    run = run or Run()
    x = torch.cat(list(features.values()))
    learn, held = _pools(features, hold_out, seed)

    def drop(h: Tensor, i: int, step: int) -> Tensor:
        return h * bernoulli(tuple(h.shape), 1 - dropout, seed, "dropout", step, i) / (1 - dropout)

    def loss(p: Mapping[str, Tensor], one: Batch, step: int) -> Tensor:
        assert one.targets is not None
        logits = router_logits(p, x[one.indices], drop=partial(drop, step=step) if dropout else _keep, found={})
        return cross_entropy(logits, one.targets)

    def finished(p: Mapping[str, Tensor]) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        router_logits(p, x[learn.indices], found=found)
        return {n: t.detach().clone() for n, t in {**p, **found}.items()}

    def held_out(p: Mapping[str, Tensor]) -> float:
        assert held.targets is not None
        with torch.no_grad():
            return cross_entropy(router_logits(finished(p), x[held.indices]), held.targets).item()

    fitted = fit_directly(
        router_start(x.shape[1], len(features), seed, "router"),
        loss,
        shuffled({"router": learn}, size=batch, count=1, seed=seed),
        optimizer=partial(torch.optim.AdamW, lr=lr),
        steps=steps,
        schedule=lambda step: 1 - step / steps,
        watch=Watch(held_out, every=max(1, steps // 20), patience=5) if len(held.indices) else None,
        run=run,
        label="router",
        key=key,
    )
    router = NeuralRouter(tuple(features), StateDict(finished(fitted.params)))
    judged = held if len(held.indices) else learn
    assert judged.targets is not None
    right = router(x[judged.indices]).argmax(1).eq(judged.targets).double().mean().item()
    name = "share of held-out inputs routed to their task" if judged is held else "share routed to their task"
    run.trace["router"] = FitTrace(loss=fitted.loss.get("router", []), held_out=fitted.watched, numbers={name: right})
    return router


def _keep(h: Tensor, i: int) -> Tensor:
    return h


def _pools(features: Mapping[str, Tensor], hold_out: float, seed: int) -> tuple[Pool, Pool]:
    """Where the features of all tasks lie behind each other, with their tasks' numbers: to learn from, and held out."""
    learn: list[Pool] = []
    held: list[Pool] = []
    first = 0
    for i, (task, found) in enumerate(features.items()):
        n = len(found)
        pool = Pool(torch.arange(first, first + n), torch.full((n,), i))
        seen, left = pool.split(hold_out, seed, task)
        if not len(seen.indices):
            raise DataError(f"task '{task}': its pool of {n} leaves the router nothing to learn from; give more.")
        learn.append(seen)
        held.append(left)
        first += n
    return _joined(learn), _joined(held)


def _joined(pools: list[Pool]) -> Pool:
    targets = [pool.targets for pool in pools if pool.targets is not None]
    return Pool(torch.cat([pool.indices for pool in pools]), torch.cat(targets))
