"""Averaging."""

import pytest
import torch

from calmerge import add, average, task_arithmetic, task_vectors

EXPERTS = {t: {"w": torch.tensor([x])} for t, x in {"a": 1.4, "b": 1.2, "c": 0.9}.items()}
BASE = {"w": torch.tensor([1.0])}


def test_the_worked_example() -> None:
    tvs = task_vectors(BASE, EXPERTS)
    assert add(tvs.base, average(tvs))["w"].item() == pytest.approx(1.16667, abs=1e-5)


def test_averaging_is_task_arithmetic_at_1_over_t() -> None:
    tvs = task_vectors(BASE, EXPERTS)
    assert average(tvs)["w"].item() == pytest.approx(task_arithmetic(tvs, scale=1 / 3)["w"].item(), abs=1e-7)


def test_the_mean_of_deltas_is_the_mean_of_experts() -> None:
    tvs = task_vectors({"w": torch.tensor([8.0, -8.0])}, {"a": {"w": torch.tensor([1.0, 2.0])},
                                                          "b": {"w": torch.tensor([3.0, 4.0])}})  # fmt: skip
    assert add(tvs.base, average(tvs))["w"].tolist() == [2.0, 3.0]


def test_heads_are_not_averaged() -> None:
    experts = {t: e | {"head": torch.tensor([1.0, 2.0])} for t, e in EXPERTS.items()}
    assert list(average(task_vectors(BASE, experts))) == ["w"]


def test_eight_equal_small_deltas_in_bfloat16_are_not_lost() -> None:
    base = {"w": torch.tensor([1.0]).bfloat16()}
    experts = {str(t): {"w": torch.tensor([1.0 + 2**-7]).bfloat16()} for t in range(8)}
    tvs = task_vectors(base, experts)
    assert average(tvs)["w"].item() == 2**-7
