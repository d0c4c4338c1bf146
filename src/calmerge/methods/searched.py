"""Any merge with its numbers and choices searched for."""

from collections.abc import Mapping
from typing import Any

from calmerge._run import Run
from calmerge._signature import Count, Seed, check, raise_together
from calmerge._task_vectors import Merge, TaskVectors
from calmerge._weights import Weights
from calmerge.fitting.options import describe, learns, read_space, with_options
from calmerge.fitting.scores import ScoreName, scorer
from calmerge.fitting.search import Found, Strategy, Trial, search
from calmerge.methods.task_arithmetic import task_arithmetic
from calmerge.report.traces import SearchTrace, Tried
from calmerge.tasks.base import Tasks
from calmerge.tasks.parted import parted


def searched(
    tvs: TaskVectors,
    *,
    tasks: Tasks,
    inner: Merge | None = None,
    space: Mapping[str, Any],
    score: ScoreName = "expert_kl",
    strategy: Strategy = "tpe",
    budget: Count = 30,
    examples: Count = 256,
    seed: Seed = 0,
    run: Run | None = None,
) -> Weights:
    """The merge whose numbers and choices, of those tried, give the best score.

    argmax over v in the space of the mean over tasks of score_t(theta_0 + inner(v)).

    Where `inner` learns from the pools itself and the score asks for no labels, half of every pool at most is held out:
    what is tried learns from the rest and is judged by these. With the options that were found it learns from all.

    Args:
        tvs: task vectors of T experts.
        tasks: the model, its frozen heads, and the data of the score.
        inner: the merge, or pipe, whose options are searched, the others as they are; Task Arithmetic when None.
        space: by `method.option`, a range `[low, high]` or `{low: .., high: .., log: true}`, or choices
            `{choices: [a, b]}`; `method.option.cars` is an entry of an option that maps tasks to numbers.
        score: without labels, minus the divergence from the experts' predictions (`expert_kl`) or minus the prediction
            entropy, on part of the pools; or the accuracy on the labelled `validation` splits. Never the test split.
        strategy: as in `calmerge.fitting.search.search`.
        budget: number of merges tried.
        examples: of each pool, how many a label-free score looks at.
        seed: decides what is tried, and on which examples.
        run: progress, the journal from which a stopped search goes on, and the trace.

    Held in memory: one merged model.

    Raises:
        UsageError: the space names an option that no method of `inner` has, or values that it does not take.
        DataError: a split that the score needs is missing.
        FitError: no trial had a finite score.
        MissingExtra: optuna is not installed.

    >>> pool = torch.utils.data.DataLoader(torch.eye(2))
    >>> encoder = torch.nn.Linear(2, 2, bias=False)
    >>> tasks = calmerge.Tasks(calmerge.ModuleModel(encoder), {"a": calmerge.Task(pool)})
    >>> tvs = task_vectors({"weight": torch.zeros(2, 2)}, {"a": {"weight": torch.eye(2)}})
    >>> searched(tvs, tasks=tasks, space={"task_arithmetic.scale": [0.0, 1.0]}, strategy="grid", budget=3)["weight"]
    tensor([[1., 0.],
            [0., 1.]])

    Source: samplers of Akiba et al., "Optuna: A Next-generation Hyperparameter Optimization Framework", KDD 2019,
    arXiv 1907.10902; optuna/optuna (MIT).
    """
    options = {"tasks": tasks, "inner": inner, "space": space, "score": score, "strategy": strategy, "budget": budget}
    raise_together(check(searched, options | {"examples": examples, "seed": seed}))
    run, tvs, inner = run or Run(), tvs.to(tasks.device), inner or task_arithmetic
    ranges = read_space(inner, space)
    apart = score != "validation" and learns(inner)
    rest, judging = parted(tasks, examples, seed=seed) if apart else (None, tasks)
    scores = scorer(tvs, judging, score, examples=examples, seed=seed, run=run)

    def told(values: Mapping[str, Any]) -> float:
        found = scores(with_options(inner, values, rest)(tvs))
        return sum(found[t] for t in tvs.tasks) / len(found)

    key = f"{describe(inner)} {score} {examples}{' held out' * apart} {tvs.fingerprint}"
    found = search(told, ranges, strategy=strategy, budget=budget, seed=seed, run=run, label="searched", key=key)
    run.trace["searched"] = traced(found, score, strategy, found.best)
    best: Weights = with_options(inner, found.best.values)(tvs)
    return best


def traced(found: Found, score: str, strategy: str, best: Trial) -> SearchTrace:
    """What a search tried, for the report.

    >>> trial = Trial({"x": 1}, (0.5,), 0.0)
    >>> traced(Found([trial]), "expert_kl", "random", trial).best
    0
    """
    tried = [Tried(values=dict(t.values), scores=None if t.scores is None else list(t.scores)) for t in found.trials]
    return SearchTrace(
        score=score, labelled=score == "validation", strategy=strategy, trials=tried, best=found.trials.index(best)
    )
