"""A searched merge: it finds the better options, by the score it declares, and refuses what it cannot know."""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from calmerge import DataError, Run, TaskVectors, UsageError, adamerging, dare, lines, searched, task_arithmetic, ties
from calmerge._pipe import build_pipe, read_pipe
from calmerge._weights import Weights
from calmerge._yaml import from_data
from calmerge.fitting.options import read_space, with_options
from calmerge.fitting.search import Range
from calmerge.methods import METHODS
from calmerge.tasks.base import Task, Tasks


def one_expert(toy: Any) -> Any:
    toy.experts = {"b": toy.experts["b"]}
    return toy.tvs


def test_the_score_without_labels_finds_the_expert(toy: Any) -> None:
    """With one expert the divergence from its predictions is 0 at a scale of 1, and nowhere less."""
    tvs, run = one_expert(toy), Run()
    space = {"task_arithmetic.scale": [0.0, 2.0]}
    delta = searched(tvs, tasks=toy.tasks, space=space, strategy="grid", budget=5, run=run)
    assert torch.equal(delta["fc1.weight"], tvs["fc1.weight"][0])
    trace = run.trace["searched"]
    assert not trace.labelled
    assert [t.values for t in trace.trials][trace.best] == {"task_arithmetic.scale": 1.0}


def test_labels_are_those_of_validation_and_are_declared(toy: Any) -> None:
    tvs = one_expert(toy)
    with pytest.raises(DataError, match="task 'b' has no validation split"):
        searched(
            tvs,
            tasks=Tasks(toy.tasks.model, {"b": toy.tasks["b"]}),
            space={"task_arithmetic.scale": [0.0, 1.0]},
            score="validation",
            budget=2,
        )
    pool = toy.tasks["b"].pool.dataset.tensors[0]
    labels = toy.tasks.logits(tvs.expert("b"), "b").argmax(1)
    validation = DataLoader(TensorDataset(pool, labels))
    tasks = Tasks(toy.tasks.model, {"b": Task(DataLoader(TensorDataset(pool)), validation=validation)})
    run = Run()
    space = {"task_arithmetic.scale": [-1.0, 1.0]}
    searched(tvs, tasks=tasks, space=space, score="validation", strategy="grid", budget=2, run=run)
    assert run.trace["searched"].labelled
    assert run.trace["searched"].trials[1].scores == [1.0]
    assert run.trace["searched"].best == 1


def test_unknown_options_and_values_are_refused_together_before_any_work(toy: Any) -> None:
    space = {"ties.kep": [0.1, 0.5], "ties.keep": [10, 20], "ties.combine": {"choices": ["men"]}, "ties.scale": 3}
    with pytest.raises(UsageError) as refused:
        searched(toy.tvs, tasks=toy.tasks, inner=ties, space=space)
    for words in (
        "5 mistakes",
        "no option 'ties.kep'",
        "Did you mean 'ties.keep'",
        "lie in (0, 1], got 10",
        "Did you mean 'mean'",
        "write [low, high]",
    ):
        assert words in str(refused.value)


def test_options_are_set_in_every_step_of_a_pipe() -> None:
    steps = read_pipe(from_data([{"drop_and_rescale": {"rate": 0.9}}, {"ties": {"keep": 0.2}}, "lines"], "r"), [])
    pipe = build_pipe(steps, METHODS)
    assert set(read_space(pipe, {"drop_and_rescale.rate": [0.1, 0.5], "lines.beta": [0.1, 0.5]})) == {
        "drop_and_rescale.rate",
        "lines.beta",
    }
    changed = with_options(pipe, {"ties.keep": 0.5, "lines.beta": 0.25})
    (_, _), (two, _), (three, _) = changed.args[0]
    assert two.keywords == {"keep": 0.5}
    assert (three.func, three.keywords) == (lines, {"beta": 0.25})
    assert pipe.args[0][1][0].keywords == {"keep": 0.2}


def test_entries_of_a_mapping_and_whole_numbers() -> None:
    weighted = partial(METHODS["weighted_average"], weights={"a": 1.0, "b": 1.0})
    name = "weighted_average.weights.b"
    assert read_space(weighted, {name: [0.0, 2.0]}) == {name: Range(0.0, 2.0)}
    assert with_options(weighted, {name: 0.5}).keywords["weights"] == {"a": 1.0, "b": 0.5}
    assert read_space(dare, {"dare.seed": [1, 5]}) == {"dare.seed": Range(1, 5, whole=True)}


def test_a_merge_that_learns_keeps_no_state_between_trials(toy: Any, tmp_path: Path) -> None:
    run = Run(tmp_path)
    inner = partial(adamerging, tasks=toy.tasks, steps=1, batch=4, run=run)
    space = {"adamerging.lr": {"low": 0.001, "high": 0.1, "log": True}}
    searched(toy.tvs, tasks=toy.tasks, inner=inner, space=space, budget=2, run=run)
    assert [f.name for f in tmp_path.glob("*.state.pt")] == []
    assert list(run.trace) == ["searched"]


@pytest.mark.parametrize(("score", "during"), [("expert_kl", "rest"), ("validation", "all")])
def test_what_learns_is_not_judged_by_what_it_learned_from(score: Any, during: str, toy: Any) -> None:
    seen: list[int] = []

    def learned(tvs: TaskVectors, *, tasks: Tasks, scale: float = 1.0) -> Weights:
        seen.append(len(tasks.split("a", "pool")))
        return task_arithmetic(tvs, scale=scale)

    inputs = toy.tasks["a"].pool.dataset.tensors[0]
    labelled = DataLoader(TensorDataset(inputs, torch.zeros(len(inputs), dtype=torch.int64)))
    tasks = Tasks(toy.tasks.model, {t: replace(toy.tasks[t], validation=labelled) for t in toy.tasks})
    n = len(tasks.split("a", "pool"))
    options = {"score": score, "strategy": "grid", "budget": 2, "examples": n}
    searched(toy.tvs, tasks=tasks, inner=partial(learned, tasks=tasks), space={"learned.scale": [0.5, 1.0]}, **options)
    part = n - n // 2 if during == "rest" else n
    assert seen == [part, part, n]


def test_a_journal_is_gone_on_from_in_another_process(toy: Any, tmp_path: Path) -> None:
    space = {"task_arithmetic.scale": [0.1, 1.0]}
    call = partial(searched, toy.tvs, tasks=toy.tasks, space=space, budget=4, run=Run(tmp_path))
    first, journal = dict(call()), (tmp_path / "searched.trials.jsonl").read_text()
    again = dict(call())
    assert all(torch.equal(first[n], again[n]) for n in first)
    assert (tmp_path / "searched.trials.jsonl").read_text() == journal
    assert "0x" not in journal
    with pytest.raises(UsageError, match="another run"):
        searched(
            toy.tvs,
            tasks=toy.tasks,
            inner=partial(task_arithmetic, scale=0.2),
            space=space,
            budget=4,
            run=Run(tmp_path),
        )
