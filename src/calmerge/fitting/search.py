"""The one search: every method that tries settings and looks at a score is a call of `search`."""

import itertools
import json
import logging
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any, Literal, get_args

from calmerge._errors import FitError, MissingExtra, UsageError, did_you_mean
from calmerge._run import Run

Strategy = Literal["grid", "random", "tpe", "gp", "cmaes", "nsga2", "nsga3"]
Value = float | int | str | bool
Score = Callable[[Mapping[str, Value]], float | Sequence[float]]
"""From values by name to what shall be large: one number, or one for each of several objectives."""


@dataclass(frozen=True)
class Range:
    """Numbers from `low` to `high`, both included.

    Args:
        low: the least.
        high: the largest.
        log: spread evenly over the logarithms.
        whole: whole numbers only.
    """

    low: float
    high: float
    log: bool = False
    whole: bool = False

    def __post_init__(self) -> None:
        if not -float("inf") < self.low < self.high < float("inf"):
            raise UsageError(f"a range must rise from one finite number to another, got {self.low} to {self.high}.")
        if self.log and self.low <= 0:
            raise UsageError(f"a range with log must start above 0, got {self.low}.")

    def points(self, count: int) -> list[Value]:
        """`count` numbers evenly from end to end; fewer where there are not so many whole ones.

        >>> Range(0, 1).points(3), Range(1, 100, log=True).points(3), Range(1, 2, whole=True).points(9)
        ([0.0, 0.5, 1.0], [1.0, 10.0, 100.0], [1, 2])
        """
        shares = [i / (count - 1) for i in range(count)] if count > 1 else [0.5]
        if self.log:
            found = [self.low * (self.high / self.low) ** s for s in shares]
        else:
            found = [self.low + s * (self.high - self.low) for s in shares]
        return list(dict.fromkeys(round(v) for v in found)) if self.whole else list(map(float, found))


@dataclass(frozen=True)
class Choice:
    """One of several values."""

    values: tuple[Value, ...]

    def __post_init__(self) -> None:
        if len(set(self.values)) < max(1, len(self.values)):
            raise UsageError(f"a choice needs different values, got {list(self.values)}.")


Space = Mapping[str, Range | Choice]


@dataclass(frozen=True)
class Trial:
    """What was tried and how it did; `scores` is None where the score could not be told."""

    values: Mapping[str, Value]
    scores: tuple[float, ...] | None
    seconds: float


@dataclass(frozen=True)
class Found:
    """All trials of a search, in turn.

    >>> found = Found([Trial({"x": x}, scores, 0.0) for x, scores in enumerate([(0.5, 0.1), (0.4, 0.4), (0.3, 0.3)])])
    >>> found.best.values, [trial.values for trial in found.front]
    ({'x': 1}, [{'x': 0}, {'x': 1}])
    """

    trials: list[Trial] = field(default_factory=list)

    @property
    def best(self) -> Trial:
        """The trial with the highest score, the first of equal ones; with several objectives, the highest mean."""
        done = [t for t in self.trials if t.scores is not None]
        return max(done, key=lambda t: sum(t.scores or ()) / len(t.scores or (1,)))

    @property
    def front(self) -> list[Trial]:
        """The trials that no other is better than: at least as good in all objectives, and better in one."""
        done = [t for t in self.trials if t.scores is not None]
        keep = undominated([t.scores or () for t in done])
        return [done[i] for i in keep]


def undominated(points: Sequence[Sequence[float]]) -> list[int]:
    """Positions of the points that no other dominates (larger is better); of equal points the first.

    >>> undominated([(1, 0), (0, 1), (0, 0), (1, 0)])
    [0, 1]
    """

    def beats(p: Sequence[float], q: Sequence[float]) -> bool:
        return all(a >= b for a, b in zip(p, q, strict=True)) and tuple(p) != tuple(q)

    first = {tuple(p): i for i, p in reversed(list(enumerate(points)))}
    return [i for i, p in enumerate(points) if first[tuple(p)] == i and not any(beats(q, p) for q in points)]


def search(
    score: Score,
    space: Space,
    *,
    strategy: Strategy = "tpe",
    budget: int = 30,
    seed: int = 0,
    start: Sequence[Mapping[str, Value]] = (),
    objectives: int = 1,
    run: Run | None = None,
    label: str = "search",
    key: str = "",
) -> Found:
    """Values from `space` that make `score` large, found in `budget` trials.

    Every trial is written to a journal in the run's folder as soon as it is done. A stopped search is run again from
    its first trial with the scores of the journal in place of the work, so that it ends as if it had not been stopped.

    Args:
        score: from values by name to a number, or to several; FitError and NaN count as a failed trial.
        space: ranges and choices by name.
        strategy: `grid` (as fine as the budget allows), `random`, `tpe` (Bayesian, any space), `gp` (Bayesian by a
            Gaussian process, few numbers), `cmaes` (numbers; choices are drawn), `nsga2` or `nsga3` (several
            objectives).
        budget: number of trials.
        seed: decides what is tried.
        start: values tried first; names that are missing are drawn.
        objectives: how many numbers `score` gives.
        run: progress, and the folder of the journal.
        label: names the progress bar and the journal.
        key: describes everything else that decides the scores; a journal with another key is refused.

    Raises:
        UsageError: an empty space, a start outside of it, a grid that does not fit the budget, a strategy for one
            objective given several, or a journal of another search.
        FitError: all trials failed.
        MissingExtra: optuna is not installed.

    >>> found = search(lambda v: -(v["x"] - 0.5) ** 2, {"x": Range(0, 1)}, strategy="grid", budget=5)
    >>> found.best.values, len(found.trials)
    ({'x': 0.5}, 5)

    Source: samplers of Akiba et al., "Optuna: A Next-generation Hyperparameter Optimization Framework", KDD 2019,
    arXiv 1907.10902; optuna/optuna (MIT).
    """
    run = run or Run()
    first = _checked(space, strategy, budget, start, objectives)
    budget = len(first) if strategy == "grid" else budget
    header = {"key": key, "space": {n: asdict(s) for n, s in space.items()}, "strategy": strategy, "seed": seed}
    header |= {"start": [dict(s) for s in start], "objectives": objectives}
    journal = _Journal(run.folder / f"{label.replace(' ', '-')}.trials.jsonl" if run.folder else None, header)
    found, bests = Found(), float("-inf")
    with _quiet(), run.progress.track(label, budget, "trial") as bar:
        optuna, study = _study(strategy, seed, objectives, budget)
        for values in first:
            study.enqueue_trial(dict(values))
        for number in range(budget):
            asked = study.ask()
            values = {name: _suggest(asked, name, one) for name, one in space.items()}
            trial = journal.at(number, values) or journal.add(_tried(score, values, objectives))
            found.trials.append(trial)
            if trial.scores is None:
                study.tell(asked, state=optuna.trial.TrialState.FAIL)
            else:
                study.tell(asked, list(trial.scores))
                bests = max(bests, sum(trial.scores) / objectives)
            bar.advance(1, best=bests)
    if all(t.scores is None for t in found.trials):
        raise FitError(
            f"{label}: none of {budget} trials had a finite score. Narrow the space, or look at one by hand."
        )
    return found


def _checked(
    space: Space, strategy: str, budget: int, start: Sequence[Mapping[str, Value]], objectives: int
) -> list[Mapping[str, Value]]:
    """What is tried first: all of a grid, otherwise `start`."""
    if strategy not in get_args(Strategy):
        raise UsageError(f"no strategy '{strategy}'. {did_you_mean(strategy, get_args(Strategy))}")
    if not space:
        raise UsageError("the space is empty: name at least one number or choice, such as {'ties.keep': [0.1, 0.9]}.")
    if budget < 1:
        raise UsageError(f"the budget must be at least 1 trial, got {budget}.")
    if objectives > 1 and strategy == "cmaes":
        raise UsageError(f"cmaes makes one score large, got {objectives}; use nsga2, nsga3, tpe, gp or random.")
    for values in start:
        for name, value in values.items():
            if name not in space:
                raise UsageError(f"start: '{name}' is not in the space. {did_you_mean(name, space)}")
            one = space[name]
            if value not in one.values if isinstance(one, Choice) else not one.low <= float(value) <= one.high:
                raise UsageError(f"start: {name} = {value!r} lies outside of {one}.")
    return [*start, *_grid(space, budget - len(start))] if strategy == "grid" else list(start[:budget])


def _grid(space: Space, budget: int) -> Iterator[Mapping[str, Value]]:
    """The finest grid with the same number of points on every range that fits the budget."""

    def axes(count: int) -> list[list[Value]]:
        return [list(one.values) if isinstance(one, Choice) else one.points(count) for one in space.values()]

    def size(count: int) -> int:
        total = 1
        for axis in axes(count):
            total *= len(axis)
        return total

    needed = size(2)
    if needed > budget:
        raise UsageError(f"a grid over {', '.join(space)} has at least {needed} points, more than {budget} trials.")
    count = 2
    while size(count + 1) <= budget and size(count + 1) > size(count):
        count += 1
    for point in itertools.product(*axes(count)):
        yield dict(zip(space, point, strict=True))


def require_optuna() -> Any:
    """The package, asked for before a search has work done for its score.

    Raises:
        MissingExtra: it is not installed.

    >>> require_optuna().__name__
    'optuna'
    """
    try:
        return import_module("optuna")
    except ImportError:
        raise MissingExtra("optuna", "search") from None


def _study(strategy: str, seed: int, objectives: int, budget: int) -> tuple[Any, Any]:
    optuna = require_optuna()
    samplers, seed = optuna.samplers, seed % 2**32  # numpy's generators take no more
    population = max(4, min(50, budget // 4))
    make: dict[str, Callable[[], Any]] = {
        "grid": lambda: samplers.RandomSampler(seed=seed),
        "random": lambda: samplers.RandomSampler(seed=seed),
        "tpe": lambda: samplers.TPESampler(seed=seed, multivariate=True),
        "gp": lambda: samplers.GPSampler(seed=seed, deterministic_objective=True),
        "cmaes": lambda: samplers.CmaEsSampler(seed=seed, warn_independent_sampling=False),
        "nsga2": lambda: samplers.NSGAIISampler(seed=seed, population_size=population),
        "nsga3": lambda: samplers.NSGAIIISampler(seed=seed, population_size=population),
    }
    try:
        return optuna, optuna.create_study(sampler=make[strategy](), directions=["maximize"] * objectives)
    except ImportError as missing:
        raise MissingExtra(missing.name or "a package of optuna's", "search") from None


def _suggest(trial: Any, name: str, one: Range | Choice) -> Value:
    value: Value
    if isinstance(one, Choice):
        value = trial.suggest_categorical(name, list(one.values))
    elif one.whole:
        value = trial.suggest_int(name, round(one.low), round(one.high), log=one.log)
    else:
        value = trial.suggest_float(name, one.low, one.high, log=one.log)
    return value


def _tried(score: Score, values: Mapping[str, Value], objectives: int) -> Trial:
    began = time.monotonic()
    try:
        given = score(values)
    except FitError:
        return Trial(values, None, time.monotonic() - began)
    scores = tuple(float(s) for s in (given if isinstance(given, Sequence) else [given]))
    if len(scores) != objectives:
        raise UsageError(f"the score gave {len(scores)} numbers, but the search has {objectives} objectives.")
    finite = all(abs(s) < float("inf") for s in scores)  # false for NaN too
    return Trial(values, scores if finite else None, time.monotonic() - began)


class _Journal:
    """Trials as lines of JSON; the first line says of which search."""

    def __init__(self, path: Path | None, header: Mapping[str, Any]) -> None:
        self._path, self._known = path, list[Trial]()
        header = json.loads(json.dumps(header))
        if path is None:
            return
        if not path.is_file():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(header) + "\n", encoding="utf-8")
            return
        text = path.read_text(encoding="utf-8")
        whole = text[: text.rfind("\n") + 1]  # a line that was cut off is tried again
        lines = [json.loads(line) for line in whole.splitlines()]
        if not lines or lines[0] != header:
            raise UsageError(f"{path.parent} holds the state of another run. Name another folder, or delete this one.")
        if whole != text:
            path.write_text(whole, encoding="utf-8")
        for one in lines[1:]:
            scores = None if one["scores"] is None else tuple(one["scores"])
            self._known.append(Trial(one["values"], scores, one["seconds"]))

    def at(self, number: int, values: Mapping[str, Value]) -> Trial | None:
        """The known trial of that number."""
        if number >= len(self._known):
            return None
        if self._known[number].values != values:
            raise UsageError(
                f"{self._path}: trial {number + 1} tried {dict(self._known[number].values)}, and would now try "
                f"{dict(values)}: another version of optuna, or another budget of nsga2 or nsga3. "
                "Delete the file to search anew."
            )
        return self._known[number]

    def add(self, trial: Trial) -> Trial:
        """The trial, written down."""
        if self._path is not None:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(asdict(trial)) + "\n")
        return trial


@contextmanager
def _quiet() -> Iterator[None]:
    """Optuna neither logs its trials nor warns of what it calls experimental."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with suppress(ImportError):  # _study says so
            import_module("optuna")  # sets up its log when it is first imported
        log = logging.getLogger("optuna")
        level = log.level
        log.setLevel(logging.ERROR)
        try:
            yield
        finally:
            log.setLevel(level)
