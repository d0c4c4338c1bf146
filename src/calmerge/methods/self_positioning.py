"""Self Positioning: coefficients of embedding models found on a small contrastive probe set (Li et al., 2024)."""

from functools import partial
from typing import Annotated, Literal

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from calmerge._errors import DataError
from calmerge._run import Run
from calmerge._signature import Count, Fraction, Interval, Positive, Seed, check, raise_together
from calmerge._task_vectors import TaskVectors, materialise
from calmerge._weights import Weights
from calmerge.fitting.fit import Params, Watch, fit
from calmerge.fitting.samplers import shuffled, whole_pools
from calmerge.pieces.blend import blend
from calmerge.report.traces import Coefficients, FitTrace
from calmerge.tasks.base import Batch, Tasks


def self_positioning(
    tvs: TaskVectors,
    *,
    tasks: Tasks,
    mode: Literal["simplex", "simplex_scaled", "free"] = "simplex",
    steps: Annotated[int, Interval(0)] = 200,
    lr: Positive = 0.05,
    batch: Count = 32,
    hold_out: Fraction = 0.2,
    seed: Seed = 0,
    run: Run | None = None,
) -> Weights:
    """An embedding model between its experts, where a small balanced probe set of pairs is told apart best.

    theta(w) = theta_0 + lambda sum_t a_t tau_t, a = softmax(w); minimise over w the mean over tasks of
    -log( exp(cos(q, p+) / temperature) / sum over the batch's candidates exp(cos(q, p) / temperature) ).

    Args:
        tvs: task vectors of T experts of one encoder.
        tasks: an `EmbeddingModel` and, as the pool of every task, its probe `Pairs`. Batches are of one task each, as
            many of one as of another, so that no task's amount of data decides.
        mode: `simplex`, lambda = 1; `simplex_scaled`, lambda is learned too, from 1; `free`, a is unconstrained, from
            1/T each.
        steps: updates with Adam; without any the experts' average comes out.
        lr: its step size.
        batch: pairs in a batch; the loss depends on it, as the batch's other pairs are the negatives.
        hold_out: share of the probe set on which the best update is chosen; 0 takes the last.
        seed: decides which pairs are drawn.
        run: progress, resumable state, and the trace.

    Held in memory: theta, its gradient, and one tensor of the T task vectors at a time.

    Raises:
        DataError: a task of `tvs` has no pool.
        FitError: a loss is not finite.

    >>> import inspect
    >>> inspect.signature(self_positioning).parameters["mode"].default
    'simplex'

    Source: Li, Nie, Zhang, Long, Zhang, Xie, "Improving General Text Embedding Model: Tackling Task Conflict and Data
    Imbalance through Model Merging", arXiv 2024 (2410.15035); no official repository found.
    Differences: a reconstruction from the abstract and public summaries: the interpolation space, the gradient search
    and the balanced contrastive probe set are theirs; parametrisation, step size and number of updates are ours.
    """
    options = {"mode": mode, "steps": steps, "lr": lr, "batch": batch, "hold_out": hold_out, "seed": seed}
    raise_together(check(self_positioning, {"tasks": tasks, **options}))
    run, tvs = run or Run(), tvs.to(tasks.device)
    n = len(tvs.tasks)
    start = {"w": torch.full((n,), 1 / n if mode == "free" else 0.0)}
    if mode == "simplex_scaled":
        start["scale"] = torch.ones(())

    def position(params: Params) -> Tensor:
        if mode == "free":
            return params["w"]
        return params["w"].softmax(0) * params.get("scale", torch.ones(()))

    pools = {t: pool.split(hold_out, seed, t) for t, pool in whole_pools(tasks, tvs.tasks).items()}
    held = [Batch(t, part) for t, (_, out) in pools.items() for part in torch.split(out.indices, batch)]
    learn = shuffled({t: seen for t, (seen, _) in pools.items()}, size=batch, count=1, fresh=True, seed=seed)
    fitted = fit(
        lambda params: blend(tvs, lambda name: position(params)),  # its own graph for every tensor
        start,
        tasks.gradient(in_batch, learn, scale=dict.fromkeys(tvs.tasks, 1 / n)),
        base=tvs.base,
        optimizer=partial(torch.optim.Adam, lr=lr),
        steps=steps,
        watch=Watch(lambda theta: sum(tasks.loss(in_batch, theta, held).values()), 10, 5) if hold_out else None,
        run=run,
        label="self_positioning",
        key=f"{options}{tvs.fingerprint}",
    )
    found = position(fitted.params)
    run.trace["self_positioning"] = FitTrace(
        loss=[total / n for total in fitted.total],
        per_task=fitted.loss,
        held_out=fitted.watched,
        coefficients=Coefficients(tasks=list(tvs.tasks), tensors=["all tensors"], values=[found.tolist()]),
    )
    return materialise(blend(tvs, found))


def in_batch(logits: Tensor, targets: Tensor | None = None) -> Tensor:
    """The contrastive loss of similarities [n, candidates] whose right answers stand on the diagonal (InfoNCE).

    Raises:
        DataError: there are fewer candidates than queries, as class scores have.

    >>> in_batch(torch.zeros(2, 4))
    tensor(1.3863)
    """
    if logits.shape[1] < len(logits):
        raise DataError(
            f"the model gives {logits.shape[1]} scores for each of {len(logits)} inputs; a contrastive loss needs the "
            "similarities of all pairs of a batch. Use an EmbeddingModel with pools of Pairs."
        )
    return cross_entropy(logits, torch.arange(len(logits), device=logits.device))
