"""Lazy named tensors."""

import pytest
import torch
from torch import Tensor

from calmerge import StateDict, add, task_vectors
from calmerge._weights import ALL, Computed, Site, Spec, blocks, row_size


@pytest.mark.parametrize("size", [1, 2, 3, 7, 64, 10_000])
def test_blocks_cover_every_tensor_once_in_order(size: int) -> None:
    shapes = {"matrix": (5, 3), "number": (), "none": (0, 4), "vector": (9,), "hollow": (4, 0)}
    weights = StateDict({name: torch.arange(torch.Size(s).numel()).reshape(s) for name, s in shapes.items()})
    seen: dict[str, list[Tensor]] = {}
    for name, rows in blocks(weights, size):
        seen.setdefault(name, []).append(weights.read(name, rows))
    assert list(seen) == list(shapes)
    for name, parts in seen.items():
        whole = parts[0] if len(parts) == 1 else torch.cat(parts)
        assert torch.equal(whole, weights[name])
        assert all(p.numel() <= max(size, row_size(weights.specs[name])) for p in parts)


def test_a_tensor_that_must_be_read_whole_is_one_block() -> None:
    whole = StateDict({"w": torch.zeros(8, 2)}).map(lambda w, site: w, elementwise=False)
    assert list(blocks(whole, 2)) == [("w", ALL)]


def test_map_tells_name_and_offset_of_the_first_entry() -> None:
    sites: list[Site] = []

    def note(w: Tensor, site: Site) -> Tensor:
        sites.append(site)
        return w

    mapped = StateDict({"w": torch.zeros(4, 3)}).map(note)
    mapped.read("w")
    mapped.read("w", slice(2, 4))
    assert sites == [Site("w", 0), Site("w", 6)]


def test_rows_of_a_whole_tensor_function_are_cut_after_it() -> None:
    centred = StateDict({"w": torch.tensor([1.0, 2.0, 6.0])}).map(lambda w, site: w - w.mean(), elementwise=False)
    assert centred.read("w", slice(1, 3)).tolist() == [-1.0, 3.0]
    assert centred.map(lambda w, site: 2 * w).read("w", slice(1, 3)).tolist() == [-2.0, 6.0]


def test_one_block_reads_every_input_once() -> None:
    calls: list[str] = []

    def note(w: Tensor, site: Site) -> Tensor:
        calls.append(site.name)
        return w + 1

    inner = StateDict({"w": torch.zeros(2)}).map(note)
    twice = Computed(lambda a, b, site: a + b, (inner, inner), inner.specs)
    assert twice["w"].tolist() == [2.0, 2.0]
    assert calls == ["w"]


def test_nothing_is_computed_before_it_is_read() -> None:
    def fail(w: Tensor, site: Site) -> Tensor:
        raise AssertionError

    lazy = StateDict({"w": torch.zeros(2)}).map(fail)
    assert lazy.specs["w"] == Spec((2,), torch.float32)
    assert (lazy.numel, lazy.nbytes, len(lazy), list(lazy)) == (2, 8, 1, ["w"])


def test_asking_whether_a_name_is_there_reads_nothing() -> None:
    def fail(w: Tensor, site: Site) -> Tensor:
        raise AssertionError

    lazy = StateDict({"w": torch.zeros(2)}).map(fail)
    assert "w" in lazy
    assert "v" not in lazy


def test_select_keeps_the_order_given() -> None:
    weights = StateDict({"a": torch.zeros(1), "b": torch.ones(2), "c": torch.zeros(3)})
    chosen = weights.only_names(["c", "b"])
    assert list(chosen) == ["c", "b"]
    assert torch.equal(chosen["b"], torch.ones(2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_a_zero_delta_leaves_the_bits_of_the_base(dtype: torch.dtype) -> None:
    base = torch.tensor([1.0, -0.0, 0.0, 3e-5]).to(dtype)
    merged = add(StateDict({"w": base}), StateDict({"w": torch.tensor([0.0, 0.0, -0.0, 0.0])}))["w"]
    assert merged.dtype == dtype
    assert merged.view(torch.uint8).tolist() == base.view(torch.uint8).tolist()


def test_the_sum_is_rounded_once() -> None:
    base, delta = torch.tensor([1.0], dtype=torch.bfloat16), torch.tensor([2**-8 + 2**-16])
    assert add(StateDict({"w": base}), StateDict({"w": delta}))["w"].item() == 1 + 2**-7  # above the middle: up
    wide = add(StateDict({"w": torch.tensor([1.0], dtype=torch.float64)}), StateDict({"w": torch.tensor([2.0**-40])}))
    assert wide["w"].item() == 1 + 2**-40


def test_dtype_is_that_of_floating_tensors_only() -> None:
    base = StateDict({"w": torch.ones(1), "rest": torch.ones(1), "steps": torch.tensor(3), "on": torch.tensor([True])})
    merged = add(base, StateDict({"w": torch.ones(1)}), dtype=torch.bfloat16)
    assert {name: t.dtype for name, t in merged.items()} == {
        "w": torch.bfloat16, "rest": torch.bfloat16, "steps": torch.int64, "on": torch.bool
    }  # fmt: skip
    assert {name: spec.dtype for name, spec in merged.specs.items()} == {name: t.dtype for name, t in merged.items()}


def test_the_fingerprint_of_tensors_changes_with_their_values() -> None:
    prints = {StateDict({"w": torch.tensor([x])}).fingerprint for x in (0.0, 1.0, 2.0)}
    assert len(prints) == 3
    assert StateDict({"w": torch.ones(2)}).fingerprint == StateDict({"w": torch.ones(2)}).fingerprint


def test_a_misspelt_name_is_a_key_error() -> None:
    tvs = task_vectors({"w": torch.zeros(1)}, {"a": {"w": torch.ones(1)}})
    for weights in (StateDict({"w": torch.zeros(1)}), tvs, tvs.of("a"), add(tvs.base, tvs.of("a"))):
        assert "v" not in weights
        with pytest.raises(KeyError):
            weights["v"]
