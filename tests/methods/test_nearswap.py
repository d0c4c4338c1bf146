"""nearswap and Arcee Fusion: the worked checks and traps of their specification."""

import pytest
import torch

from calmerge import UsageError, add, arcee_fusion, nearswap, task_vectors
from calmerge._random import uniform


def test_every_weight_moves_by_t_at_most() -> None:
    tvs = task_vectors({"w": torch.tensor([1.0, 1.0])}, {"a": {"w": torch.tensor([1.00005, 1.5])}})
    torch.testing.assert_close(add(tvs.base, nearswap(tvs, t=1e-4))["w"], torch.tensor([1.00005, 1.0001]))


def test_t_of_zero_is_the_base() -> None:
    tvs = task_vectors({"w": torch.tensor([1.0])}, {"a": {"w": torch.tensor([2.0])}})
    assert nearswap(tvs, t=0.0)["w"].tolist() == [0.0]


def test_distances_below_a_millionth_count_as_that() -> None:
    tvs = task_vectors({"w": torch.zeros(1)}, {"a": {"w": torch.tensor([1e-8])}})
    torch.testing.assert_close(nearswap(tvs, t=5e-7)["w"], torch.tensor([5e-9]))


def test_several_experts_are_refused() -> None:
    tvs = task_vectors({"w": torch.zeros(1)}, {t: {"w": torch.ones(1)} for t in "ab"})
    with pytest.raises(UsageError, match=r"nearswap takes the base and one expert, got 2 experts \(a, b\)"):
        nearswap(tvs, t=1.0)
    with pytest.raises(UsageError, match=r"arcee_fusion takes the base and one expert, got 2 experts \(a, b\)"):
        arcee_fusion(tvs)


def test_fusion_copies_what_lies_beyond_the_quartiles() -> None:
    """As told, on the numbers themselves: quartiles without interpolation, at least the threshold."""
    base, expert = uniform((20, 8), "base"), uniform((20, 8), "base") + (uniform((20, 8), "delta") - 0.5) ** 5
    p, q = expert.double().softmax(-1) + 1e-8, base.double().softmax(-1) + 1e-8
    importance = (expert - base).abs() * (p * (p / q).log()).sum(-1, keepdim=True)
    ordered = importance.flatten().sort().values
    first, median, third = (ordered[int(share * 159)] for share in (0.25, 0.5, 0.75))
    chosen = importance >= median + 1.5 * (third - first)
    merged = arcee_fusion(task_vectors({"w": base}, {"a": {"w": expert}}))["w"]
    assert 0 < int(chosen.sum()) < 160
    assert torch.equal(merged != 0, chosen)
    assert torch.equal(merged[chosen], (expert - base)[chosen])


def test_the_divergence_is_each_row_s_own() -> None:
    """Adding a number to a whole row changes no softmax: such changes have no importance beside others."""
    base = uniform((6, 4), "row")
    expert = base.clone()
    expert[0] += 10.0
    expert[1, 0] += 0.5
    merged = arcee_fusion(task_vectors({"w": base}, {"a": {"w": expert}}))["w"]
    assert merged[1, 0] == (expert - base)[1, 0]
    assert merged[1, 0] > 0
