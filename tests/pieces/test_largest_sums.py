"""The largest entries and sums over them, in one pass: the same as in passes of their own."""

import numpy as np
import pytest
import torch
from torch import Tensor

from calmerge import StateDict, TaskVectors, Weights, task_vectors
from calmerge import _rank as rank_file
from calmerge._measure import settle, total
from calmerge._plan import plan
from calmerge._random import uniform
from calmerge._rank import Bracket
from calmerge._weights import Site
from calmerge.methods.sce import sce
from calmerge.pieces import largest_sums as sums_file
from calmerge.pieces.blend import sums
from calmerge.pieces.largest import largest
from calmerge.pieces.largest_sums import largest_and_sums
from calmerge.pieces.mask import masked


@pytest.fixture
def large(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes small tensors count as large ones, of which a sample is taken."""
    monkeypatch.setattr(sums_file, "_SAMPLED", 1000)
    monkeypatch.setattr(rank_file, "_PROBE", 128)


def one(*, steps: int = 0, zeros: float = 0.0) -> tuple[Weights, TaskVectors]:
    """Magnitudes, with `steps` few distinct ones, and a share of rows of zeros; and two tasks' numbers."""
    size = uniform((90, 100), "size") - 0.5
    size = (size * steps).round() / steps if steps else size
    size = size * (uniform((90, 1), "zeros") >= zeros)
    experts = {task: {"w": uniform((90, 100), task)} for task in "xy"}
    return StateDict({"w": size}), task_vectors({"w": torch.zeros(90, 100)}, experts)


def apart(weights: Weights, share: float, beside: TaskVectors) -> tuple[Tensor, Tensor]:
    kept = largest(weights, lambda name, n: share)
    selected = beside.transform(lambda x, stays, site: masked(x, stays), kept)
    return kept["w"], total(selected, sums).value()


def check(weights: Weights, share: float, beside: TaskVectors) -> None:
    kept, found = largest_and_sums(weights, share, beside)
    expected, added = apart(weights, share, beside)
    assert torch.equal(kept["w"], expected)
    torch.testing.assert_close(found.measures["w"].value(), added, rtol=1e-14, atol=0)


@pytest.mark.parametrize("share", [1e-6, 0.01, 0.5, 0.999])
@pytest.mark.parametrize("steps", [0, 16])
def test_sums_over_the_largest_are_those_of_passes_of_their_own(share: float, steps: int, large: None) -> None:
    weights, beside = one(steps=steps)
    check(weights, share, beside)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_one_pass_is_the_rule(share: float, large: None, monkeypatch: pytest.MonkeyPatch) -> None:
    weights, beside = one(zeros=0.3)
    monkeypatch.setattr(sums_file, "_apart", None)
    check(weights, share, beside)


def test_the_share_is_one_of_the_entries_other_than_0_where_rows_are_0(large: None) -> None:
    weights, beside = one(zeros=0.7)
    varying = int((weights["w"] != 0).sum())
    kept, _ = largest_and_sums(weights, 0.5, beside)
    assert int(kept["w"].sum()) == varying // 2
    check(weights, 0.5, beside)


def test_of_small_tensors_all_entries_are_taken_along() -> None:
    weights, beside = one(steps=16)
    check(weights, 0.3, beside)


def test_nothing_stays_of_a_tensor_of_zeros(large: None) -> None:
    _, beside = one()
    kept, found = largest_and_sums(StateDict({"w": torch.zeros(90, 100)}), 0.5, beside)
    assert not kept["w"].any()
    assert found.measures["w"].value().tolist() == [0, 0]


@pytest.mark.parametrize("wrong", [(0.0, 0.1), (0.4, 0.5)])
def test_where_the_sample_misled_both_are_found_all_the_same(
    wrong: tuple[float, float], large: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    low, high = (int(np.float32(v).view(np.int32)) for v in wrong)
    monkeypatch.setattr(sums_file, "guessed", lambda *_: Bracket(low, high, 10))
    weights, beside = one()
    check(weights, 0.5, beside)


@pytest.mark.parametrize("most", [10, 10_000])
def test_where_too_much_would_be_taken_along_there_are_more_passes(
    most: int, large: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before the sample, and after it where half of all magnitudes are equal."""
    monkeypatch.setattr(sums_file, "_ALONG", most)
    weights, beside = one(steps=2)
    check(weights, 0.3, beside)


def test_weights_that_are_only_read_whole_are_not_sampled(large: None, monkeypatch: pytest.MonkeyPatch) -> None:
    weights, beside = one()
    monkeypatch.setattr(sums_file, "sample", None)
    check(weights, 0.5, beside.transform(lambda x, site: x, elementwise=False))


def test_compiled_and_plain_take_the_same_along(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("calmerge._machine")
    size, rows = uniform((1003,), "size") - 0.5, torch.stack([uniform((1003,), t) for t in "xyz"])
    low, high = (int(np.float32(v).view(np.int32)) for v in (0.2, 0.25))
    part = sums_file._Part(Bracket(low, high, 10), 3)
    compiled = part(size, rows, Site("", 7))
    monkeypatch.setattr(sums_file, "kernels", lambda: None)
    plain = part(size, rows, Site("", 7))
    assert compiled[:2] == plain[:2] == (0, int((size.abs() < 0.2).sum()))
    assert compiled.above.tolist() == plain.above.tolist()
    assert all(np.array_equal(a, b) for a, b in zip(compiled.inside, plain.inside, strict=True))
    inside = (size.abs() >= 0.2) & (size.abs() <= 0.25)
    assert plain.inside[-1].tolist() == (inside.nonzero()[:, 0] + 7).tolist()
    assert torch.equal(torch.from_numpy(plain.inside[1]), rows[1, inside])


def test_sce_reads_its_inputs_twice() -> None:
    tvs = one()[1]
    assert plan(sce(tvs, select_topk=0.5)).passes == 2


@pytest.mark.parametrize("misled", [False, True])
@pytest.mark.parametrize("threads", [1, 4])
def test_threads_change_no_bit(threads: int, misled: bool, large: None, monkeypatch: pytest.MonkeyPatch) -> None:
    if misled:
        monkeypatch.setattr(sums_file, "guessed", lambda *_: Bracket(1, 2, 10))
    experts = {t: {f"w{i}": uniform((40 + i, 90), t, i) - 0.5 for i in range(30)} for t in "xyz"}
    tvs = task_vectors({name: torch.zeros_like(w) for name, w in experts["x"].items()}, experts)
    merged = sce(tvs, select_topk=0.4)
    settle([merged], threads=threads)
    alone = sce(tvs.only_names(["w7"]), select_topk=0.4)
    assert torch.equal(merged["w7"], alone["w7"])
