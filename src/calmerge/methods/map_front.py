"""MAP: Pareto fronts of merges from quadratic surrogates of the tasks' metrics (Li et al., ICLR 2025)."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated

import torch
from torch import Tensor

from calmerge._errors import DataError, UsageError, did_you_mean
from calmerge._random import uniform
from calmerge._run import Run
from calmerge._signature import Count, Interval, NonNegative, Seed, check, raise_together
from calmerge._task_vectors import TaskVectors
from calmerge._weights import Weights
from calmerge.fitting.surrogates import MapScore, Metrics, Point, fit_surrogate, refined, unknowns
from calmerge.pieces.blend import blend
from calmerge.report.traces import FrontTrace
from calmerge.tasks.base import Tasks


def map_front(
    tvs: TaskVectors,
    *,
    tasks: Tasks,
    preference: Mapping[str, NonNegative] | None = None,
    front: str | None = None,
    score: MapScore = "validation",
    samples: Annotated[int, Interval(1)] | None = None,
    rounds: Annotated[int, Interval(0)] = 0,
    points: Count = 5,
    budget: Count = 1000,
    examples: Count = 256,
    seed: Seed = 0,
    run: Run | None = None,
) -> Weights:
    """The merge that a preference among tasks picks from a front of predicted trade-offs.

    M_t(c) ~ phi(c' A_t c + b_t' c + e_t) for theta_0 + sum_t c_t tau_t, fitted to K random c in [0, 1]^T; NSGA-III on
    the T surrogates gives the front, and argmax of sum_t v_t M_t(c) over it the merge. With `rounds` this is Bayesian
    MAP: each surrogate is then refined where it errs, by merges that are evaluated on its task alone.

    Args:
        tvs: task vectors of T experts.
        tasks: the model, its frozen heads, and the data of the score.
        preference: v by task, those not named 0; all equal when None.
        front: a folder that an earlier merge of the same base and experts by MAP wrote: its front is taken, and nothing
            is fitted.
        score: accuracy on the labelled `validation` splits (phi a sigmoid), or without labels the divergence from the
            experts' predictions on the pools (phi a softplus, less is better).
        samples: K; (T + 1)(T + 2), twice the number of unknowns, when None.
        rounds: of refinement; 0 is plain MAP.
        points: merges that a round evaluates for each task.
        budget: evaluations of the surrogates in the search of the front.
        examples: of each pool, how many `expert_kl` looks at.
        seed: decides the samples, the examples and the search.
        run: progress, the journal of evaluated merges from which a stopped run goes on, and the trace with the front.

    Held in memory: one merged model.

    Raises:
        UsageError: a preference for an unknown task, for none, fewer samples than unknowns, or a folder without a front
            of these inputs.
        DataError: a split that the score needs is missing.
        FitError: a merge has no finite score.
        MissingExtra: optuna or scipy is not installed.

    >>> import inspect
    >>> inspect.signature(map_front).parameters["budget"].default
    1000

    Source: Li et al., "MAP: Low-compute Model Merging with Amortized Pareto Fronts via Quadratic Approximation",
    ICLR 2025, arXiv 2406.07529; luli-git/MAP (no licence).
    Differences: samples are the one-hot vectors and uniform draws in place of a grid; the front is searched in the
    sampled box [0, 1]^T, not in [-3, 3]^T where surrogates extrapolate; the chosen point is evaluated again. Of the
    rounds, resamples are drawn anew, bins are scored by all points so far, empty bins have the highest score, and the
    last round's points count too (officially none of these).
    """
    options = {"tasks": tasks, "preference": preference, "front": front, "score": score, "samples": samples}
    options |= {"rounds": rounds, "points": points, "budget": budget, "examples": examples, "seed": seed}
    raise_together(check(map_front, options))
    run, tvs, names = run or Run(), tvs.to(tasks.device), tvs.tasks
    v = preferences(preference, names)
    count = (len(names) + 1) * (len(names) + 2) if samples is None else samples
    if count < unknowns(len(names)):
        raise UsageError(
            f"map_front.samples must be at least {unknowns(len(names))} for {len(names)} tasks, got {count}."
        )
    saved = None if front is None else saved_front(front, tvs, score)
    metrics = Metrics(tvs, tasks, score, examples, seed, run)
    found = saved or metrics.front(_fitted(metrics, count, rounds, points, seed), budget)
    best = max(range(len(found)), key=lambda i: sum(w * s for w, s in zip(v, found[i][1], strict=True)))
    chosen = torch.tensor(found[best][0], dtype=torch.float64)
    run.trace["map_front"] = metrics.traced(names, found, best, metrics.at(chosen[None], names, "chosen")[0].tolist())
    return blend(tvs, chosen.float())


def _fitted(metrics: Metrics, count: int, rounds: int, points: int, seed: int) -> list[Callable[[Tensor], float]]:
    """The surrogate of every task."""
    names = metrics.tasks
    at = torch.cat([torch.eye(len(names)), uniform((count, len(names)), seed, "coefficients")])[:count].double()
    surrogates = []
    for task, metric in zip(names, metrics.at(at, names, "samples").T, strict=True):
        c, m = at, metric
        for i in range(rounds):
            new = refined(c, m, fit_surrogate(c, m, metrics.activation), points, seed, task, i)
            c, m = torch.cat([c, new]), torch.cat([m, metrics.at(new, (task,), f"{task} round {i + 1}")[:, 0]])
        surrogates.append(fit_surrogate(c, m, metrics.activation))
    return surrogates


def saved_front(folder: str | Path, tvs: TaskVectors, score: MapScore) -> list[Point]:
    """The front that an earlier merge of the same base and experts wrote.

    Raises:
        UsageError: there is none, or it is one of other inputs or another score.

    >>> from calmerge import task_vectors
    >>> saved_front("nowhere", task_vectors({"w": torch.zeros(1)}, {"a": {"w": torch.ones(1)}}), "validation")
    Traceback (most recent call last):
    calmerge._errors.UsageError: map_front.front: 'nowhere' holds no front; name a folder that a merge by MAP wrote.
    """
    from calmerge._save import input_hashes
    from calmerge._writer import MANIFEST

    trace = front_of(folder)
    if trace is None:
        raise UsageError(f"map_front.front: '{folder}' holds no front; name a folder that a merge by MAP wrote.")
    if list(tvs.tasks) != trace.tasks:
        raise UsageError(
            f"map_front.front: the front in '{folder}' is one of {', '.join(trace.tasks)}, and these experts are "
            f"{', '.join(tvs.tasks)}."
        )
    if trace.labelled != (score == "validation"):
        before = "validation" if trace.labelled else "expert_kl"
        raise UsageError(f"map_front.front: the front in '{folder}' was found with score {before}, got {score}.")
    try:
        inputs = json.loads((Path(folder) / MANIFEST).read_text())["inputs"]
    except (OSError, ValueError, KeyError):
        inputs = None
    now = input_hashes(tvs)
    if inputs != now:
        other = next((who for who in now if not inputs or inputs.get(who) != now[who]), "an expert")
        raise UsageError(f"map_front.front: the front in '{folder}' is one of other checkpoints ({other} differs).")
    sign = 1.0 if trace.labelled else -1.0
    return [(tuple(p.coefficients), tuple(sign * m for m in p.predicted)) for p in trace.points]


def front_of(folder: str | Path) -> FrontTrace | None:
    """The front in the report of a merged folder, if there is one.

    >>> front_of("nowhere") is None
    True
    """
    from calmerge.report.results import load

    try:
        report = load(Path(folder) / "report.json")
    except DataError:
        return None
    return next((row.trace for row in report.rows if isinstance(row.trace, FrontTrace)), None)


def preferences(given: Mapping[str, float] | None, names: Sequence[str]) -> list[float]:
    """A weight for each task, in their order: those given, 0 for the others; all equal when None.

    Raises:
        UsageError: an unknown task, or no weight above 0.

    >>> preferences({"dtd": 2.0}, ["cars", "dtd"]), preferences(None, ["cars", "dtd"])
    ([0.0, 2.0], [1.0, 1.0])
    """
    for task in given or ():
        if task not in names:
            raise UsageError(f"preference: no expert '{task}'. {did_you_mean(task, names)}")
    if given is not None and not sum(given.values()) > 0:
        raise UsageError("preference: give at least one task a weight above 0.")
    return [1.0 if given is None else given.get(task, 0.0) for task in names]
