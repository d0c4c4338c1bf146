"""Tapes give what torch gives, to the bit, and leave to torch what they cannot say."""

import pytest
import torch

import calmerge
from calmerge import StateDict, _compiled, add, task_vectors
from calmerge._measure import settle
from calmerge._random import bernoulli
from calmerge._reader import Reader
from calmerge._rows import Rowed, Rows
from calmerge._weights import ALL, Weights
from calmerge.methods import METHODS

SHAPES = {"a": (300, 128), "b": (6, 64, 100)}
TAPED = {
    "average": {}, "task_arithmetic": {"scale": 0.3}, "ties": {"keep": 0.2}, "dare": {"rate": 0.9}, "magmax": {},
    "dare_ties": {"rate": 0.7}, "model_stock": {}, "karcher": {}, "breadcrumbs": {}, "sce": {"select_topk": 0.5},
    "della": {}, "mergekit_ties": {"weight": [1.0], "density": [0.3]},
}  # fmt: skip
WHOLE = {"tsv_m": {}}


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("numba")
    monkeypatch.setattr(_compiled, "LARGE", 0)


def some(dtype: torch.dtype) -> calmerge.TaskVectors:
    draw = torch.Generator().manual_seed(0)
    base = {n: torch.randn(s, generator=draw).to(dtype) for n, s in SHAPES.items()}
    experts = {
        t: {n: (w.float() + 0.1 * torch.randn(w.shape, generator=draw)).to(dtype) for n, w in base.items()}
        for t in "abc"
    }
    return task_vectors(base, experts)


def both(weights: Weights, name: str, rows: slice) -> tuple[torch.Tensor, torch.Tensor, bool]:
    reader = Reader([weights])
    taped = reader.read(name, rows)[0]
    return taped, weights.read(name, rows), reader._tapes[name] is not None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", [*TAPED, *WHOLE])
def test_a_method_gives_the_same_bytes_by_tape_and_by_torch(name: str, dtype: torch.dtype) -> None:
    tvs = some(dtype)
    merged = add(tvs.base, METHODS[name](tvs, **(TAPED | WHOLE)[name]))
    settle([merged], threads=2)
    for tensor, shape in SHAPES.items():
        for rows in (slice(0, 1), slice(1, shape[0]), ALL):
            taped, torch_made, is_taped = both(merged, tensor, rows)
            assert torch.equal(taped.view(torch.uint8), torch_made.view(torch.uint8))
            assert is_taped == (name in TAPED) or tensor == "b"


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_types_that_the_machine_does_not_store_come_out_as_torch_makes_them(dtype: torch.dtype) -> None:
    tvs = some(torch.bfloat16)
    merged = add(tvs.base, calmerge.average(tvs), dtype=dtype)
    taped, torch_made, is_taped = both(merged, "a", slice(3, 90))
    assert is_taped
    assert taped.dtype == dtype
    assert torch.equal(taped, torch_made)


def test_steps_agree_with_torch_on_zeros_of_either_sign_and_on_rounding_to_even() -> None:
    edge = torch.tensor([0.0, -0.0, 1.0, -1.0, 1.00390625, 1.01171875, 3e38, -3e38, 1e-40, 2.0]).repeat(4096)
    other = torch.tensor([-0.0, 0.0, -1.0, 0.5, 1.0, -2.0, 1.0, 7.0, -1e-40, 2.0]).repeat(4096)
    x, y = StateDict({"w": edge}), StateDict({"w": other})
    steps = [
        lambda x, y, site: x + y, lambda x, y, site: x - y, lambda x, y, site: x * y, lambda x, y, site: 3 - x,
        lambda x, y, site: (x / y.where(y != 0, 1.0)), lambda x, y, site: x.abs().sqrt(), lambda x, y, site: -x,
        lambda x, y, site: x.sign(), lambda x, y, site: x.clamp(-1, 1), lambda x, y, site: x.clamp(min=0),
        lambda x, y, site: torch.maximum(x, y), lambda x, y, site: torch.minimum(x, y), lambda x, y, site: x.square(),
        lambda x, y, site: torch.hardshrink(x, 1.0), lambda x, y, site: torch.where((x > y) & ~(x == 2), x, y),
        lambda x, y, site: ((x >= y) | (x != y)).float(), lambda x, y, site: torch.stack([x, y]).amax(0),
        lambda x, y, site: x.bfloat16().float() + y, lambda x, y, site: torch.zeros_like(x).copy_(x).mul_(2).add_(y),
    ]  # fmt: skip
    rounds = torch.equal(edge.abs().sqrt(), edge.abs().double().sqrt().float())  # to the nearest; not so everywhere
    for i, step in enumerate(steps):
        taped, torch_made, is_taped = both(x.map(step, y), "w", slice(0, 40000))
        assert is_taped == (rounds or i != 5), i  # square roots that torch rounds another way are left to it
        assert torch.equal(taped.view(torch.int32), torch_made.view(torch.int32)), i


def test_what_depends_on_other_entries_is_left_to_torch() -> None:
    weights = StateDict({"w": torch.arange(40960.0)})
    for step in (
        lambda w, site: w - w.sum(), lambda w, site: torch.from_numpy(w.numpy() * 2), lambda w, site: w.cumsum(0),
        lambda w, site: torch.add(w, w, alpha=2), lambda w, site: w.double() + 1,
        lambda w, site: (w.view(torch.int32) > 5) * w,
    ):  # fmt: skip
        reader = Reader([weights.map(step)])
        taped = reader.read("w", ALL)[0]
        tape = reader._tapes["w"]
        assert tape is None or [one.made for one in tape.inputs] == [True]
        assert torch.equal(taped, weights.map(step)["w"])


def test_a_number_that_changes_from_tensor_to_tensor_is_taken_down_for_each() -> None:
    weights = StateDict({"a": torch.ones(40960), "b": torch.ones(40960)})
    scaled = weights.map(lambda w, site: w * {"a": 2.0, "b": 3.0}[site.name])
    reader = Reader([scaled])
    assert [reader.read(n, ALL)[0].unique().item() for n in "ab"] == [2.0, 3.0]
    assert None not in reader._tapes.values()


def test_an_infinite_entry_behind_the_rows_that_were_recorded_is_refused() -> None:
    bad = torch.ones(300, 128)
    bad[250, 7] = torch.inf
    merged = calmerge.average(
        task_vectors({"w": torch.zeros(300, 128)}, {"a": {"w": bad}, "b": {"w": torch.ones(300, 128)}})
    )
    reader = Reader([merged])
    assert torch.equal(reader.read("w", slice(0, 2))[0], torch.ones(2, 128))
    with pytest.raises(calmerge.CheckpointError, match="expert 'a': tensor 'w' has 1 entries that are NaN or infinite"):
        reader.read("w", slice(200, 300))


def test_without_numba_torch_does_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_compiled.importlib.util, "find_spec", lambda name: None)
    weights = StateDict({"w": torch.ones(40960)})
    reader = Reader([weights.map(lambda w, site: 2 * w)])
    assert torch.equal(reader.read("w", slice(0, 3))[0], torch.full((3,), 2.0))
    assert reader._tapes == {}


def test_several_nodes_of_one_graph_share_a_tape() -> None:
    weights = StateDict({"w": torch.arange(40960.0)})
    double = weights.map(lambda w, site: 2 * w)
    assert [x[1].item() for x in Reader([weights, double]).read("w", slice(4, 9))] == [5.0, 10.0]


def test_picked_rows_are_left_to_torch() -> None:
    # the rows in the middle, where a tape would be recorded, are the source's own; the last ones are not
    source = StateDict({"w": torch.arange(600.0 * 64).reshape(600, 64)})
    table = torch.arange(600)
    table[500:] = table[500:].flip(0)
    picked = Rowed(source, ["w"], Rows({"a": (source, table)}))
    taped, torch_made, is_taped = both(picked.map(lambda w, site: w * 2), "w", slice(500, 600))
    assert not is_taped
    assert torch.equal(taped, torch_made)
    assert taped[0, 0] == 2 * 599 * 64


def test_what_is_read_at_another_place_is_left_to_torch() -> None:
    source = StateDict({"w": torch.arange(600.0 * 64).reshape(600, 64)})
    weights = source.map(lambda w, site: w + source.read("w", slice(0, len(w))))
    reader = Reader([weights])
    assert torch.equal(reader.read("w", slice(9, 20))[0], weights.read("w", slice(9, 20)))
    tape = reader._tapes["w"]
    assert tape is not None
    assert [one.made for one in tape.inputs] == [True]


def test_what_an_input_is_computed_from_is_read_for_it_alone() -> None:
    tvs = some(torch.bfloat16)
    reader = Reader([add(tvs.base, calmerge.breadcrumbs(tvs))])
    reader.read("a", ALL)
    tape = reader._tapes["a"]
    assert tape is not None
    assert [(one.made, one.planes) for one in tape.inputs] == [(False, 1), (True, 3)]  # the base, and no expert


def test_a_draw_that_forgets_where_its_block_is_is_left_to_torch() -> None:
    weights = StateDict({"w": torch.ones(40960)})
    drawn = weights.map(lambda w, site: w * bernoulli(tuple(w.shape), 0.5, "seed", offset=0))
    reader = Reader([drawn])
    assert torch.equal(reader.read("w", slice(777, 9999))[0], drawn.read("w", slice(777, 9999)))
    assert [one.made for one in reader._tapes["w"].inputs] == [True]
    right = weights.map(lambda w, site: w * bernoulli(tuple(w.shape), 0.5, "seed", offset=site.offset))
    taped, torch_made, is_taped = both(right, "w", slice(777, 9999))
    assert is_taped
    assert torch.equal(taped, torch_made)


def test_copies_are_left_to_torch_so_that_every_nan_keeps_its_bits() -> None:
    odd = torch.full((300, 128), 0x7F81, dtype=torch.int16).view(torch.bfloat16)
    tvs = task_vectors(
        {"w": torch.ones(300, 128), "odd": odd},
        {"a": {"w": torch.zeros(300, 128), "odd": odd}},
        exclude=["odd"],
    )
    reader = Reader([add(tvs.base, calmerge.average(tvs))], taping=True)
    assert torch.equal(reader.read("odd", ALL)[0].view(torch.int16), odd.view(torch.int16))
    assert reader._tapes["odd"] is None


def test_bytes_that_are_no_flags_are_not_taken_for_some() -> None:
    weights = StateDict({"w": torch.full((40960,), 5, dtype=torch.uint8)})
    taped, torch_made, _ = both(weights.map(lambda w, site: w.bool().float()), "w", ALL)
    assert torch.equal(taped, torch_made)
