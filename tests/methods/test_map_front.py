"""MAP: the sheet's checks and traps."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from calmerge import Run, TaskVectors, UsageError, map_front, map_nested
from calmerge._save import input_hashes
from calmerge.cli import _weights
from calmerge.fitting.search import undominated
from calmerge.fitting.surrogates import (
    Metrics,
    _uncertainty,
    along,
    directions,
    fit_surrogate,
    refined,
    surrogate_front,
)
from calmerge.recipe import recipe_from_dict, with_last
from calmerge.report.results import Report, Row, Versions, dump
from calmerge.report.traces import FrontPoint, FrontTrace


def test_a_quadratic_is_found_exactly_at_as_many_points_as_unknowns() -> None:
    c = torch.tensor([(0, 0), (0.5, 0), (1, 0), (0, 0.5), (0, 1), (0.5, 0.5)], dtype=torch.float64)
    m = 0.5 + 0.4 * c[:, 0] + 0.1 * c[:, 1] - 0.2 * c[:, 0] ** 2 - 0.1 * c[:, 1] ** 2 - 0.1 * c[:, 0] * c[:, 1]
    f = fit_surrogate(c, m, "identity")
    assert f(torch.tensor([1.0, 0.0])) == pytest.approx(0.7)
    assert f(torch.tensor([0.3, 0.7])) == pytest.approx(0.5 + 0.12 + 0.07 - 0.018 - 0.049 - 0.021)


@pytest.mark.parametrize("activation", ["sigmoid", "softplus"])
def test_an_activation_is_seen_through(activation: Any) -> None:
    c = torch.rand(24, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    phi = torch.sigmoid if activation == "sigmoid" else torch.nn.functional.softplus
    f = fit_surrogate(c, phi(0.5 + c[:, 0] - 2 * c[:, 1] ** 2), activation)
    assert f(torch.tensor([0.5, 0.5])) == pytest.approx(float(phi(torch.tensor(0.5))), abs=1e-6)


def test_the_front_is_the_segment_and_preferences_pick_from_it() -> None:
    fs = [lambda c: float(-((c[0] - 1) ** 2) - c[1] ** 2), lambda c: float(-(c[0] ** 2) - (c[1] - 1) ** 2)]
    front = surrogate_front(fs, budget=600)
    assert undominated([s for _, s in front]) == list(range(len(front)))
    for (v1, v2), c1 in (((1, 1), 0.5), ((3, 1), 0.75)):
        c, _ = max(front, key=lambda one: v1 * one[1][0] + v2 * one[1][1])
        assert c == pytest.approx((c1, 1 - c1), abs=0.1)


def test_the_search_stays_in_the_sampled_box_and_the_point_is_measured_again(toy: Any) -> None:
    run = Run()
    map_front(toy.tvs, tasks=toy.tasks, score="expert_kl", budget=30, preference={"b": 1.0}, run=run)
    trace = run.trace["map_front"]
    assert all(0 <= c <= 1 for p in trace.points for c in p.coefficients)
    assert len(trace.measured) == len(trace.tasks) == 4


def test_what_cannot_be_is_refused(toy: Any) -> None:
    for options, words in (
        ({"samples": 14}, "at least 15 for 4 tasks"),
        ({"preference": {"e": 1.0}}, "no expert 'e'"),
        ({"preference": {"b": 0.0}}, "above 0"),
    ):
        with pytest.raises(UsageError, match=words):
            map_front(toy.tvs, tasks=toy.tasks, score="expert_kl", **options)


def test_a_preference_of_the_command_line_reaches_the_last_step() -> None:
    written = {
        "base": "./base", "experts": {"a": "./a"}, "merge": [{"map_front": {"budget": 5}}],
        "model": {"kind": "sequence-classifier"}, "tasks": {"a": {"classes": ["yes", "no"], "pool": "pool.csv"}},
    }  # fmt: skip
    recipe = with_last(recipe_from_dict(written), preference=_weights("a=0.7"))
    assert recipe.to_dict()["merge"] == [{"map_front": {"budget": 5, "preference": {"a": 0.7}}}]
    with pytest.raises(UsageError, match="must be written as"):
        _weights("a")


def test_angles_of_coefficients_and_back() -> None:
    c = torch.tensor([[0.0, 1.0, 0.0], [0.3, 0.4, 1.2], [2.0, 0.0, 0.0]])
    assert torch.allclose(along(directions(c), c.norm(dim=1)), c, atol=1e-6)
    assert ((directions(c) >= 0) & (directions(c) <= torch.pi / 2)).all()


def test_bins_without_points_are_drawn_as_often_as_the_worst() -> None:
    """Officially they never are."""
    at = torch.tensor([[1.0, 0.0], [0.98, 0.05]], dtype=torch.float64)
    new = refined(at, torch.tensor([0.5, 0.5]), lambda c: 0.5, 400, "seed")
    bins = (directions(new)[:, 0] / (torch.pi / 2) * 4).long().bincount(minlength=4)
    assert bins.min() > 60
    assert 0.2 <= new.norm(dim=1).min() <= new.norm(dim=1).max() <= 0.8


def test_resamples_do_not_shrink() -> None:
    """Officially each of the 30 drops a fifth of what the one before has left."""
    found = _uncertainty(torch.tensor([1.0] * 50 + [3.0] * 50).double(), "seed")
    assert found == pytest.approx(2 + 0.5 * 0.05, abs=0.03)  # of 80 of 100 drawn without return: about a twentieth


def test_points_of_every_round_count_and_only_their_task_is_evaluated(
    toy: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[int, tuple[str, ...]]] = []
    fitted: list[int] = []
    real_at, real_fit = Metrics.at, fit_surrogate

    def at(self: Metrics, coefficients: Tensor, tasks: Any, label: str) -> Tensor:
        asked.append((len(coefficients), tuple(tasks)))
        return real_at(self, coefficients, tasks, label)

    def fit(at: Tensor, *rest: Any) -> Any:
        fitted.append(len(at))
        return real_fit(at, *rest)

    monkeypatch.setattr(Metrics, "at", at)
    monkeypatch.setattr("calmerge.methods.map_front.fit_surrogate", fit)
    map_front(toy.tvs, tasks=toy.tasks, score="expert_kl", samples=15, rounds=2, points=3, budget=10)
    names = toy.tvs.tasks
    assert asked == [(15, names), *((3, (t,)) for t in names for _ in range(2)), (1, names)]
    assert fitted == [15, 18, 21] * len(names)


def test_a_stopped_run_goes_on_from_its_journal(toy: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    call = partial(map_front, toy.tvs, tasks=toy.tasks, score="expert_kl", samples=15, budget=10, run=Run(tmp_path))
    first = dict(call())
    journal = tmp_path / "MAP-samples.trials.jsonl"
    assert len(journal.read_text().splitlines()) == 16
    journal.write_text("".join(line + "\n" for line in journal.read_text().splitlines()[:9]))
    count = []
    real = toy.tasks.loss
    monkeypatch.setattr(toy.tasks, "loss", lambda *args, **more: count.append(1) or real(*args, **more))
    assert all(torch.equal(first[n], w) for n, w in dict(call()).items())
    assert len(count) == 15 - 8


def test_nested_merges_the_two_closest_first(toy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    joined: list[tuple[str, ...]] = []
    real = Metrics.at

    def at(self: Metrics, coefficients: Tensor, tasks: Any, label: str) -> Tensor:
        if label.endswith("alone"):  # metrics of the four experts
            return torch.tensor([[[0.9, 0.1, 0.5, 0.12][list(self.tasks).index(tasks[0])]]], dtype=torch.float64)
        joined.append(tuple(tasks))
        return real(self, coefficients, tasks, label)

    monkeypatch.setattr(Metrics, "at", at)
    run = Run()
    map_nested(toy.tvs, tasks=toy.tasks, score="expert_kl", samples=6, budget=10, run=run)
    b, d = toy.tvs.tasks[1], toy.tvs.tasks[3]
    assert joined[0] == (b, d)
    assert [len(tasks) for tasks in joined[::2]] == [2, *sorted(len(t) for t in joined[2::2])]
    assert len(joined) == 2 * 3
    assert set("+".join(run.trace["map_nested"].tasks).split("+")) == set(toy.tvs.tasks)


def test_a_nested_merge_is_a_sum_of_task_vectors_within_the_box(toy: Any) -> None:
    delta = map_nested(toy.tvs, tasks=toy.tasks, score="expert_kl", samples=6, budget=10)
    name = "fc1.weight"
    basis = toy.tvs[name].reshape(4, -1).T.double()
    found = torch.linalg.lstsq(basis, delta[name].reshape(-1, 1).double(), driver="gelsd").solution[:, 0]
    assert torch.allclose(basis @ found, delta[name].reshape(-1).double(), atol=1e-5)
    assert (found > -1e-4).all()
    assert (found < 1 + 1e-4).all()


def test_nested_needs_two_and_more_samples_than_unknowns(toy: Any) -> None:
    with pytest.raises(UsageError, match="got one"):
        map_nested(toy.tvs.only(["a"]), tasks=toy.tasks, score="expert_kl")
    with pytest.raises(UsageError, match="samples"):
        map_nested(toy.tvs, tasks=toy.tasks, score="expert_kl", samples=5)


def written_front(folder: Path, tvs: TaskVectors, coefficients: list[list[float]]) -> None:
    """A folder as a merge by MAP leaves it, whose merges are best at what they have the largest coefficient of."""
    points = [FrontPoint(coefficients=c, predicted=[1 - x for x in c]) for c in coefficients]
    trace = FrontTrace(tasks=list(tvs.tasks), points=points, chosen=0, measured=[0.0] * len(tvs.tasks))
    report = Report(
        title="t", created="2026-01-01T00:00:00", rows=[Row(method="map_front", label="map_front", trace=trace)],
        versions=Versions(calmerge="0", torch="0", python="0", platform="0"),
    )  # fmt: skip
    folder.mkdir()
    dump(report, folder / "report.json")
    (folder / "calmerge.json").write_text(json.dumps({"inputs": input_hashes(tvs)}))


def test_another_preference_picks_from_a_saved_front_without_fitting(
    toy: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tvs = toy.tvs
    written_front(tmp_path / "front", tvs, [[1.0, 0.0, 0.0, 0.0], [0.0, 1.0, 0.0, 0.0], [0.0, 0.0, 0.5, 0.5]])
    monkeypatch.setattr("calmerge.methods.map_front.fit_surrogate", None)
    for task, c in ((tvs.tasks[1], [0.0, 1.0, 0.0, 0.0]), (tvs.tasks[3], [0.0, 0.0, 0.5, 0.5])):
        run = Run()
        front = str(tmp_path / "front")
        delta = map_front(tvs, tasks=toy.tasks, score="expert_kl", front=front, preference={task: 1.0}, run=run)
        assert torch.equal(delta["fc1.weight"], sum(x * tau for x, tau in zip(c, tvs["fc1.weight"], strict=True)))
        trace = run.trace["map_front"]
        assert trace.points[trace.chosen].coefficients == c


def test_a_front_of_something_else_is_refused(toy: Any, tmp_path: Path) -> None:
    tvs, front = toy.tvs, str(tmp_path / "front")
    pick = partial(map_front, tasks=toy.tasks, front=front)
    with pytest.raises(UsageError, match="holds no front"):
        pick(tvs, score="expert_kl")
    written_front(tmp_path / "front", tvs, [[1.0, 0.0, 0.0, 0.0]])
    with pytest.raises(UsageError, match="was found with score expert_kl, got validation"):
        pick(tvs, score="validation")
    with pytest.raises(UsageError, match="is one of a, b, c, d, and these experts are a, b"):
        pick(tvs.only(["a", "b"]), score="expert_kl")
    other = json.loads((tmp_path / "front" / "calmerge.json").read_text())
    other["inputs"]["expert b"] = {"tensors": "0"}
    (tmp_path / "front" / "calmerge.json").write_text(json.dumps(other))
    with pytest.raises(UsageError, match=r"other checkpoints \(expert b differs\)"):
        pick(tvs, score="expert_kl")
    (tmp_path / "front" / "report.json").write_text("{")
    with pytest.raises(UsageError, match="holds no front"):
        pick(tvs, score="expert_kl")
