"""Exact numbers over a whole model."""

import pytest
import torch
from torch import Tensor

from calmerge import StateDict, task_vectors
from calmerge._measure import kth_magnitude, later, total
from calmerge._random import uniform


def sorted_magnitudes(*tensors: Tensor) -> Tensor:
    return torch.cat([t.float().flatten() for t in tensors]).abs().sort().values


@pytest.mark.parametrize("k", [1, 2, 500, 999, 1000])
def test_kth_magnitude_is_the_kth_of_a_sort(k: int) -> None:
    a, b = uniform((20, 30), "a") - 0.5, uniform((400,), "b") - 0.5
    found = kth_magnitude(StateDict({"a": a, "b": b}), k)
    assert found.tolist() == [sorted_magnitudes(a, b)[k - 1].item()]


@pytest.mark.parametrize("k", range(1, 8))
def test_equal_magnitudes_and_zeros_of_both_signs_count_each(k: int) -> None:
    w = torch.tensor([0.0, -0.0, 1.0, -1.0, 1.0, 2.0, -3.0])
    assert kth_magnitude(StateDict({"w": w}), k).item() == [0, 0, 1, 1, 1, 2, 3][k - 1]


@pytest.mark.parametrize("k", [1, 4, 6])
def test_all_zeros_have_threshold_zero(k: int) -> None:
    assert kth_magnitude(StateDict({"w": torch.zeros(2, 3)}), k).item() == 0.0


def test_magnitudes_that_differ_in_the_last_bit_are_told_apart() -> None:
    one, next_up = torch.tensor(1.0), torch.nextafter(torch.tensor(1.0), torch.tensor(2.0))
    weights = StateDict({"w": torch.stack([next_up, -one])})
    assert kth_magnitude(weights, 1).item() == 1.0
    assert kth_magnitude(weights, 2).item() == next_up.item()


def test_the_smallest_and_the_largest_floats_are_ranked() -> None:
    tiny, huge = 1e-45, torch.finfo(torch.float32).max
    weights = StateDict({"w": torch.tensor([-huge, tiny, 0.0])})
    assert kth_magnitude(weights, 2).item() == torch.tensor(tiny).item()
    assert kth_magnitude(weights, 3).item() == huge


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_low_precision_is_ranked_by_its_float32_value(dtype: torch.dtype) -> None:
    w = (uniform((3000,), "low") - 0.5).to(dtype)
    for k in (1, 1700, 3000):
        assert kth_magnitude(StateDict({"w": w}), k).item() == sorted_magnitudes(w)[k - 1].item()


def test_every_task_has_its_own_threshold_and_may_have_its_own_rank() -> None:
    deltas = {t: uniform((50, 7), t) - 0.5 for t in "abc"}
    tvs = task_vectors({"w": torch.zeros(50, 7)}, {t: {"w": d} for t, d in deltas.items()})
    assert kth_magnitude(tvs, 100).tolist() == [sorted_magnitudes(d)[99].item() for d in deltas.values()]
    ranks = [1, 200, 350]
    expected = [sorted_magnitudes(d)[k - 1].item() for d, k in zip(deltas.values(), ranks, strict=True)]
    assert kth_magnitude(tvs, ranks).tolist() == expected


@pytest.mark.parametrize("rows", [2**18 // 64 - 1, 2**18 // 64, 2**18 // 64 + 1])
def test_the_threshold_is_exact_across_block_borders(rows: int) -> None:
    w = uniform((rows, 64), "border") - 0.5
    k = w.numel() - w.numel() // 5
    assert kth_magnitude(StateDict({"w": w}), k).item() == sorted_magnitudes(w)[k - 1].item()


def test_tensors_without_entries_and_without_dimensions_are_counted_right() -> None:
    base = {"none": torch.zeros(0, 4), "number": torch.tensor(0.0), "w": torch.zeros(2)}
    expert = {"none": torch.zeros(0, 4), "number": torch.tensor(3.0), "w": torch.tensor([1.0, -2.0])}
    tvs = task_vectors(base, {"a": expert, "b": expert})
    assert kth_magnitude(tvs, 2).tolist() == [2.0, 2.0]
    assert kth_magnitude(StateDict(expert), 3).tolist() == [3.0]


def test_total_adds_in_float64() -> None:
    w = torch.tensor([1e8, 1.0, -1e8, 1.0])
    assert total(StateDict({"w": w}), lambda t: t.double().sum()).item() == 2.0
    assert total(StateDict({}), torch.sum).item() == 0.0


def test_total_hands_task_vectors_over_stacked() -> None:
    tvs = task_vectors({"w": torch.zeros(2)}, {"a": {"w": torch.ones(2)}, "b": {"w": torch.full((2,), 3.0)}})
    assert total(tvs, lambda tau: tau.sum(1)).tolist() == [2.0, 6.0]


def test_later_measures_once_and_only_when_asked() -> None:
    calls: list[int] = []

    def measure() -> Tensor:
        calls.append(1)
        return torch.tensor(2.0)

    number = later(measure)
    assert not calls
    assert [number().item(), number().item()] == [2.0, 2.0]
    assert len(calls) == 1
