"""KnOTS: the traps and worked checks of its specification."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from calmerge import Adapter, TaskVectors, UsageError, average, knots, task_arithmetic, task_vectors, ties
from calmerge._random import uniform
from calmerge.methods.knots import _rows

near = partial(torch.testing.assert_close, rtol=0, atol=1e-5)


def noise(*shape: int, key: object = 0) -> Tensor:
    return uniform(shape, "knots", key) - 0.5


def vectors(n: int, *shape: int) -> TaskVectors:
    experts = {f"t{i}": {"w": noise(*shape, key=i), "b": noise(3, key=i)} for i in range(n)}
    return task_vectors({"w": torch.zeros(shape), "b": torch.zeros(3)}, experts)


@pytest.mark.parametrize("shape", [(4, 9), (9, 4), (20, 2)])
@pytest.mark.parametrize("inner", [average, partial(task_arithmetic, scale=0.7)])
def test_a_linear_merge_gives_what_it_gives_without(inner: Callable[..., Any], shape: tuple[int, int]) -> None:
    tvs = vectors(3, *shape)
    merged, plain = knots(tvs, inner=inner), inner(tvs)
    for n in tvs:
        near(merged[n], plain[n])


def test_other_merges_change() -> None:
    tvs = vectors(3, 4, 9)
    assert (knots(tvs, inner=ties)["w"] - ties(tvs)["w"]).abs().max() > 0.05


def test_one_expert_comes_back() -> None:
    near(knots(vectors(1, 4, 9), inner=partial(ties, keep=1.0))["w"], noise(4, 9, key=0))


def test_rows_of_small_singular_value_are_left_out() -> None:
    tvs = task_vectors({"w": torch.zeros(2, 2)}, {"a": {"w": torch.diag(torch.tensor([1.0, 1e-3]))}})
    near(knots(tvs, inner=average, tolerance=1e-2)["w"], torch.diag(torch.tensor([1.0, 0.0])))
    near(knots(tvs, inner=average)["w"], torch.diag(torch.tensor([1.0, 1e-3])))


def test_thresholds_count_all_tensors_together_and_no_rows_beyond_the_rank() -> None:
    """20 % of 2 * 3 rows are other entries than 20 % of 12 rows half of which are 0."""
    low = {t: {"w": noise(12, 3, key=(t, 1)) @ noise(3, 10, key=(t, 2))} for t in "ab"}
    tvs = task_vectors({"w": torch.zeros(12, 10)}, low)
    assert [_rows(tvs, "w", rank) for rank in (None, 3, 9)] == [12, 6, 12]
    u = torch.linalg.svd(torch.cat([*tvs["w"]], 1))[0][:, :6]
    inside = task_vectors({"w": torch.zeros(6, 10)}, {t: {"w": u.T @ e["w"]} for t, e in low.items()})
    near(knots(tvs, rank=3)["w"], u @ ties(inside)["w"])
    assert (knots(tvs)["w"] - knots(tvs, rank=3)["w"]).abs().max() > 1e-2


def test_adapters_have_the_rank_of_their_factors() -> None:
    a = {t: noise(2, 6, key=(t, "a")) for t in "ab"}
    b = {t: noise(8, 2, key=(t, "b")) for t in "ab"}
    adapters = {t: Adapter({"q.lora_A.weight": a[t], "q.lora_B.weight": b[t]}, {"r": 2, "lora_alpha": 2}) for t in "ab"}
    base = {"q.weight": torch.zeros(8, 6)}
    tvs = task_vectors(base, adapters)
    dense = task_vectors(base, {t: {"q.weight": b[t] @ a[t]} for t in "ab"})
    assert _rows(tvs, "q.weight", None) == 4
    near(knots(tvs, inner=ties)["q.weight"], knots(dense, inner=ties, rank=2)["q.weight"])


def test_tables_of_a_vocabulary_stay_outside_the_basis() -> None:
    tvs = task_vectors({"lm_head.weight": torch.zeros(4, 3)}, {t: {"lm_head.weight": noise(4, 3, key=t)} for t in "ab"})
    assert torch.equal(knots(tvs)["lm_head.weight"], ties(tvs)["lm_head.weight"])
    with pytest.raises(UsageError, match="skip: 'lm_haed' fits no tensor"):
        knots(tvs, skip=["lm_haed"])
