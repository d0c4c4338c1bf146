"""MAP: the sheet's checks and traps."""

from typing import Any

import pytest
import torch

from calmerge import Run, UsageError, map_front
from calmerge.cli import _weights
from calmerge.fitting.search import undominated
from calmerge.methods.map_front import fit_surrogate, surrogate_front
from calmerge.recipe import recipe_from_dict, with_preference


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
    recipe = with_preference(recipe_from_dict(written), _weights("a=0.7"))
    assert recipe.to_dict()["merge"] == [{"map_front": {"budget": 5, "preference": {"a": 0.7}}}]
    with pytest.raises(UsageError, match="must be written as"):
        _weights("a")
