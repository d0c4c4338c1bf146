"""The exact number of largest entries of every tensor, whatever ties and however it is read."""

import pytest
import torch
from torch import Tensor

from calmerge import StateDict, TaskVectors, task_vectors
from calmerge._measure import settle
from calmerge._random import uniform
from calmerge._weights import blocks
from calmerge.pieces.largest import keep_largest, largest


def vectors(*rows: Tensor) -> TaskVectors:
    return task_vectors({"w": torch.zeros_like(rows[0])}, {f"t{i}": {"w": r} for i, r in enumerate(rows)})


def kept(tau: Tensor, k: int) -> Tensor:
    return keep_largest(vectors(tau), lambda name, n: [k])["w"][0] != 0


@pytest.mark.parametrize("k", [0, 1, 499, 500, 501, 999, 1000])
def test_exactly_as_many_stay_where_half_of_all_magnitudes_are_equal(k: int) -> None:
    """Weights stored in few bits give deltas with few values."""
    tau = torch.where(uniform((1000,), "half") < 0.5, 1.0, (uniform((1000,), "rest") * 8).floor() / 4 + 0.125)
    tau = tau * torch.where(uniform((1000,), "sign") < 0.5, -1.0, 1.0)
    chosen = kept(tau, k)
    assert int(chosen.sum()) == k
    if 0 < k < 1000:
        assert tau[chosen].abs().min() >= tau[~chosen].abs().max()


def test_equal_magnitudes_stay_evenly_spread_over_the_tensor() -> None:
    chosen = kept(torch.ones(100_000), 30_000)
    assert int(chosen.sum()) == 30_000
    per_part = chosen.reshape(100, 1000).sum(1)
    assert per_part.min() >= 297
    assert per_part.max() <= 303


def test_the_choice_among_many_equal_ones_is_exact_beyond_two_to_the_sixteen() -> None:
    """Where a bin of the spread indices holds several of them, it is counted out."""
    assert int(kept(torch.ones(200_000), 77_777).sum()) == 77_777


def test_a_cut_at_zero_keeps_every_entry_that_is_not() -> None:
    assert kept(torch.tensor([0.0, 2.0, 0.0, -1.0]), 3).tolist() == [False, True, False, True]


def test_every_task_has_its_own_count() -> None:
    tvs = vectors(torch.tensor([3.0, 1.0, 2.0]), torch.tensor([-3.0, 1.0, 2.0]), torch.ones(3))
    assert keep_largest(tvs, lambda name, n: [1, n, 0])["w"].tolist() == [[3, 0, 0], [-3, 1, 2], [0, 0, 0]]


def test_every_tensor_has_its_own_cut() -> None:
    weights = StateDict({"a": torch.tensor([9.0, 8.0]), "b": torch.tensor([0.1, 0.2])})
    mask = largest(weights, lambda name, n: [1])
    assert {n: mask[n].tolist() for n in mask} == {"a": [True, False], "b": [False, True]}


def test_a_share_is_one_of_the_entries_that_are_not_0(monkeypatch: pytest.MonkeyPatch) -> None:
    weights = StateDict({"w": torch.tensor([0.0, 3.0, 1.0, 2.0])})
    for held in (0, 100):
        monkeypatch.setattr("calmerge.pieces.largest._HELD", held)
        assert largest(weights, lambda name, n: 0.7)["w"].tolist() == [False, True, False, True]


def test_a_tensor_that_can_be_held_gets_the_cut_of_one_that_cannot(monkeypatch: pytest.MonkeyPatch) -> None:
    tau = (uniform((64, 40), "coarse") * 4).floor() - 1.5
    for counts in (0.3, [700], [0], [2560], [1]):
        monkeypatch.setattr("calmerge.pieces.largest._HELD", 1 << 22)
        at_once = keep_largest(vectors(tau), lambda name, n, k=counts: k)["w"]
        monkeypatch.setattr("calmerge.pieces.largest._HELD", 0)
        assert torch.equal(at_once, keep_largest(vectors(tau), lambda name, n, k=counts: k)["w"])


def test_any_block_and_any_number_of_threads_give_the_same_choice() -> None:
    tau = (uniform((64, 40), "coarse") * 4).floor() - 1.5
    whole = keep_largest(vectors(tau), lambda name, n: [n // 3])
    expected = whole["w"]
    for threads, size in ((1, 40), (2, 300), (4, 2**18)):
        again = keep_largest(vectors(tau), lambda name, n: [n // 3])
        settle([again], threads=threads)
        parts = [again.read(name, rows) for name, rows in blocks(again, size=size)]
        assert torch.equal(torch.cat(parts, 1), expected)


def test_a_number_without_dimensions_and_an_empty_tensor_are_cut_too() -> None:
    tvs = task_vectors(
        {"one": torch.tensor(0.0), "none": torch.zeros(0, 3)},
        {"a": {"one": torch.tensor(2.0), "none": torch.zeros(0, 3)}},
    )
    assert keep_largest(tvs, lambda name, n: [n])["one"].tolist() == [2.0]
    assert keep_largest(tvs, lambda name, n: [0])["one"].tolist() == [0.0]
    assert keep_largest(tvs, lambda name, n: [1])["none"].shape == (1, 0, 3)
