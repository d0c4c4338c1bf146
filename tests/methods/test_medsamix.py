"""MedSAMix: the sheet's checks and traps."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from calmerge import FitError, MissingExtra, Run, TaskVectors, UsageError, medsamix, slerp, task_vectors, ties
from calmerge.fitting.search import search, undominated
from calmerge.methods.medsamix import designs, grouped, merged, space


def vectors(base: float, **experts: float) -> TaskVectors:
    return task_vectors({"w": torch.tensor([base])}, {t: {"w": torch.tensor([v])} for t, v in experts.items()})


def linear(**weights: float) -> dict[str, Any]:
    base = weights.pop("base")
    return {"g: method": "linear", "g: weight (base)": base} | {f"g: weight {t}": w for t, w in weights.items()}


def blocks(count: int, *parts: str) -> TaskVectors:
    base = {f"h.{i}.{part}.weight": torch.zeros(2, 2) for i in range(count) for part in parts}
    return task_vectors(base, {"a": {name: w + 1 for name, w in base.items()}})


def test_the_two_models_of_highest_score_are_interpolated_the_better_one_first() -> None:
    draw = torch.Generator().manual_seed(0)
    base, a, b = (torch.randn(4, 4, generator=draw) for _ in range(3))
    tvs = task_vectors({"w": base}, {"A": {"w": a}, "B": {"w": b}})
    delta = merged(
        tvs, {"g": ["w"]}, {"g: method": "slerp", "g: score (base)": 0.2, "g: score A": 0.9, "g: score B": 0.5}
    )
    assert torch.allclose(delta["w"], slerp(tvs, t=0.40131)["w"], atol=1e-5)


def test_the_base_may_be_one_of_the_two() -> None:
    tvs = task_vectors(
        {"w": torch.tensor([2.0, 0.0])}, {"A": {"w": torch.tensor([0.0, 2.0])}, "B": {"w": torch.ones(2)}}
    )
    scores = {"g: score (base)": 0.7, "g: score A": 0.7, "g: score B": 0.1}
    delta = merged(tvs, {"g": ["w"]}, {"g: method": "slerp"} | scores)
    assert torch.allclose(delta["w"] + tvs.base["w"], torch.full((2,), 2**0.5))  # half way along a quarter of a circle


def test_weights_are_normalised_over_base_and_experts() -> None:
    tvs = vectors(0.0, a=4.0, b=8.0, c=100.0)
    assert merged(tvs, {"g": ["w"]}, linear(base=1, a=1, b=2, c=0))["w"].item() == 5


def test_weights_that_are_all_0_give_the_base() -> None:
    assert merged(vectors(3.0, a=4.0, b=8.0), {"g": ["w"]}, linear(base=0, a=0, b=0))["w"].item() == 0


def test_a_recipe_with_weight_on_one_model_gives_that_model() -> None:
    tvs = vectors(1.0, a=4.0, b=8.0)
    found = [merged(tvs, {"g": ["w"]}, values)["w"].item() + 1 for values in list(designs(["g"], ["a", "b"]))[:3]]
    assert found == [1.0, 4.0, 8.0]


def test_tensors_of_no_group_stay_as_in_the_base() -> None:
    tvs = task_vectors({"w": torch.zeros(1), "x": torch.zeros(1)}, {"a": {"w": torch.ones(1), "x": torch.ones(1)}})
    values = {"g: method": "task_arithmetic", "g: scale": 0.5}
    assert dict(merged(tvs, {"g": ["x"]}, values)) == {"x": torch.tensor([0.5])}


def test_ties_trims_each_tensor_and_0_keeps_all() -> None:
    tvs = task_vectors({"w": torch.zeros(4)}, {"a": {"w": torch.tensor([1.0, -2.0, 3.0, 4.0])}})
    for trim in (0.0, 0.5):
        delta = merged(tvs, {"g": ["w"]}, {"g: method": "ties", "g: trim": trim, "g: ties scale": 1.0})
        assert torch.equal(delta["w"], ties(tvs, keep=1 - trim, scope="tensor")["w"])


def test_blocks_that_are_left_over_form_a_group_with_numbers_of_its_own() -> None:
    groups = grouped(blocks(5, "attn", "mlp"), blocks=2)
    assert list(groups) == ["h 0-1", "h 2-3", "h 4"]
    assert "h 4: method" in space(groups, ["a"])


def test_components_may_have_a_method_each() -> None:
    groups = grouped(blocks(2, "attn.q", "attn.norm", "mlp.up", "ln_2"), components="separate")
    assert {group: {n.split(".", 2)[2] for n in names} for group, names in groups.items()} == {
        "h 0-1 attention": {"attn.q.weight"},
        "h 0-1 norm": {"attn.norm.weight", "ln_2.weight"},
        "h 0-1 mlp": {"mlp.up.weight"},
    }


def test_three_experts_make_eleven_numbers_and_a_choice_in_each_of_19_groups() -> None:
    assert len(space([str(i) for i in range(19)], ["a", "b", "c"])) == 228


def test_no_design_is_tried_twice() -> None:
    found = [tuple(sorted(values.items(), key=str)) for values in designs(["g", "h"], ["a", "b", "c"])]
    assert len(found) == len(set(found)) == 17


def test_a_known_recipe_is_found_more_often_than_at_random_and_the_best_never_falls() -> None:
    """A toy whose score falls with the square of the distance from one method and scale in each of two groups."""
    groups = ["g", "h"]

    def score(values: Any) -> float:
        return -sum(
            (values[f"{g}: scale"] - 0.4) ** 2 if values[f"{g}: method"] == "task_arithmetic" else 1.0 for g in groups
        )

    def reached(strategy: Any, seed: int) -> float:
        found = search(score, space(groups, ["a", "b"]), strategy=strategy, budget=60, seed=seed, start=[])
        bests = [max(t.scores[0] for t in found.trials[: i + 1] if t.scores) for i in range(len(found.trials))]
        assert bests == sorted(bests)
        return bests[-1]

    assert sum(reached("tpe", seed) > reached("random", seed) for seed in range(5)) >= 3


def test_without_labels_it_finds_the_expert_and_says_so(toy: Any, tmp_path: Path) -> None:
    toy.experts = {"b": toy.experts["b"]}
    run = Run(tmp_path)
    delta = medsamix(toy.tvs, tasks=toy.tasks, score="expert_kl", budget=4, run=run)
    assert torch.equal(delta["fc1.weight"], toy.tvs["fc1.weight"][0])
    assert not run.trace["medsamix"].labelled
    assert run.trace["medsamix"].best == 1  # after the base alone, the expert alone
    lines = (tmp_path / "medsamix.trials.jsonl").read_text().splitlines()
    assert len(lines) == 5
    again = medsamix(toy.tvs, tasks=toy.tasks, score="expert_kl", budget=4, run=run)
    assert torch.equal(again["fc1.weight"], delta["fc1.weight"])


def test_with_an_objective_for_each_task_a_preference_picks_from_the_front(toy: Any) -> None:
    def chosen(preference: dict[str, float] | None) -> Any:
        run = Run()
        medsamix(
            toy.tvs, tasks=toy.tasks, score="expert_kl", objectives="each", strategy="nsga2", budget=12,
            preference=preference, run=run,
        )  # fmt: skip
        trace = run.trace["medsamix"]
        return trace.best, [t.scores for t in trace.trials]

    task = toy.tvs.tasks[1]
    best, scores = chosen({task: 1.0})
    assert scores[best][1] == max(s[1] for s in scores)
    assert best in undominated(scores)
    assert chosen(None)[0] in undominated(scores)


def test_a_trial_that_fails_does_not_end_the_search(toy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    real, calls = merged, []

    def failing(*args: Any) -> Any:
        calls.append(args)
        if len(calls) == 1:
            raise FitError("no")
        return real(*args)

    monkeypatch.setattr("calmerge.methods.medsamix.merged", failing)
    run = Run()
    medsamix(toy.tvs, tasks=toy.tasks, score="expert_kl", budget=2, run=run)
    assert run.trace["medsamix"].trials[0].scores is None
    assert run.trace["medsamix"].best == 1


def test_what_cannot_be_is_refused_before_any_work(toy: Any) -> None:
    for options, words in (
        ({"groups": {"g": ["fc9.*"]}}, r"'fc9\.\*' fits no tensor"),
        ({"groups": {"g": ["*"], "h": ["fc1.*"]}}, "nothing is left for 'h'"),
        ({"preference": {"e": 1.0}}, "no expert 'e'"),
        ({"objectives": "each", "strategy": "cmaes"}, "cmaes makes one score large"),
    ):
        with pytest.raises(UsageError, match=words):
            medsamix(toy.tvs, tasks=toy.tasks, score="expert_kl", budget=2, **options)


def test_without_optuna_nothing_is_computed(toy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    monkeypatch.setattr(toy.tasks, "logits", None)
    with pytest.raises(MissingExtra, match="optuna"):
        medsamix(toy.tvs, tasks=toy.tasks, score="expert_kl", budget=2)


def test_groups_may_be_given(toy: Any) -> None:
    run = Run()
    delta = medsamix(
        toy.tvs, tasks=toy.tasks, groups={"first": ["fc1.*"]}, score="expert_kl", budget=2, run=run
    )  # fmt: skip
    assert {name.split(".")[0] for name in delta} == {"fc1"}
