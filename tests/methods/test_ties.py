"""TIES: the traps and worked checks of its specification."""

from collections.abc import Callable
from functools import partial

import pytest
import torch

from calmerge import TaskVectors, UsageError, merge, task_vectors, ties
from calmerge._random import permutation, uniform
from calmerge.methods.ties import ties_split
from calmerge.pieces.trim import trim

ZERO = {"A": torch.zeros(5), "B": torch.zeros(5)}
ONE = {"A": torch.tensor([0.9, 0.8, -0.7, 0.6, 0.05]), "B": torch.tensor([0.04, -0.03, 0.02, 0.01, 0.0])}
TWO = {"A": torch.tensor([-0.1, 0.5, -0.4, 0.02, 0.3]), "B": torch.tensor([-0.2, 0.01, 0.03, -0.04, 0.05])}


def vectors(**rows: list[float]) -> TaskVectors:
    n = len(next(iter(rows.values())))
    return task_vectors({"w": torch.zeros(n)}, {t: {"w": torch.tensor(r)} for t, r in rows.items()})


near = partial(torch.testing.assert_close, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("combine", "expected"), [("mean", [0.9, 0.65, -0.55, 0, 0.3]), ("sum", [0.9, 1.3, -1.1, 0, 0.3])]
)
def test_threshold_is_global_not_per_tensor(combine: str, expected: list[float]) -> None:
    """Per tensor one entry of B would stay; the official count keeps int(d K) + 1 = 3 of 10 entries per task."""
    merged = ties(task_vectors(ZERO, {"one": ONE, "two": TWO}), keep=0.2, combine=combine)  # type: ignore[arg-type]
    near(merged["A"], torch.tensor(expected))
    assert merged["B"].tolist() == [0.0] * 5


def test_max_takes_the_largest_that_agrees() -> None:
    merged = ties(task_vectors(ZERO, {"one": ONE, "two": TWO}), keep=0.2, combine="max")
    near(merged["A"], torch.tensor([0.9, 0.8, -0.7, 0.0, 0.3]))


@pytest.mark.parametrize("sign", [1, -1])
def test_a_cancelled_entry_takes_the_majority_sign_not_plus(sign: int) -> None:
    merged = ties(vectors(a=[sign * x for x in (1, 2, 3, 0.1, 0)], b=[sign * x for x in (-1, 2, 3, 0.1, 0)]), keep=0.6)
    near(merged["w"], sign * torch.tensor([1, 2, 3, 0.1, 0]))


def test_without_a_majority_a_cancelled_entry_goes_to_minus() -> None:
    assert ties(vectors(a=[1.0, 2.0], b=[-1.0, -2.0]), keep=1.0)["w"].tolist() == [-1.0, -2.0]


@pytest.mark.parametrize("n", [1, 2, 5])
def test_identical_experts_give_the_trimmed_vector_whatever_their_number(n: int) -> None:
    tvs = vectors(**{f"t{i}": [4.0, -3.0, 2.0, 1.0, 0.5] for i in range(n)})
    assert ties(tvs, keep=0.4)["w"].tolist() == [4.0, -3.0, 2.0, 0.0, 0.0]
    assert ties(tvs, keep=0.4, combine="sum")["w"].tolist() == [4.0 * n, -3.0 * n, 2.0 * n, 0.0, 0.0]


def test_moving_entries_between_tensors_changes_nothing() -> None:
    """The threshold belongs to the model: cutting the same entries into other tensors gives the same entries."""
    one, two, order = uniform((60,), 1) - 0.5, uniform((60,), 2) - 0.5, permutation(60, 3)
    whole = ties(task_vectors({"w": torch.zeros(60)}, {"a": {"w": one}, "b": {"w": two}}))["w"]

    def cut(w: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"big": w[order][:50], "small": w[order][50:].reshape(2, 5)}

    parts = ties(task_vectors(cut(torch.zeros(60)), {"a": cut(one), "b": cut(two)}))
    assert torch.equal(torch.cat([parts["big"], parts["small"].flatten()]), whole[order])


def test_signs_are_elected_among_trimmed_vectors() -> None:
    """Untrimmed, the three small minuses of the first entry would outvote its one plus."""
    small = [-1.0, 9.0, 9.0]
    assert ties(vectors(a=[2.0, 0.0, 0.0], b=small, c=small, d=small), keep=0.5)["w"].tolist() == [2.0, 9.0, 9.0]


def test_the_mean_is_over_entries_that_agree_not_over_all_tasks_or_zeros() -> None:
    assert ties(vectors(a=[6.0], b=[2.0], c=[-1.0], d=[0.0]), keep=1.0)["w"].tolist() == [4.0]


def test_equal_magnitudes_at_the_threshold_are_all_kept() -> None:
    assert ties(vectors(a=[1.0, -1.0, 1.0, 0.5]), keep=0.25)["w"].tolist() == [1.0, -1.0, 1.0, 0.0]


def test_with_more_zeros_than_the_trim_removes_nothing_is_trimmed() -> None:
    kept = ties(vectors(a=[0.0, 0.0, 0.0, 0.25, 0.5]), keep=0.4)
    assert kept["w"].tolist() == [0.0, 0.0, 0.0, 0.25, 0.5]


def test_keeping_everything_is_accepted() -> None:
    """The official parser reads 1 as 100 % and then fails; here it trims nothing."""
    assert ties(vectors(a=[3.0, 0.5], b=[1.0, -0.25]), keep=1)["w"].tolist() == [2.0, 0.5]


@pytest.mark.parametrize("keep", [20, 0, -0.2, 1.5])
def test_a_percentage_is_refused(keep: float) -> None:
    with pytest.raises(UsageError, match=r"ties.keep must lie in \(0, 1\]"):
        merge({"w": torch.zeros(2)}, [{"w": torch.ones(2)}], "ties", keep=keep)


def test_integer_tensors_and_heads_are_not_counted_in_the_threshold() -> None:
    plain = ties(vectors(a=[5.0, 4.0, 3.0, 2.0, 1.0]), keep=0.4)["w"]
    base = {"w": torch.zeros(5), "ids": torch.arange(50)}
    expert = {"w": torch.tensor([5.0, 4.0, 3.0, 2.0, 1.0]), "ids": torch.arange(50) + 9, "head": torch.full((50,), 9.0)}
    assert torch.equal(ties(task_vectors(base, {"a": expert}), keep=0.4)["w"], plain)


def test_frozen_tensors_that_are_merged_do_count() -> None:
    """25 exact zeros beside 5 entries: 20 % of 30 keeps them all. Excluding the frozen tensor trims as expected."""
    base = {"w": torch.zeros(5), "text": torch.ones(25)}
    tvs = {"a": {"w": torch.tensor([5.0, 4.0, 3.0, 2.0, 1.0]), "text": torch.ones(25)}}
    assert (ties(task_vectors(base, tvs), keep=0.2)["w"] != 0).sum() == 5
    assert (ties(task_vectors(base, tvs, exclude=["text"]), keep=0.2)["w"] != 0).sum() == 2


def test_scale_multiplies_the_merged_vector() -> None:
    tvs = vectors(a=[3.0, -1.0], b=[1.0, 0.5])
    assert ties(tvs, keep=1.0, scale=0.5)["w"].tolist() == [1.0, -0.5]


def test_the_split_before_merging() -> None:
    """AdaMerging++ starts here: floor(5 * 0.4) = 2, so the third smallest magnitude, 1, is the cut and stays."""
    split = ties_split(vectors(a=[3.0, -1.0, 2.0, 0.0, 0.0], b=[-2.0, -4.0, 0.0, 0.0, 1.0]), keep=0.4)
    assert split["w"].tolist() == [[3, -1, 2, 0, 0], [0, -4, 0, 0, 1]]


@pytest.mark.parametrize("call", [ties, ties_split, trim])
@pytest.mark.parametrize("keep", [20, 0.0, -0.2])
def test_a_percentage_is_refused_in_a_plain_call_too(call: Callable[..., object], keep: float) -> None:
    with pytest.raises(UsageError, match=r"(ties|ties_split|trim).keep must lie in \(0, 1\], got"):
        call(vectors(a=[1.0, 2.0]), keep=keep)


def test_per_tensor_thresholds_keep_exactly_their_share_of_every_tensor() -> None:
    """One of five in A and in B: what mergekit and PEFT do, not the paper."""
    merged = ties(task_vectors(ZERO, {"one": ONE, "two": TWO}), keep=0.2, scope="tensor")
    near(merged["A"], torch.tensor([0.9, 0.5, 0, 0, 0]))
    near(merged["B"], torch.tensor([-0.2, 0, 0, 0, 0]))


def test_a_tensor_too_small_for_its_share_keeps_one_entry() -> None:
    assert trim(vectors(a=[3.0, -4.0]), keep=0.1, scope="tensor")["w"].tolist() == [[0.0, -4.0]]


def test_signs_may_be_elected_by_shares_of_each_vector_s_norm() -> None:
    """a is short: its 1 of norm^2 2 is a half; b's 3 of 9 + 16 is 0.36, and c's too: they win together, not alone."""
    tvs = vectors(a=[1.0, 1.0], b=[-3.0, 4.0], c=[-3.0, 4.0])
    assert ties(tvs, keep=1.0)["w"].tolist() == [-3.0, 3.0]
    assert ties(tvs, keep=1.0, signs="normmass")["w"].tolist() == [-3.0, 3.0]
    assert ties(tvs, keep=1.0, signs="normfrac")["w"].tolist() == [1.0, 3.0]
