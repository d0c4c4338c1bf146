"""How good a merge is, task by task, without gradients: what searches make large."""

from collections.abc import Callable, Sequence
from typing import Literal

import torch

from calmerge._random import permutation
from calmerge._run import Run
from calmerge._task_vectors import TaskVectors, materialise
from calmerge._weights import Weights, add
from calmerge.fitting.objectives import entropy, expert_kl
from calmerge.fitting.search import require_optuna
from calmerge.fitting.targets import expert_pools
from calmerge.tasks.base import Batch, Tasks

ScoreName = Literal["expert_kl", "entropy", "validation"]
"""Minus the divergence from the experts' predictions or minus the entropy, on part of the pools, which needs no labels;
or the accuracy on the labelled validation splits. Never the test split."""


def scorer(
    tvs: TaskVectors, tasks: Tasks, score: ScoreName, *, examples: int, seed: int, run: Run
) -> Callable[..., dict[str, float]]:
    """A function from a delta, and perhaps names of tasks, to the score of every task or of these, larger ones better.

    Args:
        tvs: task vectors.
        tasks: the model, its frozen heads, and the data of the score.
        score: see `ScoreName`.
        examples: of each pool, how many a label-free score looks at.
        seed: decides which.
        run: progress.

    Held in memory: one merged model, while it is scored.

    Raises:
        DataError: a split that the score needs is missing.
        MissingExtra: optuna is not installed, without which there is no search.

    >>> pool = torch.utils.data.DataLoader(torch.eye(2))
    >>> tasks = calmerge.Tasks(calmerge.ModuleModel(torch.nn.Linear(2, 2, bias=False)), {"a": calmerge.Task(pool)})
    >>> tvs = calmerge.task_vectors({"weight": torch.zeros(2, 2)}, {"a": {"weight": torch.eye(2)}})
    >>> scorer(tvs, tasks, "expert_kl", examples=2, seed=0, run=Run())(tvs.of("a"))["a"] == 0
    True
    """
    require_optuna()
    if score == "validation":
        for task in tvs.tasks:
            tasks.split(task, "validation")  # or an error, before any work
        batches = []
    else:
        batches = _held_out(tvs, tasks, score, examples, seed, run)
    objective = expert_kl if score == "expert_kl" else entropy

    def scores(delta: Weights, only: Sequence[str] = tvs.tasks) -> dict[str, float]:
        theta = materialise(add(tvs.base, delta, dtype=torch.float32))
        if score == "validation":
            logits = {t: tasks.logits(theta, t, "validation") for t in only}
            return {t: tasks.score(found, t, "validation").accuracy for t, found in logits.items()}
        chosen = [batch for batch in batches if batch.task in only]
        return {t: -loss for t, loss in tasks.loss(objective, theta, chosen).items()}

    return scores


def _held_out(tvs: TaskVectors, tasks: Tasks, score: str, examples: int, seed: int, run: Run) -> list[Batch]:
    """Some examples of each pool, with the experts' logits where the score compares with them."""
    pools = expert_pools(tvs, tasks, run=run) if score == "expert_kl" else {}
    batches = []
    for task in tvs.tasks:
        drawn = permutation(len(tasks.split(task, "pool")), seed, "score", task)[:examples]
        for part in torch.split(drawn, tasks.batch):  # type: ignore[no-untyped-call]
            targets = pools[task].targets if task in pools else None
            batches.append(Batch(task, part, None if targets is None else targets[part]))
    return batches
