"""Core Space: lossless, the same for every way of storing an adapter, and equal to full space where nothing is cut."""

from functools import partial

import pytest
import torch
from torch import Tensor

from calmerge import (
    Adapter,
    CheckpointError,
    TaskVectors,
    average,
    core_space,
    iso_c,
    task_arithmetic,
    task_vectors,
    ties,
    tsv_m,
)
from calmerge._random import uniform
from calmerge.pieces import drop_and_rescale

BASE = {"q.weight": torch.zeros(10, 8), "k.weight": torch.zeros(7, 8), "norm.weight": torch.ones(8)}
GAUGE = torch.tensor([[2.0, 1.0], [0.5, -1.0]])


def factors(task: str, rank: int = 2) -> dict[str, Tensor]:
    return {
        f"{m}.lora_{part}.weight": uniform(shape, task, m, part) - 0.5
        for m, rows in (("q", 10), ("k", 7))
        for part, shape in (("A", (rank, 8)), ("B", (rows, rank)))
    }


def adapter(task: str, rank: int = 2, alpha: float = 2, gauge: Tensor | None = None, **full: Tensor) -> Adapter:
    tensors = factors(task, rank)
    if gauge is not None:
        for m in ("q", "k"):
            tensors[f"{m}.lora_B.weight"] = tensors[f"{m}.lora_B.weight"] @ gauge
            tensors[f"{m}.lora_A.weight"] = gauge.inverse() @ tensors[f"{m}.lora_A.weight"]
    return Adapter(tensors | full, {"r": rank, "lora_alpha": alpha})


def experts(gauge: Tensor | None = None) -> TaskVectors:
    return task_vectors(BASE, {"a": adapter("a", gauge=gauge), "b": adapter("b", alpha=3), "c": adapter("c", 3)})


INNERS = [average, partial(task_arithmetic, scale=1.0), partial(ties, keep=0.5), tsv_m, iso_c]


@pytest.mark.parametrize("inner", [average, partial(task_arithmetic, scale=0.7)])
@pytest.mark.parametrize("joint", [False, True])
def test_linear_merges_are_those_of_full_space(inner, joint: bool) -> None:  # type: ignore[no-untyped-def]
    tvs = experts()
    found, expected = core_space(tvs, inner=inner, joint=joint), inner(tvs)
    for name in tvs:
        torch.testing.assert_close(found[name], expected[name], rtol=0, atol=1e-6)


@pytest.mark.parametrize("inner", INNERS)
def test_how_an_adapter_is_stored_does_not_matter(inner) -> None:  # type: ignore[no-untyped-def]
    """(B G)(G^-1 A) is the adapter (B, A)."""
    one, two = core_space(experts(), inner=inner), core_space(experts(GAUGE), inner=inner)
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=0, atol=2e-5)


def test_as_published_it_does_matter_to_a_method_that_looks_at_entries() -> None:
    inner = partial(ties, keep=0.5)
    one, two = (core_space(experts(g), inner=inner, balance=False) for g in (None, GAUGE))
    assert (one["q.weight"] - two["q.weight"]).abs().max() > 1e-3


@pytest.mark.parametrize("inner", INNERS)
@pytest.mark.parametrize("balance", [False, True])
def test_an_adapter_merged_with_itself_stays_what_it_is(inner, balance: bool) -> None:  # type: ignore[no-untyped-def]
    """Sums give twice the update, means once; TSV's r directions of each task are not cut although they coincide."""
    tvs = task_vectors(BASE, {"a": adapter("a"), "b": adapter("a")})
    found = core_space(tvs, inner=inner, balance=balance)["q.weight"]
    delta = tvs["q.weight"][0]
    if inner is average:
        torch.testing.assert_close(found, delta, rtol=0, atol=1e-6)
    elif inner is tsv_m:
        share = (found * delta).sum() / delta.square().sum()
        torch.testing.assert_close(found, share * delta, rtol=0, atol=1e-5)
        torch.testing.assert_close(share.item(), 1.0, rtol=1e-4, atol=0)
    elif isinstance(inner, partial) and inner.func is task_arithmetic:
        torch.testing.assert_close(found, 2 * delta, rtol=0, atol=1e-6)


def test_cores_are_as_large_as_the_ranks_together_and_no_larger_than_the_tensor() -> None:
    seen = {}

    def spy(tvs: TaskVectors):  # type: ignore[no-untyped-def]
        seen.update({name: spec.shape for name, spec in tvs.specs.items()})
        return average(tvs)

    core_space(experts(), inner=spy, joint=True)["q.weight"]
    assert seen == {"q.weight": (7, 7), "k.weight": (7, 7)}


def test_each_tensor_has_its_own_threshold_unless_they_are_joined() -> None:
    """One entry of each core is kept apart, one of all together."""
    base = {"q.weight": torch.zeros(2, 2), "k.weight": torch.zeros(2, 2)}
    tensors = {}
    for module, size in (("q", 1.0), ("k", 100.0)):
        tensors[f"{module}.lora_A.weight"] = torch.tensor([[size, 0.0]])
        tensors[f"{module}.lora_B.weight"] = torch.tensor([[1.0], [0.0]])
    tvs = task_vectors(base, {"a": Adapter(tensors, {"r": 1, "lora_alpha": 1})})
    inner = partial(ties, keep=0.5)
    assert core_space(tvs, inner=inner)["q.weight"].abs().max() == 1
    kept = task_vectors(base, {"a": Adapter(tensors, {"r": 1, "lora_alpha": 1})})
    joined = core_space(kept, inner=partial(ties, keep=0.01), joint=True)
    assert joined["q.weight"].abs().max() == 0
    torch.testing.assert_close(joined["k.weight"].abs().max().item(), 100.0)


def test_full_tensors_and_vectors_changed_before_are_merged_where_they_are() -> None:
    full = {"norm.weight": torch.full((8,), 3.0)}
    tvs = task_vectors(BASE, {"a": adapter("a", **full), "b": adapter("b")})
    assert core_space(tvs, inner=average)["norm.weight"].tolist() == [1.0] * 8
    dropped = drop_and_rescale(tvs, rate=0.5)
    torch.testing.assert_close(core_space(dropped, inner=average)["q.weight"], average(dropped)["q.weight"])


def test_the_scale_comes_last() -> None:
    inner = partial(ties, keep=0.5)
    one, half = core_space(experts(), inner=inner), core_space(experts(), inner=inner, scale=0.5)
    assert torch.equal(half["q.weight"], one["q.weight"] * 0.5)


def test_an_adapter_that_lacks_a_module_counts_as_zero() -> None:
    only_q = Adapter({n: t for n, t in factors("b").items() if n.startswith("q")}, {"r": 2, "lora_alpha": 2})
    tvs = task_vectors(BASE, {"a": adapter("a"), "b": only_q})
    assert tvs.ranks("k.weight") == (2, 0)
    torch.testing.assert_close(core_space(tvs, inner=average)["k.weight"], tvs["k.weight"][0] / 2, rtol=0, atol=1e-6)


def test_nan_in_a_factor_is_refused() -> None:
    bad = factors("a")
    bad["q.lora_A.weight"][0, 0] = float("nan")
    tvs = task_vectors(BASE, {"a": Adapter(bad, {"r": 2, "lora_alpha": 2})})
    with pytest.raises(CheckpointError, match=r"expert 'a': tensor 'q.weight' has 1 entries that are NaN"):
        core_space(tvs)["q.weight"]
