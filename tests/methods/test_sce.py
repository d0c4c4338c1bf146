"""SCE: the worked check and the traps of its specification."""

from functools import partial
from typing import Any

import pytest
import torch

from calmerge import TaskVectors, sce, task_vectors
from calmerge._random import uniform
from calmerge.methods.sce import mergekit_sce

near = partial(torch.testing.assert_close, rtol=0, atol=1e-6)
ROWS = [1.0, -2.0, 0.0, 4.0], [1.0, 2.0, 0.0, -1.0]


def vectors(*rows: Any) -> TaskVectors:
    tensors = [torch.as_tensor(r) for r in rows]
    return task_vectors({"w": torch.zeros_like(tensors[0])}, {f"t{i}": {"w": t} for i, t in enumerate(tensors)})


@pytest.mark.parametrize("method", [sce, mergekit_sce])
def test_half_of_the_varying_entries_are_kept(method: Any) -> None:
    """Variances 0, 4, 0, 6.25: one of two stays, and the second task is erased there."""
    assert method(vectors(*ROWS), select_topk=0.5)["w"].tolist() == [0.0, 0.0, 0.0, 4.0]


def test_without_selection_all_entries_count() -> None:
    """Weights 21/27 and 6/27; the second entry sums to 0, which counts as plus; the last keeps the first task."""
    near(sce(vectors(*ROWS))["w"], torch.tensor([1.0, 2.0, 0.0, 4.0]))


def test_entries_on_which_all_agree_are_dropped_by_any_selection() -> None:
    tvs = vectors([5.0, 1.0, -1.0], [5.0, 2.0, 3.0])
    assert sce(tvs, select_topk=0.99)["w"][0] == 0.0
    assert sce(tvs)["w"][0] == 5.0


def test_tasks_weigh_by_their_squares_after_the_selection() -> None:
    """Of three varying entries the second is kept: weights 9 and 1, both plus: (9 * 3 + 1 * 1) / 10."""
    near(sce(vectors([1.0, 3.0, 0.0], [2.0, 1.0, 1.0]), select_topk=0.4)["w"], torch.tensor([0.0, 2.8, 0.0]))


def test_each_tensor_has_its_own_weights() -> None:
    experts = {"a": {"u": torch.tensor([2.0]), "v": torch.tensor([1.0])}}
    experts["b"] = {"u": torch.tensor([1.0]), "v": torch.tensor([2.0])}
    merged = sce(task_vectors({"u": torch.zeros(1), "v": torch.zeros(1)}, experts))
    near(merged["u"], torch.tensor([1.8]))
    near(merged["v"], torch.tensor([1.8]))


def test_zeros_never_agree() -> None:
    near(sce(vectors([2.0, 1.0], [0.0, 1.0]))["w"], torch.tensor([2.0, 1.0]))


def test_small_squares_weigh_as_they_are_except_in_mergekit() -> None:
    """Deltas of language models are small: mean squares under 1e-6 make all weights alike there."""
    small = vectors([3e-4], [1e-4])
    torch.testing.assert_close(sce(small)["w"], torch.tensor([2.8e-4]))
    torch.testing.assert_close(mergekit_sce(small)["w"], torch.tensor([2e-4]))


def test_equal_variances_at_the_cut_leave_the_exact_number() -> None:
    tau = (uniform((400,), "v") * 2).floor() + 1
    merged = sce(vectors(tau, -tau - 1), select_topk=0.25)["w"]
    assert int((merged != 0).sum()) == 100


def test_no_difference_at_all_gives_the_base_under_selection() -> None:
    assert sce(vectors([1.0, 2.0], [1.0, 2.0]), select_topk=0.5)["w"].tolist() == [0.0, 0.0]
