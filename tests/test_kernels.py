"""Compiled loops give what the NumPy lines give that they take the place of, to the bit."""

from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from calmerge import TaskVectors, _random, _rank, task_vectors
from calmerge._compiled import kernels
from calmerge._random import bernoulli, uniform
from calmerge.pieces import largest as largest_file
from calmerge.pieces import magprune as magprune_file
from calmerge.pieces import middle as middle_file
from calmerge.pieces.magprune import keep_by_rank, magprune, ranks
from calmerge.pieces.middle import middle


@pytest.fixture(autouse=True)
def machine() -> ModuleType:
    pytest.importorskip("numba")
    pytest.importorskip("calmerge._machine")
    found = kernels()
    assert found is not None
    return found


def both(monkeypatch: pytest.MonkeyPatch, make: Callable[[], Any]) -> tuple[Any, Any]:
    compiled = make()
    for module in (_random, _rank, largest_file, magprune_file, middle_file):
        monkeypatch.setattr(module, "kernels", lambda: None)
    return compiled, make()


def coarse(*shape: int) -> TaskVectors:
    """Vectors many entries of which are equal, or 0 of either sign."""
    tau = (uniform(shape, "coarse") * 8).floor() - 4
    tau[0, :3] = torch.tensor([-0.0, 0.0, -0.0])
    return task_vectors({"w": torch.zeros(shape)}, {"a": {"w": tau}, "b": {"w": uniform(shape, "fine") - 0.5}})


@pytest.mark.parametrize("offset", [0, 1, 7, 2**31 - 3, 2**32 - 2, 2**33 + 1])
def test_draws_of_one_share(offset: int, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled, plain = both(monkeypatch, lambda: bernoulli((70_001,), 0.3, 0, "w", offset=offset))
    assert torch.equal(compiled, plain)


def test_draws_of_a_share_for_each_with_limits_that_are_met(monkeypatch: pytest.MonkeyPatch) -> None:
    share = uniform((70_001,), "share")
    share[:4] = torch.tensor([0.0, 1.0, 1.0, 0.0])
    compiled, plain = both(monkeypatch, lambda: bernoulli((70_001,), share, 0, "w", offset=3))
    assert torch.equal(compiled, plain)
    assert compiled[:4].tolist() == [False, True, True, False]


def test_brackets_of_ranks_count_and_take_along_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    block = coarse(30, 100)["w"]
    low, high = (int(np.float32(v).view(np.int32)) for v in (1.0, 2.0))
    search = _rank._Search({0: _rank.Bracket(low, high, 100), 1: _rank.Bracket(0, low, 100)}, 2)
    compiled, plain = both(monkeypatch, lambda: search.part(block))
    for t in (0, 1):
        assert compiled[t][:2] == plain[t][:2]
        assert np.array_equal(compiled[t][2], plain[t][2])
    ones_and_twos = int(((block[0].abs() == 1) | (block[0].abs() == 2)).sum())
    assert compiled[0][1] - compiled[0][0] == len(compiled[0][2]) == ones_and_twos


@pytest.mark.parametrize("n", [1, 15, 16, 17, 50])
@pytest.mark.parametrize("guess", [0.0, 1.0, 2.5, 1e9])
def test_every_rank_of_a_row_from_any_guess(machine: ModuleType, n: int, guess: float) -> None:
    row = ((uniform((n,), "row") * 8).floor() - 4).numpy()
    some = np.empty(n + machine.LANES, np.int32)
    near = int(np.float32(guess).view(np.int32))
    found = [machine.nth(row.view(np.int32), rank, near, some) for rank in range(1, n + 1)]
    assert np.array_equal(np.array(found, np.int32).view(np.float32), np.sort(np.abs(row)))


def test_a_magnitude_whose_low_bits_are_0_has_a_bin_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    low, high, between = (int(np.float32(v).view(np.int32)) for v in (1.0, 2.0, 1.0 + 2**-22))

    def found() -> list[_rank.Bracket]:
        bins = _rank._Bins(_rank.Bracket(low, high, 3), 1 << 10)
        bins.add(np.array([between, low, low, between + 1], np.int32))
        return [bins.bracket(rank) for rank in (1, 2, 3)]

    compiled, plain = both(monkeypatch, found)
    assert compiled == plain
    assert [(b.low, b.high) for b in plain] == [(low, low), (low, low), (between, between + 1)]


def test_bins_know_the_one_magnitude_that_they_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    bits = np.array([1.0, 1.5, 1.5, 1.75, 1.75], np.float32).view(np.int32)

    def found() -> list[_rank.Bracket]:
        bins = _rank._Bins(_rank.Bracket(int(bits[0]), int(bits[-1]), 5), 1 << 18)
        bins.add(bits)
        return [bins.bracket(rank) for rank in range(1, 6)]

    compiled, plain = both(monkeypatch, found)
    assert compiled == plain
    assert [(b.low, b.high) for b in plain] == [(bit, bit) for bit in bits]


@pytest.mark.parametrize("remove_first", [True, False])
def test_middles_of_rows(remove_first: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    tvs = coarse(40, 129)

    def found() -> torch.Tensor:
        return middle(tvs, keep=0.3, outliers=0.1, remove_first=remove_first)["w"]

    compiled, plain = both(monkeypatch, found)
    assert torch.equal(compiled.view(torch.int32), plain.view(torch.int32))


@pytest.mark.parametrize("rescale", [True, False])
def test_pruning_by_rank(rescale: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    tvs = coarse(700, 129)
    compiled, plain = both(monkeypatch, lambda: magprune(tvs, rate=0.4, spread=0.3, rescale=rescale, seed=3)["w"])
    assert torch.equal(compiled.view(torch.int32), plain.view(torch.int32))
    assert 0.5 < (compiled[1] != 0).float().mean() < 0.7


def test_pruning_with_chances_of_0_and_1(monkeypatch: pytest.MonkeyPatch) -> None:
    tvs = coarse(20, 50)
    compiled, plain = both(monkeypatch, lambda: keep_by_rank(tvs, [0.5] * 2, [0.5] * 2, rescale=None, seed=0)["w"])
    assert torch.equal(compiled.view(torch.int32), plain.view(torch.int32))
    assert (compiled[1].abs().argmax(-1) == tvs["w"][1].abs().argmax(-1)).all()


def test_ranks_of_equal_magnitudes_go_by_place(monkeypatch: pytest.MonkeyPatch) -> None:
    tensor = torch.tensor([[1.0, -1.0, 1.0, 0.0, -0.0]])
    compiled, plain = both(monkeypatch, lambda: ranks(tensor))
    assert compiled.tolist() == plain.tolist() == [[0.5, 0.75, 1.0, 0.0, 0.25]]


@pytest.mark.parametrize("odd", [torch.inf, torch.nan, 1e30, 1e-42])
def test_order_of_rows_whose_magnitudes_lie_far_apart(odd: float, monkeypatch: pytest.MonkeyPatch) -> None:
    near = torch.cat([torch.full((300,), odd), 1 + 1e-5 * uniform((3000,), "near"), -uniform((700,), "spread")])
    rows = torch.stack([near, near.flip(0), (20 * (uniform((4000,), "wide") - 0.5)).exp(), torch.zeros(4000)])
    compiled, plain = both(monkeypatch, lambda: magprune_file._ordered(rows))
    assert np.array_equal(compiled, plain)
    assert (np.diff(compiled[:3]) > 0).all()


@pytest.mark.parametrize("n", [2**16 - 1, 2**16, 2**24 + 4])
def test_order_of_rows_longer_than_what_few_bits_count(n: int) -> None:
    row = torch.ones(1, n)
    row[0, 0] = 100
    places = magprune_file._ordered(row)[0] & 0xFFFFFFFF
    assert np.array_equal(places, np.roll(np.arange(n), -1))


@pytest.mark.parametrize("n", [1, 20, 5000])
def test_a_rank_of_many_magnitudes(n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    row = (uniform((n,), "magnitudes") * 300).floor().numpy()
    row[n // 2 :] = 0
    ranks = sorted({1, 1 + n // 3, n - n // 5, n})
    compiled, plain = both(monkeypatch, lambda: [_rank.nth(row, rank) for rank in ranks])
    assert compiled == plain == np.sort(row)[[rank - 1 for rank in ranks]].tolist()


def test_first_of_the_spread_indices_beyond_2_to_the_32(monkeypatch: pytest.MonkeyPatch) -> None:
    for offset in (0, 5, 2**32 - 10, 2**32 + 3):

        def made(at: int = offset) -> Any:
            found = np.empty(1000, np.uint8)
            largest_file._first(2**30, at, found)
            return found

        compiled, plain = both(monkeypatch, made)
        monkeypatch.undo()
        assert np.array_equal(compiled, plain)
        assert 200 < compiled.sum() < 300
