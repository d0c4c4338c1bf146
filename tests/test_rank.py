"""The k-th magnitude, by every way in which it may be found."""

import numpy as np
import pytest
import torch
from torch import Tensor

from calmerge import StateDict, TaskVectors, Weights, task_vectors
from calmerge import _rank as rank
from calmerge._measure import kth_magnitude, per_tensor, settle
from calmerge._random import uniform


def model(seed: int = 0) -> dict[str, Tensor]:
    """Tensors of many shapes and scales; every fourth has few distinct values, as differences of bfloat16 have."""
    shapes = {"norm": (64,), "a": (300, 64), "b": (64, 500), "empty": (0, 3), "one": (), "c": (7, 5, 3, 90)}
    found = {}
    for i, (name, shape) in enumerate(shapes.items()):
        w = (uniform(shape, seed, name) - 0.5) * 4.0**-i
        found[name] = (w * 64).round() / 64 if i % 4 == 1 else w
    return found


def vectors() -> TaskVectors:
    base = {name: torch.zeros_like(w) for name, w in model().items()}
    return task_vectors(base, {"x": model(1), "y": model(2), "z": {n: w * 0.01 for n, w in model(3).items()}})


def nth(weights: Weights, k: int) -> list[float]:
    rows = torch.cat([w.reshape(3, -1) for w in weights.values()], 1).abs()
    return rows.sort(1).values[:, k - 1].tolist()


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Makes a small model count as a large one; counts the passes over it."""
    monkeypatch.setattr(rank, "_GATHERED", 3000)
    monkeypatch.setattr(rank, "_PROBE", 128)
    made: list[int] = []

    class Counted(rank._Search):
        def __init__(self, *args: object) -> None:
            made.append(1)
            super().__init__(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(rank, "_Search", Counted)
    return made


RANKS = [1, 2, 500, 30_000, 55_000, 60_713, 60_714, 60_715]


@pytest.mark.parametrize("k", RANKS)
def test_small_weights_are_gathered_and_partitioned(k: int) -> None:
    tvs = vectors()
    assert kth_magnitude(tvs, k).value().tolist() == nth(tvs, k)


@pytest.mark.parametrize("bins", [4, 10, 18])
@pytest.mark.parametrize("k", RANKS)
def test_a_bracket_of_a_sample_finds_it_with_any_number_of_bins(
    k: int, bins: int, passes: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rank, "_COUNTERS", 2 << bins)
    tvs = vectors()
    assert kth_magnitude(tvs, k).value().tolist() == nth(tvs, k)


def test_one_pass_is_the_rule(passes: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rank, "_GATHERED", 100_000)
    w = uniform((3000, 100), "smooth") - 0.5
    assert kth_magnitude(StateDict({"w": w}), 240_000).value().item() == w.flatten().abs().sort().values[239_999].item()
    assert len(passes) == 1


@pytest.mark.parametrize("wrong", [(0, 0), (0x3F000000, 0x3F000010), (0, 1), (0x7F7FFFFF, 0x7F800000)])
def test_a_rank_outside_the_bracket_is_found_all_the_same(
    wrong: tuple[int, int], passes: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rank, "guessed", lambda sample, k, numel: rank.Bracket(*wrong, 10))
    tvs = vectors()
    for k in (1, 30_000, 60_715):
        assert kth_magnitude(tvs, k).value().tolist() == nth(tvs, k)


def test_weights_that_are_only_read_whole_are_not_sampled(passes: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rank, "sampled", None)
    tvs = vectors().transform(lambda tau, site: tau, elementwise=False)
    assert kth_magnitude(tvs, 30_000).value().tolist() == nth(tvs, 30_000)


def test_every_task_may_have_its_own_rank(passes: list[int]) -> None:
    tvs, ranks = vectors(), [5, 40_000, 60_715]
    assert kth_magnitude(tvs, ranks).value().tolist() == [nth(tvs, k)[t] for t, k in enumerate(ranks)]


def test_a_rank_among_nan_is_nan_and_the_others_are_not(passes: list[int]) -> None:
    w = torch.cat([torch.arange(4000.0), torch.full((5,), float("nan"))])
    assert kth_magnitude(StateDict({"w": w}), 4000).value().item() == 3999
    assert np.isnan(kth_magnitude(StateDict({"w": w}), 4001).value().item())


def test_infinity_is_the_largest(passes: list[int]) -> None:
    w = torch.cat([torch.arange(4000.0), torch.full((5,), -torch.inf)])
    assert kth_magnitude(StateDict({"w": w}), 4001).value().item() == torch.inf


@pytest.mark.parametrize("threads", [1, 2, 4])
def test_thresholds_of_many_tensors_are_found_side_by_side(threads: int, passes: list[int]) -> None:
    weights = StateDict({f"w{i}": uniform((40 + i, 30), i) - 0.5 for i in range(60)})
    cuts = per_tensor(weights, lambda w: kth_magnitude(w, 700))
    settle([cuts], threads=threads)
    kept = weights.map(lambda w, cut, site: w.abs() >= cut, cuts)
    assert [int(w.sum()) for w in kept.values()] == [w.numel() - 699 for w in weights.values()]


def test_numbers_for_a_tensor_may_need_others_for_it() -> None:
    weights: Weights = StateDict({f"w{i}": torch.tensor([1.0, -2.0, 4.0]) for i in range(500)})
    for _ in range(4):
        weights = weights.map(lambda w, cut, site: w / cut, per_tensor(weights, lambda w: kth_magnitude(w, 2)))
    settle([weights])
    assert weights["w7"].tolist() == [0.5, -1.0, 2.0]
