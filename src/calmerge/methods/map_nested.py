"""Nested MAP: two models at a time (Li et al., ICLR 2025)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Annotated

import torch
from torch import Tensor

from calmerge._errors import UsageError
from calmerge._random import uniform
from calmerge._run import Run
from calmerge._signature import Count, Interval, NonNegative, Seed, check, raise_together
from calmerge._task_vectors import TaskVectors
from calmerge._weights import Weights
from calmerge.fitting.surrogates import MapScore, Metrics, fit_surrogate
from calmerge.methods.map_front import preferences
from calmerge.pieces.blend import blend
from calmerge.report.traces import FrontTrace
from calmerge.tasks.base import Tasks


def map_nested(
    tvs: TaskVectors,
    *,
    tasks: Tasks,
    preference: Mapping[str, NonNegative] | None = None,
    score: MapScore = "validation",
    samples: Annotated[int, Interval(6)] = 20,
    budget: Count = 1000,
    examples: Count = 256,
    seed: Seed = 0,
    run: Run | None = None,
) -> Weights:
    """The merge that comes of merging two models at a time by MAP, those first whose metrics are closest.

    Each step fits the two quadratic surrogates of the pair, whose metrics are means over the tasks that were merged
    into each, weighted by v, and takes from their front the point which the sums of v pick. T - 1 steps: for many
    tasks, where one surrogate of all coefficients has too many unknowns.

    Args:
        tvs: task vectors of T experts.
        tasks: the model, its frozen heads, and the data of the score.
        preference: v by task, those not named 0; all equal when None.
        score: as in `map_front`.
        samples: merges that a step evaluates.
        budget: evaluations of the surrogates in the search of a front.
        examples: of each pool, how many `expert_kl` looks at.
        seed: decides the samples, the examples and the search.
        run: progress, the journal of evaluated merges from which a stopped run goes on, and the trace with the last
            front.

    Held in memory: one merged model.

    Raises:
        UsageError: a preference for an unknown task or for none; a single expert.
        DataError: a split that the score needs is missing.
        FitError: a merge has no finite score.
        MissingExtra: optuna or scipy is not installed.

    >>> import inspect
    >>> inspect.signature(map_nested).parameters["samples"].default
    20

    Source: Li et al., "MAP: Low-compute Model Merging with Amortized Pareto Fronts via Quadratic Approximation",
    ICLR 2025, arXiv 2406.07529; luli-git/MAP (no licence).
    Differences: a merged model is a sum of task vectors and is kept as its coefficients, not written; all metrics are
    fractions (officially those of experts are in per cent, so that merged models look far from them); tasks without
    preference count alike where all of a model's tasks are.
    """
    options = {"tasks": tasks, "preference": preference, "score": score, "samples": samples, "budget": budget}
    raise_together(check(map_nested, options | {"examples": examples, "seed": seed}))
    run, tvs, names = run or Run(), tvs.to(tasks.device), tvs.tasks
    if len(names) < 2:
        raise UsageError(f"map_nested merges two models at a time, got one ({', '.join(names)}).")
    v = dict(zip(names, preferences(preference, names), strict=True))
    metrics = Metrics(tvs, tasks, score, examples, seed, run)
    nodes = []
    for task, c in zip(names, torch.eye(len(names), dtype=torch.float64), strict=True):
        nodes.append(Node(c, (task,), float(metrics.at(c[None], (task,), f"{task} alone"))))
    while len(nodes) > 1:
        a, b = min(combinations(nodes, 2), key=lambda pair: abs(pair[0].metric - pair[1].metric))
        at = torch.cat([torch.eye(2), uniform((samples, 2), seed, *a.tasks, *b.tasks)])[:samples].double()
        joined, trace = _joined(metrics, a, b, at, v, budget)
        nodes = [node for node in nodes if node is not a and node is not b] + [joined]
    run.trace["map_nested"] = trace
    return blend(tvs, nodes[0].coefficients.float())


@dataclass(frozen=True)
class Node:
    """A model among those that are merged two at a time: its coefficients [T], its tasks and its metric."""

    coefficients: Tensor
    tasks: tuple[str, ...]
    metric: float


def _joined(
    metrics: Metrics, a: Node, b: Node, at: Tensor, v: Mapping[str, float], budget: int
) -> tuple[Node, FrontTrace]:
    """Two models merged into one, and the front that it was taken from."""
    tasks, name = (*a.tasks, *b.tasks), "+".join((*a.tasks, *b.tasks))
    basis = torch.stack([a.coefficients, b.coefficients])
    seen = _means(metrics.at(at @ basis, tasks, name), (a, b), v)
    front = metrics.front([fit_surrogate(at, m, metrics.activation) for m in seen.T], budget)
    sums = [sum(v[t] for t in node.tasks) for node in (a, b)]
    best = max(range(len(front)), key=lambda i: sum(w * s for w, s in zip(sums, front[i][1], strict=True)))
    coefficients = torch.tensor(front[best][0], dtype=torch.float64) @ basis
    found = metrics.at(coefficients[None], tasks, f"{name} merged")
    joined = Node(coefficients, tasks, float(found[0] @ _weights(tasks, v)))
    labels = ["+".join(node.tasks) for node in (a, b)]
    return joined, metrics.traced(labels, front, best, _means(found, (a, b), v)[0].tolist())


def _means(metric: Tensor, nodes: Sequence[Node], v: Mapping[str, float]) -> Tensor:
    """[K, tasks of all nodes] to [K, nodes]."""
    parts = metric.split([len(node.tasks) for node in nodes], 1)  # type: ignore[no-untyped-call]
    return torch.stack([part @ _weights(node.tasks, v) for part, node in zip(parts, nodes, strict=True)], 1)


def _weights(tasks: Sequence[str], v: Mapping[str, float]) -> Tensor:
    """The preferences of some tasks, which sum to 1; equal ones where none of them is preferred."""
    weights = torch.tensor([v[t] for t in tasks], dtype=torch.float64)
    weights = weights if weights.sum() > 0 else torch.ones_like(weights)
    return weights / weights.sum()
