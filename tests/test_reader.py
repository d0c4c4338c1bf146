"""A tape is taken down once for all tensors that are treated alike, and for no others."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import calmerge
from calmerge import StateDict, _compiled, add, task_vectors
from calmerge._measure import per_tensor, settle, total
from calmerge._random import uniform
from calmerge._reader import Reader
from calmerge._weights import ALL, Gathered, Site, Weights
from calmerge.methods import METHODS
from calmerge.pieces.drop import drop
from calmerge.pieces.largest import largest

ALIKE = {name: torch.full((400, 128), float(i)) for i, name in enumerate("abc", 1)}
LOOKS: dict[str, Callable[[Site], bool]] = {
    "its name": lambda site: site.name == "b", "its first field": lambda site: site[0] == "b",
    "both fields": lambda site: next(iter(site)) == "b", "where it is": lambda site: site.offset == 0,
    "all of it": lambda site: site == Site("b", 0), "its hash": lambda site: site in {Site("b", 0)},
}  # fmt: skip


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The tensors of which a tape was taken down."""
    pytest.importorskip("numba")
    monkeypatch.setattr(_compiled, "LARGE", 0)
    names: list[str] = []
    recorded = Reader._recorded

    def noted(self: Reader, name: str) -> Any:
        names.append(name)
        return recorded(self, name)

    monkeypatch.setattr(Reader, "_recorded", noted)
    return names


def read(weights: Weights) -> dict[str, Tensor]:
    """Every tensor in two blocks, by tapes."""
    reader = Reader([weights])
    return {n: torch.cat([reader.read(n, slice(0, 100))[0], reader.read(n, slice(100, 400))[0]]) for n in weights}


def test_tensors_that_are_treated_alike_have_one_tape(taken: list[str]) -> None:
    found = read(StateDict(ALIKE).map(lambda w, site: w * 2))
    assert taken == ["a"]
    assert {name: w.unique().item() for name, w in found.items()} == {"a": 2.0, "b": 4.0, "c": 6.0}


def test_tensors_of_another_shape_or_type_have_their_own(taken: list[str]) -> None:
    other = {"wide": torch.ones(400, 256), "half": torch.ones(400, 128, dtype=torch.bfloat16)}
    found = read(StateDict(ALIKE | other).map(lambda w, site: w.float() * 2))
    assert taken == ["a", "wide", "half"]
    assert found["wide"].shape == (400, 256)


def test_the_largest_entries_of_tensors_are_chosen_by_one_tape_with_the_cuts_of_each(taken: list[str]) -> None:
    weights = StateDict({name: uniform((400, 128), name) * k for k, name in enumerate("abc", 1)})
    kept = weights.map(lambda w, among, site: w * among, largest(weights, lambda name, n: [1000]))
    settle([kept])
    taken.clear()
    found = read(kept)
    assert taken == ["a"]
    assert {name: int(torch.count_nonzero(w)) for name, w in found.items()} == {"a": 1000, "b": 1000, "c": 1000}


@pytest.mark.parametrize("method", ["slerp", "karcher", "ram_plus", "model_stock", "sce"])
def test_numbers_of_each_tensor_do_not_keep_tensors_from_one_tape(method: str, taken: list[str]) -> None:
    base = {name: uniform((400, 128), name) for name in "abc"}
    experts = {t: {name: w + uniform(w.shape, t, name) / 10 for name, w in base.items()} for t in ("x", "y")}
    tvs = task_vectors(base, experts)
    made = METHODS[method](tvs, **({"t": 0.3} if method == "slerp" else {}))
    settle([made])
    taken.clear()
    read(add(tvs.base, made))
    assert set(taken) == {"a"}


@pytest.mark.parametrize("look", LOOKS)
def test_what_looks_at_its_site_is_taken_down_for_each_tensor(look: str, taken: list[str]) -> None:
    weights = StateDict(ALIKE).map(lambda w, site: w * (3.0 if LOOKS[look](site) else 2.0))
    found = read(weights)
    assert taken == ["a", "b", "c"]
    assert all(torch.equal(found[name], read(weights)[name]) for name in found)


def test_a_tensor_that_the_delta_lacks_is_not_like_those_it_has(taken: list[str]) -> None:
    base = StateDict({name: torch.ones(400, 128) for name in "abc"})
    found = read(add(base, StateDict({name: ALIKE[name] for name in "ac"})))
    assert {name: w.unique().item() for name, w in found.items()} == {"a": 2.0, "b": 1.0, "c": 4.0}


def test_tensors_from_several_places_are_alike_where_the_place_is_the_same(taken: list[str]) -> None:
    one, two = (StateDict(ALIKE).map(lambda w, site, k=k: w * k) for k in (2.0, 3.0))
    places: dict[str, tuple[Weights, str]] = {"a": (one, "a"), "b": (two, "b"), "c": (one, "c")}
    found = read(Gathered(places).map(lambda w, site: w + 1))
    assert taken == ["a", "b"]
    assert {name: w.unique().item() for name, w in found.items()} == {"a": 3.0, "b": 7.0, "c": 7.0}


def test_tensors_under_other_names_are_taken_down_for_each(taken: list[str]) -> None:
    places: dict[str, tuple[Weights, str]] = {"a": (StateDict(ALIKE), "b"), "b": (StateDict(ALIKE), "a")}
    found = read(Gathered(places).map(lambda w, site: w + 1))
    assert taken == ["a", "b"]
    assert {name: w.unique().item() for name, w in found.items()} == {"a": 3.0, "b": 2.0}


def test_what_cannot_be_said_is_computed_for_each_tensor_on_the_same_tape(taken: list[str]) -> None:
    weights = StateDict(ALIKE).map(lambda w, site: w.sort(1).values * ("abc".index(site.name) + 1))
    found = read(weights.map(lambda w, site: w - 1))
    assert taken.count("a") == len(taken)
    assert {name: w.unique().item() for name, w in found.items()} == {"a": 0.0, "b": 3.0, "c": 8.0}


def test_draws_are_those_of_each_tensor(taken: list[str]) -> None:
    same = {name: torch.ones(400, 128) for name in "abc"}
    tvs = task_vectors({name: torch.zeros(400, 128) for name in "abc"}, {"x": same, "y": same})
    dropped = drop(tvs, [0.5, 0.25], seed=0)
    merged = add(tvs.base, calmerge.average(dropped))
    found = read(merged)
    assert taken == ["a"]
    assert all(torch.equal(found[name], merged[name]) for name in "abc")
    assert not torch.equal(found["a"], found["b"])


def test_numbers_of_single_tensors_share_a_tape(taken: list[str]) -> None:
    tvs = task_vectors({name: torch.zeros(400, 128) for name in "abc"}, {"x": ALIKE})
    sums = per_tensor(tvs, lambda one: total(one, torch.sum))
    settle([sums])
    assert taken == ["a"]
    assert [sums.at(Site(name, 0)).item() for name in "abc"] == [51200.0, 102400.0, 153600.0]


def test_files_share_a_tape(taken: list[str]) -> None:
    weights = StateDict(ALIKE).map(lambda w, site: w * 2)
    kept: dict[Any, Any] = {}
    found = [Reader([weights.only_names([name])], kept=kept).read(name, ALL)[0].unique().item() for name in "abc"]
    assert taken == ["a"]
    assert found == [2.0, 4.0, 6.0]


def scaled(fn: Callable[[Tensor, Tensor], Tensor]) -> Weights:
    """Every tensor and a number of its own: 10, 20, 30."""
    sums = per_tensor(StateDict(ALIKE), lambda one: total(one, lambda w: w.mean().double() * 10), factor=True)
    settle([sums])
    return StateDict(ALIKE).map(lambda w, number, site: fn(w, number), sums)


def test_a_factor_takes_its_place_on_a_tape_that_is_there(taken: list[str]) -> None:
    weights = scaled(lambda w, number: w * number.to(w))
    taken.clear()
    found = read(weights)
    assert taken == ["a"]
    assert {name: w.unique().item() for name, w in found.items()} == {"a": 10.0, "b": 40.0, "c": 90.0}


@pytest.mark.parametrize(
    "fn",
    [
        lambda w, number: w * float(number),
        lambda w, number: w * (number / 2).to(w),
        lambda w, number: w + 1 if number > 15 else w - 1,
    ],
    ids=["read", "worked on", "asked"],
)
def test_a_factor_that_is_looked_at_is_taken_down_for_each(
    fn: Callable[[Tensor, Tensor], Tensor], taken: list[str]
) -> None:
    weights = scaled(fn)
    taken.clear()
    found = read(weights)
    assert taken == ["a", "b", "c"]
    assert all(torch.equal(found[name], weights[name]) for name in found)


def test_a_number_that_is_no_factor_is_taken_down_for_each(taken: list[str]) -> None:
    sums = per_tensor(StateDict(ALIKE), lambda one: total(one, torch.sum))
    settle([sums])
    weights = StateDict(ALIKE).map(lambda w, number, site: w * number.tolist(), sums)
    taken.clear()
    found = read(weights)
    assert taken == ["a", "b", "c"]
    assert all(torch.equal(found[name], weights[name]) for name in found)


def test_a_factor_whose_elements_share_a_place_has_them_side_by_side(taken: list[str]) -> None:
    tvs = task_vectors({name: torch.zeros(400, 128) for name in "abc"}, {"x": ALIKE, "y": ALIKE})
    sums = per_tensor(
        tvs, lambda one: total(one, lambda tau: tau.mean().double()).map(lambda s: s.expand(2)), factor=True
    )
    settle([sums])
    weights = tvs.reduce(lambda tau, number, site: (tau * number.to(tau).reshape(2, 1, 1)).amax(0), sums)
    taken.clear()
    found = read(weights)
    assert taken == ["a"]
    assert all(torch.equal(found[name], weights[name]) for name in found)


def test_blocks_that_were_read_together_are_cut_as_they_were_asked_for() -> None:
    tvs = task_vectors({"a": torch.zeros(400, 128)}, {t: {"a": uniform((400, 128), t)} for t in "xy"})
    number = total(StateDict(ALIKE), torch.sum)
    settle([number])
    reader = Reader([tvs, number], taping=True)
    blocks = [slice(i, min(i + 70, 400)) for i in range(0, 400, 70)]
    found = list(reader.cut(reader.each("a", blocks, together=4), blocks))
    assert [rows for rows, _ in found] == blocks
    for rows, (tau, value) in found:
        assert torch.equal(tau, tvs.read("a", rows))
        assert value is number.value()


@pytest.mark.parametrize("width", [127, 128, 129])
def test_flags_lie_where_the_machine_reads_them_whatever_their_number(width: int, taken: list[str]) -> None:
    tvs = task_vectors({"a": torch.zeros(400, width)}, {t: {"a": uniform((400, width), t)} for t in "xyz"})
    thinned = drop(tvs, [0.5, 0.3, 0.1], seed=0).reduce(lambda tau, site: tau.amax(0))
    rows = slice(11, 16)
    assert torch.equal(Reader([thinned]).read("a", rows)[0], thinned.read("a", rows))
    assert taken == ["a"]
