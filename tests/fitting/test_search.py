"""The search: every strategy, its journal, and what it refuses."""

import json
import math
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

import pytest

from calmerge import FitError, Run, UsageError
from calmerge.fitting.search import Choice, Range, Strategy, search, undominated

SPACE = {"x": Range(-1, 1), "n": Range(1, 4, whole=True), "how": Choice(("mean", "sum"))}


def hill(v: Mapping[str, Any]) -> float:
    """Highest, 0, at x = 0.25, n = 3, how = sum."""
    return float(-((v.get("x", 0.25) - 0.25) ** 2) - abs(v.get("n", 3) - 3) - (v.get("how", "sum") != "sum"))


@pytest.mark.parametrize("strategy", get_args(Strategy))
def test_every_strategy_comes_near_the_top_and_repeats_itself(strategy: Any) -> None:
    found = search(hill, SPACE, strategy=strategy, budget=40, seed=3)
    assert found.best.scores is not None
    assert found.best.scores[0] > -0.5
    assert found.best.values["how"] == "sum"
    assert [t.values for t in found.trials] == [
        t.values for t in search(hill, SPACE, strategy=strategy, budget=40, seed=3).trials
    ]


@pytest.mark.parametrize("strategy", ["random", "tpe", "cmaes", "nsga2"])
def test_a_stopped_search_ends_as_if_it_had_not_been_stopped(strategy: Any, tmp_path: Path) -> None:
    whole = search(hill, SPACE, strategy=strategy, budget=25)
    tried = []

    def stopped(v: Mapping[str, Any]) -> float:
        if len(tried) == 12:
            raise KeyboardInterrupt
        tried.append(v)
        return hill(v)

    with pytest.raises(KeyboardInterrupt):
        search(stopped, SPACE, strategy=strategy, budget=25, run=Run(tmp_path))
    with (tmp_path / "search.trials.jsonl").open("a") as file:
        file.write('{"values": {"x"')  # a line that was cut off
    later = []
    again = search(lambda v: later.append(v) or hill(v), SPACE, strategy=strategy, budget=25, run=Run(tmp_path))
    assert len(later) == 13
    assert [(t.values, t.scores) for t in again.trials] == [(t.values, t.scores) for t in whole.trials]
    lines = (tmp_path / "search.trials.jsonl").read_text().splitlines()
    assert [json.loads(line)["scores"] for line in lines[1:]] == [list(t.scores or ()) for t in whole.trials]


def test_a_first_search_says_nothing() -> None:
    code = "from calmerge.fitting.search import Range, search; search(lambda v: v['x'], {'x': Range(0, 1)}, budget=2)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("", "")


def test_a_journal_of_another_search_is_refused(tmp_path: Path) -> None:
    search(hill, SPACE, budget=2, run=Run(tmp_path), key="one")
    with pytest.raises(UsageError, match="another run"):
        search(hill, SPACE, budget=2, run=Run(tmp_path), key="two")


def test_a_larger_budget_goes_on_from_a_smaller_one(tmp_path: Path) -> None:
    search(hill, SPACE, strategy="random", budget=3, run=Run(tmp_path))
    later = []
    search(lambda v: later.append(v) or hill(v), SPACE, strategy="random", budget=5, run=Run(tmp_path))
    assert len(later) == 2


def test_failed_trials_are_kept_and_never_the_best() -> None:
    def score(v: Mapping[str, Any]) -> float:
        if v["x"] > 0.5:
            raise FitError("the loss is nan")
        return math.nan if v["x"] > 0 else v["x"]

    found = search(score, {"x": Range(-1, 1)}, strategy="grid", budget=5)
    assert [t.scores for t in found.trials] == [(-1.0,), (-0.5,), (0.0,), None, None]
    assert found.best.values == {"x": 0.0}
    with pytest.raises(FitError, match="none of 3 trials"):
        search(lambda v: math.nan, {"x": Range(0, 1)}, budget=3)


def test_the_start_is_tried_first_and_the_incumbent_never_gets_worse() -> None:
    found = search(hill, SPACE, budget=10, start=[{"x": 0.25, "n": 3, "how": "sum"}])
    assert found.trials[0].scores == (0.0,)
    assert found.best is found.trials[0]


def test_a_grid_is_as_fine_as_the_budget_allows() -> None:
    found = search(hill, SPACE, strategy="grid", budget=20)
    assert len(found.trials) == 18  # 3 points of x, 3 of n, 2 choices
    with pytest.raises(UsageError, match=r"at least 8 points, more than 7 trials"):
        search(hill, SPACE, strategy="grid", budget=7)


def test_two_objectives_give_a_front_without_dominated_points() -> None:
    both = lambda v: (-((v["x"] - 1) ** 2), -((v["x"] + 1) ** 2))  # noqa: E731
    found = search(both, {"x": Range(-3, 3)}, strategy="nsga2", budget=60, objectives=2)
    front = [t.scores for t in found.front]
    assert len(front) > 5
    assert len(undominated([s for s in front if s])) == len(front)
    assert undominated([*[s for s in front if s], (-100.0, -100.0)]) == list(range(len(front)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"space": {}}, "space is empty"),
        ({"budget": 0}, "at least 1 trial"),
        ({"strategy": "tpee"}, "Did you mean 'tpe'"),
        ({"strategy": "cmaes", "objectives": 2}, "one score large"),
        ({"start": [{"y": 1}]}, "start: 'y' is not in the space"),
        ({"start": [{"x": 2}]}, "lies outside"),
        ({"start": [{"how": "max"}]}, "lies outside"),
        ({"objectives": 2, "strategy": "nsga2"}, "gave 1 numbers, but the search has 2"),
    ],
)
def test_what_cannot_be_searched_is_refused(changes: Mapping[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        search(hill, **({"space": SPACE} | changes))


def test_ranges_and_choices_must_make_sense() -> None:
    for wrong in (lambda: Range(1, 0), lambda: Range(0, 1, log=True), lambda: Choice(()), lambda: Choice(("a", "a"))):
        with pytest.raises(UsageError):
            wrong()
