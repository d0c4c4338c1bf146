"""MAP: a Pareto front of merges from quadratic surrogates of the tasks' metrics (Li et al., ICLR 2025)."""

from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Literal

import torch
from torch import Tensor
from torch.nn.functional import softplus

from calmerge._errors import MissingExtra, UsageError, did_you_mean
from calmerge._random import uniform
from calmerge._run import Run
from calmerge._signature import Count, Interval, NonNegative, Seed, check, raise_together
from calmerge._task_vectors import TaskVectors
from calmerge._weights import Weights
from calmerge.fitting.scores import scorer
from calmerge.fitting.search import Range, search
from calmerge.methods.task_arithmetic import task_arithmetic
from calmerge.pieces.weigh import weigh
from calmerge.report.traces import FrontPoint, FrontTrace
from calmerge.tasks.base import Tasks

Activation = Literal["identity", "sigmoid", "softplus"]
_OF: Mapping[str, Callable[[Tensor], Tensor]] = {
    "identity": lambda z: z,
    "sigmoid": torch.sigmoid,
    "softplus": softplus,
}


def map_front(
    tvs: TaskVectors,
    *,
    tasks: Tasks,
    preference: Mapping[str, NonNegative] | None = None,
    score: Literal["validation", "expert_kl"] = "validation",
    samples: Annotated[int, Interval(1)] | None = None,
    budget: Count = 1000,
    examples: Count = 256,
    seed: Seed = 0,
    run: Run | None = None,
) -> Weights:
    """The merge that a preference among tasks picks from a front of predicted trade-offs.

    M_t(c) ~ phi(c' A_t c + b_t' c + e_t) for theta_0 + sum_t c_t tau_t, fitted to K random c in [0, 1]^T; NSGA-III on
    the T surrogates gives the front, and argmax of sum_t v_t M_t(c) over it the merge.

    Args:
        tvs: task vectors of T experts.
        tasks: the model, its frozen heads, and the data of the score.
        preference: v by task, those not named 0; all equal when None.
        score: accuracy on the labelled `validation` splits (phi a sigmoid), or without labels the divergence from the
            experts' predictions on the pools (phi a softplus, less is better).
        samples: K; (T + 1)(T + 2), twice the number of unknowns, when None.
        budget: evaluations of the surrogates in the search of the front.
        examples: of each pool, how many `expert_kl` looks at.
        seed: decides the samples, the examples and the search.
        run: progress, and the trace with the front.

    Held in memory: one merged model.

    Raises:
        UsageError: a preference for an unknown task, for none, or fewer samples than unknowns.
        DataError: a split that the score needs is missing.
        MissingExtra: optuna or scipy is not installed.

    >>> import inspect
    >>> inspect.signature(map_front).parameters["budget"].default
    1000

    Source: Li et al., "MAP: Low-compute Model Merging with Amortized Pareto Fronts via Quadratic Approximation",
    ICLR 2025, arXiv 2406.07529; luli-git/MAP (no licence).
    Differences: samples are the one-hot vectors and uniform draws in place of a grid; the front is searched in the
    sampled box [0, 1]^T, not in [-3, 3]^T where surrogates extrapolate; the chosen point is evaluated again.
    """
    options = {"tasks": tasks, "preference": preference, "score": score, "samples": samples, "budget": budget}
    raise_together(check(map_front, options | {"examples": examples, "seed": seed}))
    run, tvs, names = run or Run(), tvs.to(tasks.device), tvs.tasks
    v = preferences(preference, names)
    count = (len(names) + 1) * (len(names) + 2) if samples is None else samples
    if count < unknowns(len(names)):
        raise UsageError(
            f"map_front.samples must be at least {unknowns(len(names))} for {len(names)} tasks, got {count}."
        )
    sign = 1.0 if score == "validation" else -1.0
    scores = scorer(tvs, tasks, score, examples=examples, seed=seed, run=run)

    def measure(c: Tensor) -> list[float]:
        found = scores(_merged(tvs, c))
        return [sign * found[t] for t in names]

    at = torch.cat([torch.eye(len(names)), uniform((count, len(names)), seed, "coefficients")])[:count].double()
    seen = []
    with run.progress.track("MAP", count, "merge") as bar:
        for c in at:
            seen.append(measure(c))
            bar.advance(1)
    activation: Activation = "sigmoid" if score == "validation" else "softplus"
    metrics = torch.tensor(seen, dtype=torch.float64)  # [K, T]
    surrogates = [fit_surrogate(at, m, activation) for m in metrics.T]
    front = surrogate_front([_times(sign, f) for f in surrogates], budget=budget, seed=seed, run=run)
    best = max(range(len(front)), key=lambda i: sum(w * s for w, s in zip(v, front[i][1], strict=True)))
    chosen = torch.tensor(front[best][0], dtype=torch.float64)
    run.trace["map_front"] = FrontTrace(
        tasks=list(names),
        labelled=score == "validation",
        points=[FrontPoint(coefficients=list(c), predicted=[sign * s for s in scores]) for c, scores in front],
        chosen=best,
        measured=measure(chosen),
    )
    return _merged(tvs, chosen)


def unknowns(tasks: int) -> int:
    """How many numbers a quadratic surrogate of that many coefficients has.

    >>> [unknowns(t) for t in (1, 2, 3, 4, 8)]
    [3, 6, 10, 15, 45]
    """
    return (tasks + 1) * (tasks + 2) // 2


def fit_surrogate(at: Tensor, metric: Tensor, activation: Activation) -> Callable[[Tensor], float]:
    """The least-squares fit of phi(c' A c + b' c + e) to a metric at some coefficients [K, T], as a function of c.

    >>> c = torch.tensor([[0.0], [0.5], [1.0]], dtype=torch.float64)
    >>> round(fit_surrogate(c, 1 - c[:, 0] ** 2, "identity")(torch.tensor([0.2])), 6)
    0.96
    """
    try:
        from scipy.optimize import least_squares
    except ImportError:
        raise MissingExtra("scipy", "search") from None
    x, phi = quadratic(at), _OF[activation]
    if activation == "sigmoid":
        start = metric.clamp(1e-3, 1 - 1e-3).logit()
    else:
        start = metric.clamp(min=1e-6).expm1().log() if activation == "softplus" else metric
    theta = torch.linalg.lstsq(x, start[:, None], driver="gelsd").solution[:, 0]
    if activation != "identity":
        residual = lambda p: (phi(x @ torch.from_numpy(p)) - metric).numpy()  # noqa: E731
        theta = torch.from_numpy(least_squares(residual, theta.numpy(), method="lm").x)
    return lambda c: float(phi(quadratic(c[None].double()) @ theta))


def quadratic(c: Tensor) -> Tensor:
    """All products of two coefficients, the coefficients, and 1: [K, T] to [K, (T + 1)(T + 2) / 2].

    >>> quadratic(torch.tensor([[2.0, 3.0]]))
    tensor([[4., 6., 9., 2., 3., 1.]])
    """
    i, j = torch.triu_indices(c.shape[1], c.shape[1])
    return torch.cat([c[:, i] * c[:, j], c, torch.ones_like(c[:, :1])], 1)


def surrogate_front(
    surrogates: Sequence[Callable[[Tensor], float]], *, budget: int, seed: int = 0, run: Run | None = None
) -> list[tuple[tuple[float, ...], tuple[float, ...]]]:
    """Coefficients in [0, 1]^T and values of functions to be made large, where no other found is better in all."""
    space = {f"c{i}": Range(0.0, 1.0) for i in range(len(surrogates))}
    start = [{f"c{i}": float(i == j) for i in range(len(surrogates))} for j in range(len(surrogates))]

    def values(v: Mapping[str, object]) -> list[float]:
        c = torch.tensor(list(v.values()), dtype=torch.float64)
        return [f(c) for f in surrogates]

    quiet = Run(progress=run.progress) if run else None  # quick to do again: no journal
    found = search(
        values, space, strategy="nsga3", budget=budget, seed=seed, start=start[:budget],
        objectives=len(surrogates), run=quiet, label="front",
    )  # fmt: skip
    return [(tuple(float(x) for x in t.values.values()), t.scores or ()) for t in found.front]


def _times(sign: float, f: Callable[[Tensor], float]) -> Callable[[Tensor], float]:
    return lambda c: sign * f(c)


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


def _merged(tvs: TaskVectors, c: Tensor) -> Weights:
    return task_arithmetic(weigh(tvs, weights=dict(zip(tvs.tasks, c.tolist(), strict=True))), scale=1.0)
