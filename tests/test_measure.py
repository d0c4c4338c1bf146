"""Exact numbers over a whole model."""

import pytest
import torch
from torch import Tensor

from calmerge import StateDict, task_vectors
from calmerge._measure import kth_magnitude, pending, settle, total
from calmerge._random import uniform


def sorted_magnitudes(*tensors: Tensor) -> Tensor:
    return torch.cat([t.float().flatten() for t in tensors]).abs().sort().values


@pytest.mark.parametrize("k", [1, 2, 500, 999, 1000])
def test_kth_magnitude_is_the_kth_of_a_sort(k: int) -> None:
    a, b = uniform((20, 30), "a") - 0.5, uniform((400,), "b") - 0.5
    found = kth_magnitude(StateDict({"a": a, "b": b}), k).value()
    assert found.tolist() == [sorted_magnitudes(a, b)[k - 1].item()]


@pytest.mark.parametrize("k", range(1, 8))
def test_equal_magnitudes_and_zeros_of_both_signs_count_each(k: int) -> None:
    w = torch.tensor([0.0, -0.0, 1.0, -1.0, 1.0, 2.0, -3.0])
    assert kth_magnitude(StateDict({"w": w}), k).value().item() == [0, 0, 1, 1, 1, 2, 3][k - 1]


@pytest.mark.parametrize("k", [1, 4, 6])
def test_all_zeros_have_threshold_zero(k: int) -> None:
    assert kth_magnitude(StateDict({"w": torch.zeros(2, 3)}), k).value().item() == 0.0


def test_magnitudes_that_differ_in_the_last_bit_are_told_apart() -> None:
    one, next_up = torch.tensor(1.0), torch.nextafter(torch.tensor(1.0), torch.tensor(2.0))
    weights = StateDict({"w": torch.stack([next_up, -one])})
    assert kth_magnitude(weights, 1).value().item() == 1.0
    assert kth_magnitude(weights, 2).value().item() == next_up.item()


def test_the_smallest_and_the_largest_floats_are_ranked() -> None:
    tiny, huge = 1e-45, torch.finfo(torch.float32).max
    weights = StateDict({"w": torch.tensor([-huge, tiny, 0.0])})
    assert kth_magnitude(weights, 2).value().item() == torch.tensor(tiny).item()
    assert kth_magnitude(weights, 3).value().item() == huge


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_low_precision_is_ranked_by_its_float32_value(dtype: torch.dtype) -> None:
    w = (uniform((3000,), "low") - 0.5).to(dtype)
    for k in (1, 1700, 3000):
        assert kth_magnitude(StateDict({"w": w}), k).value().item() == sorted_magnitudes(w)[k - 1].item()


def test_every_task_has_its_own_threshold_and_may_have_its_own_rank() -> None:
    deltas = {t: uniform((50, 7), t) - 0.5 for t in "abc"}
    tvs = task_vectors({"w": torch.zeros(50, 7)}, {t: {"w": d} for t, d in deltas.items()})
    assert kth_magnitude(tvs, 100).value().tolist() == [sorted_magnitudes(d)[99].item() for d in deltas.values()]
    ranks = [1, 200, 350]
    expected = [sorted_magnitudes(d)[k - 1].item() for d, k in zip(deltas.values(), ranks, strict=True)]
    assert kth_magnitude(tvs, ranks).value().tolist() == expected


@pytest.mark.parametrize("rows", [2**18 // 64 - 1, 2**18 // 64, 2**18 // 64 + 1])
def test_the_threshold_is_exact_across_block_borders(rows: int) -> None:
    w = uniform((rows, 64), "border") - 0.5
    k = w.numel() - w.numel() // 5
    assert kth_magnitude(StateDict({"w": w}), k).value().item() == sorted_magnitudes(w)[k - 1].item()


def test_tensors_without_entries_and_without_dimensions_are_counted_right() -> None:
    base = {"none": torch.zeros(0, 4), "number": torch.tensor(0.0), "w": torch.zeros(2)}
    expert = {"none": torch.zeros(0, 4), "number": torch.tensor(3.0), "w": torch.tensor([1.0, -2.0])}
    tvs = task_vectors(base, {"a": expert, "b": expert})
    assert kth_magnitude(tvs, 2).value().tolist() == [2.0, 2.0]
    assert kth_magnitude(StateDict(expert), 3).value().tolist() == [3.0]


def test_total_adds_in_float64() -> None:
    w = torch.tensor([1e8, 1.0, -1e8, 1.0])
    assert total(StateDict({"w": w}), lambda t: t.double().sum()).value().item() == 2.0
    assert total(StateDict({}), torch.sum).value().item() == 0.0


def test_total_hands_task_vectors_over_stacked() -> None:
    tvs = task_vectors({"w": torch.zeros(2)}, {"a": {"w": torch.ones(2)}, "b": {"w": torch.full((2,), 3.0)}})
    assert total(tvs, lambda tau: tau.sum(1)).value().tolist() == [2.0, 6.0]


def test_a_measure_is_found_once_and_only_when_asked() -> None:
    calls: list[int] = []

    def count(w: Tensor) -> Tensor:
        calls.append(1)
        return w.sum()

    number = total(StateDict({"w": torch.ones(2)}), count)
    assert not calls
    assert [number.value().item(), number.value().item()] == [2.0, 2.0]
    assert len(calls) == 1


def test_measures_over_the_same_weights_share_one_pass() -> None:
    reads: list[str] = []
    counted = StateDict({"w": torch.tensor([3.0, -4.0])}).map(lambda w, site: reads.append(site.name) or w)
    one, two = total(counted, torch.sum), total(counted, lambda w: w.abs().sum())
    settle([one, two.map(torch.sqrt)])
    assert (one.value().item(), two.value().item(), reads) == (-1.0, 7.0, ["w"])


def test_a_measure_over_measured_weights_comes_after() -> None:
    weights = StateDict({"a": torch.tensor([1.0, 3.0]), "b": torch.tensor([4.0])})
    norm = total(weights, lambda w: w.sum())
    scaled = weights.map(lambda w, n, site: w / n.float(), norm)
    share = total(scaled, lambda w: w.max())
    assert pending([share]) == [norm, share]
    assert share.value().item() == 3 / 8 + 0.5
    assert pending([share]) == []


def test_float_sums_do_not_depend_on_threads() -> None:
    weights = StateDict({"w": uniform((3 * 2**18, 2), 0)})
    found = []
    for threads in (1, 4):
        number = total(weights, lambda w: w.double().sum())
        settle([number], threads=threads)
        found.append(number.value().item())
    assert found[0] == found[1]


def test_an_error_in_a_pass_reaches_the_caller() -> None:
    number = total(StateDict({"w": torch.ones(2)}), lambda w: 1 / 0)  # type: ignore[arg-type, return-value]
    with pytest.raises(ZeroDivisionError):
        number.value()
