"""DELLA: the worked checks and traps of its specification."""

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from calmerge import TaskVectors, UsageError, dare, della, della_linear, task_arithmetic, task_vectors
from calmerge._random import uniform
from calmerge.pieces.drop import drop_and_rescale
from calmerge.pieces.magprune import keep_by_rank, magprune, ranks

near = partial(torch.testing.assert_close, rtol=0, atol=1e-6)


def vectors(*rows: Any) -> TaskVectors:
    tensors = [torch.as_tensor(r) for r in rows]
    return task_vectors({"w": torch.zeros_like(tensors[0])}, {f"t{i}": {"w": t} for i, t in enumerate(tensors)})


def share_kept(tvs: TaskVectors, runs: int = 400, **options: Any) -> Tensor:
    return torch.stack([magprune(tvs, seed=s, **options)["w"][0] != 0 for s in range(runs)]).double().mean(0)


def test_ranks_are_counted_within_each_row() -> None:
    found = ranks(torch.tensor([[-4.0, 1.0, 2.0], [0.1, -0.3, 0.2]]))
    assert found.tolist() == [[1.0, 0.0, 0.5], [0.0, 1.0, 0.5]]


def test_equal_magnitudes_rank_by_place() -> None:
    assert ranks(torch.tensor([1.0, -1.0, 1.0])).tolist() == [0.0, 0.5, 1.0]


def test_a_vector_is_one_row() -> None:
    assert ranks(torch.tensor([5.0, 3.0, 4.0])).tolist() == [1.0, 0.0, 0.5]


def test_ranks_are_those_of_a_sort() -> None:
    tau = uniform((7, 100), "rank") - 0.5
    expected = tau.abs().argsort(dim=1).argsort(dim=1) / 99
    near(ranks(tau), expected.float())


def test_small_entries_are_dropped_more_often() -> None:
    """p from 0.7 for the smallest to 0.3 for the largest: 30 %, 50 % and 70 % stay."""
    kept = share_kept(vectors([[1.0, 3.0, 2.0]] * 20), rate=0.5, spread=0.4).mean(0)
    torch.testing.assert_close(kept, torch.tensor([0.3, 0.7, 0.5]).double(), rtol=0, atol=0.03)


def test_the_mean_over_draws_is_the_task_vector() -> None:
    tau = uniform((4, 6), "tau") + 0.5
    draws = torch.stack([magprune(vectors(tau), rate=0.6, spread=0.3, seed=s)["w"][0] for s in range(3000)])
    error = draws.std(0) / 3000**0.5
    assert ((draws.mean(0) - tau).abs() <= 5 * error).all()


def test_without_spread_it_is_dare_draw_for_draw() -> None:
    tvs = vectors(uniform((5, 9), "a") - 0.5, uniform((5, 9), "b") - 0.5)
    one, two = magprune(tvs, rate=0.3, spread=0.0, seed=4), drop_and_rescale(tvs, rate=0.3, seed=4)
    assert torch.equal(one["w"] != 0, two["w"] != 0)
    near(one["w"], two["w"])
    near(
        della_linear(tvs, rate=0.3, spread=0.0, scale=1.0, seed=4)["w"],
        dare(tvs, rate=0.3, inner=partial(task_arithmetic, scale=1.0), seed=4)["w"],
    )


def test_a_row_of_one_entry_is_kept() -> None:
    """Its rank would be 0/0."""
    tau = torch.arange(1.0, 9.0)[:, None]
    assert torch.equal(magprune(vectors(tau), rate=0.9, spread=0.1)["w"][0], tau)
    assert magprune(vectors(torch.tensor(2.0)), rate=0.9, spread=0.1)["w"].tolist() == [2.0]


def test_what_stays_is_divided_by_its_own_probability() -> None:
    """Ranks 0 and 1 with p from 0.6 to 0.4."""
    for seed in range(20):
        out = magprune(vectors([[1.0, 2.0]] * 8), rate=0.5, spread=0.2, seed=seed)["w"][0]
        assert all(min(abs(x - y) for y in (0.0, 1 / 0.4)) < 1e-5 for x in out[:, 0].tolist())
        assert all(min(abs(x - y) for y in (0.0, 2 / 0.6)) < 1e-5 for x in out[:, 1].tolist())


def test_without_rescale_nothing_is_divided() -> None:
    assert magprune(vectors(torch.ones(50)), rate=0.5, rescale=False)["w"].unique().tolist() == [0.0, 1.0]


@pytest.mark.parametrize(("rate", "spread"), [(0.05, 0.2), (0.95, 0.2)])
@pytest.mark.parametrize("method", [magprune, della, della_linear])
def test_probabilities_out_of_range_are_refused(method: Any, rate: float, spread: float) -> None:
    with pytest.raises(UsageError, match=r"drop probabilities from .* must lie in"):
        method(vectors([1.0]), rate=rate, spread=spread)


def test_each_task_and_tensor_has_its_own_draw_whatever_the_order() -> None:
    tau = uniform((40,), "draw")
    one = keep_by_rank(vectors(tau, tau), [0.5, 0.5], [0.1, 0.1], rescale=None, seed=1)
    assert not torch.equal(one["w"][0], one["w"][1])
    swapped = one.only(["t1", "t0"])
    assert torch.equal(swapped["w"][0], one["w"][1])
    again = magprune(vectors(tau, tau).only(["t1", "t0"]), rate=0.5, spread=0.2, rescale=False, seed=1)
    assert torch.equal(again["w"], swapped["w"])


def test_della_elects_and_averages_what_agrees_and_a_sum_of_0_counts_as_plus() -> None:
    tvs = vectors([1.0, 2.0, -1.0, -3.0], [3.0, -4.0, -1.0, 3.0])
    assert della(tvs, rate=0.0, spread=0.0, scale=0.5)["w"].tolist() == [1.0, -2.0, -0.5, 1.5]
    assert della_linear(tvs, rate=0.0, spread=0.0, scale=0.5)["w"].tolist() == [2.0, -1.0, -1.0, 0.0]


def test_rows_without_entries() -> None:
    tvs = vectors(torch.ones(3, 0), torch.ones(3, 0))
    assert della(tvs)["w"].shape == (3, 0)
