"""Thresholds, and sums that are found along with them: the same as in passes of their own."""

import numpy as np
import pytest
import torch
from torch import Tensor

from calmerge import TaskVectors, task_vectors
from calmerge import _rank as rank_file
from calmerge import _threshold as threshold_file
from calmerge._measure import count, kth_magnitude, settle
from calmerge._plan import plan
from calmerge._random import uniform
from calmerge._rank import Bracket
from calmerge._threshold import Threshold, whole_sum
from calmerge._weights import Site
from calmerge.methods.ties import ties
from calmerge.pieces.elect import elect
from calmerge.pieces.trim import trim


@pytest.fixture(autouse=True)
def large(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes small vectors count as large ones, of which a sample is taken."""
    monkeypatch.setattr(rank_file, "_GATHERED", 3000)
    monkeypatch.setattr(rank_file, "_PROBE", 128)


def vectors(*, steps: int = 0) -> TaskVectors:
    """Three of them; with `steps` of few distinct magnitudes."""
    experts: dict[str, dict[str, Tensor]] = {}
    for task in "xyz":
        made = {n: uniform((90, 100), task, n) - 0.5 for n in ("a", "b")}
        experts[task] = {n: (w * steps).round() / steps if steps else w for n, w in made.items()}
    return task_vectors({n: torch.zeros(90, 100) for n in ("a", "b")}, experts)


def reached(tau: Tensor, at: Tensor) -> Tensor:
    """How many of the tasks an entry reaches the threshold in."""
    return (tau.abs() >= at.reshape(-1, *[1] * (tau.dim() - 1))).float().sum(0)


def both(tvs: TaskVectors, k: int) -> tuple[list[float], float]:
    threshold = Threshold(tvs, k)
    number = threshold.total(reached, tvs.reduce(lambda tau, at, site: reached(tau, at), threshold))
    settle([number])
    return threshold.value().tolist(), number.value().item()


def alone(tvs: TaskVectors, k: int) -> tuple[list[float], float]:
    threshold = kth_magnitude(tvs, k)
    number = count(tvs.reduce(lambda tau, at, site: reached(tau, at), threshold), whole_sum)
    return threshold.value().tolist(), number.value().item()


@pytest.mark.parametrize("steps", [0, 16])
@pytest.mark.parametrize("k", [1, 9000, 14_400, 18_000])
def test_a_sum_along_with_a_threshold_is_that_of_a_pass_of_its_own(k: int, steps: int) -> None:
    assert both(vectors(steps=steps), k) == alone(vectors(steps=steps), k)


def test_compiled_and_plain_take_the_same_along(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("calmerge._machine")
    tau = torch.stack([uniform((1003,), t) - 0.5 for t in "xyz"])
    bits = np.array([[0.2, 0.1, 0.3], [0.25, 0.1, 0.31]], np.float32).view(np.int32)
    part = threshold_file._Part(bits)
    compiled = part(tau, tau[0], Site("", 0))
    monkeypatch.setattr(threshold_file, "kernels", lambda: None)
    plain = part(tau, tau[0], Site("", 0))
    assert all(np.array_equal(a, b) for a, b in zip(compiled, plain, strict=True))
    inside = (tau.abs() >= torch.tensor([[0.2], [0.1], [0.3]])) & (tau.abs() <= torch.tensor([[0.25], [0.1], [0.31]]))
    assert torch.equal(torch.from_numpy(plain[1]), tau[:, inside.any(0)])


@pytest.mark.parametrize("wrong", [(0.0, 0.1), (0.4, 0.5)])
def test_where_the_sample_misled_both_are_found_all_the_same(
    wrong: tuple[float, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    low, high = (int(np.float32(v).view(np.int32)) for v in wrong)
    monkeypatch.setattr(rank_file, "guessed", lambda *_: Bracket(low, high, 10))
    assert both(vectors(), 9000) == alone(vectors(), 9000)


def test_where_too_much_lies_inside_the_sum_has_its_own_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    wide = Bracket(0, int(np.float32(0.5).view(np.int32)), 18_000)
    monkeypatch.setattr(rank_file, "guessed", lambda *_: wide)
    monkeypatch.setattr(threshold_file, "usually_inside", lambda *_: 10)
    assert both(vectors(), 9000) == alone(vectors(), 9000)


def test_where_too_much_would_be_taken_along_a_plan_counts_the_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threshold_file, "_BESIDE", 100)
    assert plan(ties(vectors())).passes == 3
    assert both(vectors(), 9000) == alone(vectors(), 9000)


def test_one_sum_goes_along_and_others_have_their_own_pass() -> None:
    tvs = vectors()
    threshold = Threshold(tvs, 9000)
    exact = tvs.reduce(lambda tau, at, site: reached(tau, at), threshold)
    first, second = (threshold.total(reached, exact) for _ in range(2))
    settle([first, second])
    late = threshold.total(reached, exact)
    assert [m.passes for m in (first, second, late)] == [0, 1, 1]
    assert first.value() == second.value() == late.value()


def test_ties_reads_its_inputs_twice() -> None:
    assert plan(ties(vectors())).passes == 2


def test_vectors_that_something_was_done_to_after_trimming_have_no_cut() -> None:
    trimmed = trim(vectors())
    assert trimmed.cut is not None
    assert trimmed.transform(lambda tau, site: tau).cut is None
    assert trimmed.only(["x"]).cut is None


@pytest.mark.parametrize("steps", [0, 8])
def test_majority_signs_are_those_of_an_election_that_knows_of_no_cut(steps: int) -> None:
    trimmed = trim(vectors(steps=steps), keep=0.3)
    other = trimmed.transform(lambda tau, site: tau)
    for name in ("a", "b"):
        assert torch.equal(elect(trimmed)[name], elect(other)[name])


def test_the_majority_of_some_tensors_is_counted_over_these_alone() -> None:
    experts = {t: {"a": uniform((90, 100), t), "b": -2 * uniform((90, 100), t, 2)} for t in "xyz"}
    trimmed = trim(task_vectors({n: torch.zeros(90, 100) for n in "ab"}, experts), keep=0.3)
    assert set(elect(trimmed.only_names(["a"]))["a"].unique().tolist()) == {1.0}  # where nothing is left too
    assert set(elect(trimmed)["a"].unique().tolist()) == {-1.0, 1.0}
