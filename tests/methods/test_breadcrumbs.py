"""Model Breadcrumbs: the traps and worked checks of its specification."""

from functools import partial

import pytest
import torch
from torch import Tensor

from calmerge import TaskVectors, breadcrumbs, task_arithmetic, task_vectors
from calmerge.pieces.middle import middle

near = partial(torch.testing.assert_close, rtol=0, atol=1e-6)


def one(w: Tensor) -> TaskVectors:
    return task_vectors({"w": torch.zeros_like(w)}, {"a": {"w": w}})


W = torch.tensor([[10.0, 9, 8, 7, 6, 5, 4, 3, 2, 1], [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0]])


def test_rows_compete_within_themselves_not_over_the_tensor() -> None:
    kept = breadcrumbs(one(W), keep=0.3, outliers=0.1, scale=1.0)["w"]
    near(kept, torch.tensor([[0, 9, 8, 7, 0, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0, 0.7, 0.8, 0.9, 0]]))


def test_the_paper_s_scope_is_the_tensor() -> None:
    kept = breadcrumbs(one(W), keep=0.3, outliers=0.1, scale=1.0, scope="tensor")["w"]
    near(kept, torch.tensor([[0.0, 0, 8, 7, 6, 5, 4, 3, 0, 0], [0] * 10]))


@pytest.mark.parametrize(("remove_first", "expected"), [(True, [9, 8, 7]), (False, [9, 8])])
@pytest.mark.parametrize("scope", ["row", "tensor"])
def test_outliers_may_go_from_among_the_kept(remove_first: bool, expected: list[float], scope: str) -> None:
    kept = middle(one(W[:1]), keep=0.3, outliers=0.1, scope=scope, remove_first=remove_first)["w"]  # type: ignore[arg-type]
    assert [x for x in kept.flatten().tolist() if x] == expected


def test_a_small_bias_keeps_its_share_where_no_outlier_is_due() -> None:
    """n * outliers is below 1 for 5 entries: none is removed, and the vector does not vanish."""
    kept = breadcrumbs(one(torch.tensor([0.1, -0.5, 0.2, 0.3, 0.4])), keep=0.2, outliers=0.006, scale=1.0)["w"]
    near(kept, torch.tensor([0, -0.5, 0, 0, 0]))


def test_a_slice_too_small_for_one_kept_entry_is_zeroed() -> None:
    assert middle(one(torch.ones(2, 4)), keep=0.15)["w"].abs().sum() == 0


def test_a_convolution_s_rows_are_along_its_last_dimension() -> None:
    """Of 32 entries in a row 4 stay and none is an outlier."""
    w = torch.arange(2 * 3 * 2 * 32).reshape(2, 3, 2, 32).float() + 1
    kept = middle(one(w), keep=0.15, outliers=0.006)["w"][0]
    assert ((kept != 0).sum(-1) == 4).all()


def test_numbers_without_dimensions_pass() -> None:
    assert middle(one(torch.tensor(0.5)), keep=0.0)["w"].tolist() == [0.5]


def test_everything_kept_is_task_arithmetic() -> None:
    tvs = one(W)
    assert torch.equal(breadcrumbs(tvs, keep=1.0, outliers=0.0, scale=0.4)["w"], task_arithmetic(tvs, scale=0.4)["w"])


def test_equal_magnitudes_at_a_cut_stay() -> None:
    assert middle(one(torch.tensor([[3.0, -2, 2, 2, 1]])), keep=0.4, outliers=0.2)["w"].tolist() == [[[0, -2, 2, 2, 0]]]


def test_an_empty_tensor_stays_empty() -> None:
    expert = {"w": torch.zeros(0, 4), "v": torch.ones(2)}
    assert breadcrumbs(task_vectors({"w": torch.zeros(0, 4), "v": torch.zeros(2)}, {"a": expert}))["w"].shape == (0, 4)
