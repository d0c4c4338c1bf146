"""Weighted averages, negation and analogy."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch

from calmerge import TaskVectors, UsageError, add, average, task_arithmetic, task_vectors, weighted_average
from calmerge.pieces.weigh import negate, weigh
from calmerge.recipe import build, recipe_from_dict

near = partial(torch.testing.assert_close, rtol=0, atol=1e-6)
BASE = {"w": torch.tensor([1.0])}


@pytest.fixture
def tvs() -> TaskVectors:
    return task_vectors(BASE, {"a": {"w": torch.tensor([2.0])}, "b": {"w": torch.tensor([4.0])}})


def theta(delta: Any) -> float:
    return float(add(task_vectors(BASE, {"x": BASE}).base, delta)["w"])


def test_weights_are_normalised_unless_told_otherwise(tvs: TaskVectors) -> None:
    assert theta(weighted_average(tvs, weights={"a": 3.0, "b": 1.0})) == 2.5
    assert theta(weighted_average(tvs, weights={"a": 3.0, "b": 1.0}, normalise=False)) == 10
    assert theta(weighted_average(tvs, weights={"a": 0.5, "b": -0.5}, normalise=False)) == -1


def test_equal_weights_are_the_average(tvs: TaskVectors) -> None:
    near(weighted_average(tvs, weights={"a": 7.0, "b": 7.0})["w"], average(tvs)["w"])
    near(weighted_average(tvs, weights={})["w"], average(tvs)["w"])


def test_weights_that_cancel_make_no_mean(tvs: TaskVectors) -> None:
    with pytest.raises(UsageError, match="sum to 0"):
        weighted_average(tvs, weights={"a": 1.0, "b": -1.0})


@pytest.mark.parametrize("call", [weighted_average, weigh])
def test_a_weight_of_no_task_is_refused(call: Callable[..., Any], tvs: TaskVectors) -> None:
    with pytest.raises(UsageError, match=r"weights names 'c', but there is no such task. Known: a, b"):
        call(tvs, weights={"c": 1.0})


def test_half_precision_bases_are_added_in_float32() -> None:
    base = {"w": torch.tensor([1.0], dtype=torch.bfloat16)}
    tvs = task_vectors(base, {"a": {"w": torch.tensor([1.0 + 2**-10])}})
    near(weighted_average(tvs, weights={"a": 0.5}, normalise=False)["w"], torch.tensor([(1 + 2**-10) / 2 - 1]))


def test_negating_twice_changes_nothing_and_once_subtracts(tvs: TaskVectors) -> None:
    assert torch.equal(negate(negate(tvs))["w"], tvs["w"])
    assert theta(task_arithmetic(negate(tvs, of=["b"]), scale=0.5)) == 1 + 0.5 * (1 - 3)


def test_analogy_with_nothing_between_a_and_b_is_c() -> None:
    """C + (B - A) with A = B."""
    experts = {"A": {"w": torch.tensor([3.0])}, "B": {"w": torch.tensor([3.0])}, "C": {"w": torch.tensor([2.0])}}
    tvs = task_vectors(BASE, experts)
    assert torch.equal(task_arithmetic(weigh(tvs, weights={"A": -1.0}), scale=1.0)["w"], tvs.of("C")["w"])


def test_a_recipe_says_negation_and_analogy_as_a_step_before_any_merge(tvs: TaskVectors) -> None:
    def run(*pipe: Any) -> float:
        data = {"base": "./base", "experts": {"a": "./a", "b": "./b"}, "merge": list(pipe)}
        return theta(build(recipe_from_dict(data))(tvs, None, None))

    assert run({"negate": {"of": ["a"]}}, {"task_arithmetic": {"scale": 1.0}}) == 1 - 1 + 3
    assert run({"weigh": {"weights": {"a": 2, "b": -1}}}, {"task_arithmetic": {"scale": 1.0}}) == 1 + 2 - 3
    assert run({"negate": {}}, {"ties": {"keep": 1.0}}) == 1 - (1 + 3) / 2
