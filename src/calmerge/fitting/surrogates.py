"""Quadratic surrogates of metrics as functions of merging coefficients: fitted, refined, and searched for a front."""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import softplus

from calmerge._errors import FitError, MissingExtra
from calmerge._random import permutation, uniform
from calmerge._run import Run
from calmerge._task_vectors import TaskVectors
from calmerge.fitting.scores import scorer
from calmerge.fitting.search import Range, search
from calmerge.pieces.blend import blend
from calmerge.report.traces import FrontPoint, FrontTrace
from calmerge.tasks.base import Tasks

Activation = Literal["identity", "sigmoid", "softplus"]
MapScore = Literal["validation", "expert_kl"]
Point = tuple[tuple[float, ...], tuple[float, ...]]
"""Coefficients, and what is predicted for them, larger better."""
_OF: Mapping[str, Callable[[Tensor], Tensor]] = {
    "identity": lambda z: z,
    "sigmoid": torch.sigmoid,
    "softplus": softplus,
}
_RESAMPLES = 30
_SHARPNESS = 0.07  # of the distribution over bins


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
) -> list[Point]:
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


def refined(at: Tensor, metric: Tensor, f: Callable[[Tensor], float], count: int, *key: object) -> Tensor:
    """`count` further coefficients [count, T], more of them in directions in which a surrogate errs.

    Coefficients are a direction (T - 1 angles, each in 4 bins where T < 4, else in 2) and a length. A bin's score is
    the mean squared residual of its points, and half the deviation of that mean over 30 resamples that leave out a
    fifth; a bin without points has the highest. Bins are drawn from softmax(score / 0.07), angles evenly within,
    lengths from 0.2 to 0.8.

    Args:
        at: coefficients that were evaluated, [K, T].
        metric: what was found there, [K].
        f: its surrogate.
        count: how many to draw.
        key: names the draw.

    >>> at, metric = torch.eye(2, dtype=torch.float64), torch.tensor([1.0, 0.0])
    >>> new = refined(at, metric, lambda c: 0.0, 50, "seed")
    >>> bool((new[:, 1] > 2.42 * new[:, 0]).any())  # near the second axis the surrogate is right
    False
    """
    tasks = at.shape[1]
    parts = 4 if tasks < 4 else 2
    residual = torch.tensor([f(c) for c in at], dtype=torch.float64) - metric.double()
    bins: dict[tuple[int, ...], list[float]] = {}
    for angles, r in zip(directions(at), residual.tolist(), strict=True):
        bins.setdefault(tuple(min(parts - 1, int(a / (math.pi / 2) * parts)) for a in angles.tolist()), []).append(
            r * r
        )
    known = {
        where: _uncertainty(torch.tensor(found, dtype=torch.float64), *key, where) for where, found in bins.items()
    }
    every = list(itertools.product(range(parts), repeat=tasks - 1))
    scores = torch.tensor([known.get(where, max(known.values())) for where in every], dtype=torch.float64)
    up_to = (scores / _SHARPNESS).softmax(0).cumsum(0)
    draws = uniform((count, tasks + 1), *key, "refined").double()
    chosen = torch.searchsorted(up_to, draws[:, 0] * up_to[-1]).clamp(max=len(every) - 1)
    low = torch.tensor(every, dtype=torch.float64).reshape(len(every), tasks - 1)[chosen]
    angles = (low + draws[:, 1:tasks]) / parts * (math.pi / 2)
    return along(angles, 0.2 + 0.6 * draws[:, tasks])


def _uncertainty(squares: Tensor, *key: object) -> float:
    kept = max(1, round(0.8 * len(squares)))
    means = [squares[permutation(len(squares), *key, i)[:kept]].mean() for i in range(_RESAMPLES)]
    return float(squares.mean() + 0.5 * torch.stack(means).std(correction=0))


def directions(c: Tensor) -> Tensor:
    """The angles of coefficients that are not negative, [K, T - 1], each from 0 to a quarter turn.

    >>> directions(torch.tensor([[1.0, 0.0], [0.0, 2.0], [1.0, 1.0]]))
    tensor([[0.0000],
            [1.5708],
            [0.7854]])
    """
    rest = c.square().flip(1).cumsum(1).flip(1).sqrt()  # the length of what is left from each coefficient on
    return torch.atan2(rest[:, 1:], c[:, :-1])


def along(angles: Tensor, length: Tensor) -> Tensor:
    """The coefficients with these angles and lengths: what `directions` undoes.

    >>> along(torch.tensor([[0.0], [0.7854]]), torch.tensor([1.0, 2.0]))
    tensor([[1.0000, 0.0000],
            [1.4142, 1.4142]])
    """
    ones = torch.ones_like(angles[:, :1])
    before = torch.cat([ones, angles.sin().cumprod(1)], 1)
    return length[:, None] * before * torch.cat([angles.cos(), ones], 1)


class Metrics:
    """Metrics of merges theta_0 + sum_t c_t tau_t by their coefficients.

    Args:
        tvs: task vectors of T experts.
        tasks: the model, its frozen heads, and the data of the score.
        score: accuracies on validation splits, or divergences from the experts' predictions, of which less is better.
        examples: of each pool, how many a divergence looks at.
        seed: decides which.
        run: progress, and the folder of the journal.
    """

    def __init__(self, tvs: TaskVectors, tasks: Tasks, score: MapScore, examples: int, seed: int, run: Run) -> None:
        self._tvs, self._run, self._seed, self.tasks = tvs, run, seed, tvs.tasks
        self.sign = 1.0 if score == "validation" else -1.0
        self.activation: Literal["sigmoid", "softplus"] = "sigmoid" if score == "validation" else "softplus"
        self._scores = scorer(tvs, tasks, score, examples=examples, seed=seed, run=run)
        self._key = f"{score} {examples} {tvs.fingerprint}"

    def at(self, coefficients: Tensor, tasks: Sequence[str], label: str) -> Tensor:
        """[K, tasks], float64, for coefficients [K, T]; each is written down as it is found."""
        names = [f"c{i}" for i in range(coefficients.shape[1])]
        points = [dict(zip(names, c, strict=True)) for c in coefficients.tolist()]

        def told(values: Mapping[str, object]) -> list[float]:
            c = torch.tensor([values[name] for name in names], dtype=torch.float64)
            found = self._scores(blend(self._tvs, c.float()), tasks)
            return [found[t] for t in tasks]

        highest = max(1.0, float(coefficients.max()))
        found = search(
            told, dict.fromkeys(names, Range(0.0, highest)), strategy="random", budget=len(points), seed=self._seed,
            start=points, objectives=len(tasks), run=self._run, label=f"MAP {label}", key=self._key,
        )  # fmt: skip
        failed = next((t for t in found.trials if t.scores is None), None)
        if failed:
            raise FitError(f"MAP: the merge with coefficients {list(failed.values.values())} has no finite score.")
        return self.sign * torch.tensor([t.scores for t in found.trials], dtype=torch.float64)

    def front(self, surrogates: Sequence[Callable[[Tensor], float]], budget: int) -> list[Point]:
        """Of surrogates of these metrics, as `surrogate_front`."""
        larger_better = [_times(self.sign, f) for f in surrogates]
        return surrogate_front(larger_better, budget=budget, seed=self._seed, run=self._run)

    def traced(
        self, names: Sequence[str], front: Sequence[Point], chosen: int, measured: Sequence[float]
    ) -> FrontTrace:
        """A front for the report."""
        points = [FrontPoint(coefficients=list(c), predicted=[self.sign * s for s in told]) for c, told in front]
        return FrontTrace(
            tasks=list(names), labelled=self.sign > 0, points=points, chosen=chosen, measured=list(measured)
        )


def _times(sign: float, f: Callable[[Tensor], float]) -> Callable[[Tensor], float]:
    return lambda c: sign * f(c)
