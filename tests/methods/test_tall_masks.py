"""TALL-masks and Consensus: the traps and worked checks of their specification."""

from functools import partial

import pytest
import torch

from calmerge import TaskVectors, UsageError, add, consensus, lines, tall_masks, task_arithmetic, task_vectors, ties
from calmerge.methods.tall_masks import task_masks

near = partial(torch.testing.assert_close, rtol=0, atol=1e-6)


def vectors(*rows: list[float]) -> TaskVectors:
    return task_vectors(
        {"w": torch.zeros(len(rows[0]))}, {f"t{i}": {"w": torch.tensor(r).float()} for i, r in enumerate(rows)}
    )


TVS = ([0.5, -0.2, 0, 0.3, 0.1], [0.1, 0.3, -0.4, 0.3, -0.4], [0, 0.1, 0.1, 0.3, 0.1])


@pytest.fixture
def tvs() -> TaskVectors:
    return vectors(*TVS)


@pytest.mark.parametrize(
    ("threshold", "expected", "kept"),
    [
        (0.4, ["11010", "01111", "01010"], [0, 0.2, 0, 0.9, 0]),
        (0.2, None, [0, 0.2, -0.3, 0.9, -0.2]),
    ],
)
def test_masks_and_consensus_by_hand(
    threshold: float, expected: list[str] | None, kept: list[float], tvs: TaskVectors
) -> None:
    total = task_arithmetic(tvs, scale=1.0)
    masks = task_masks(tvs, total, threshold)["w"]
    if expected:
        assert ["".join(str(int(on)) for on in row) for row in masks] == expected
    else:
        assert masks.sum(0).tolist() == [1, 3, 2, 3, 3]
    near(consensus(total, tvs, threshold=threshold)["w"], torch.tensor(kept))


def test_entries_on_which_all_agree_go_off_at_1_and_exact_equality_is_not_more() -> None:
    """The vectors above times 10, so that sums are exact: |1| > |2 - 1| is false for the last task's second entry."""
    tvs = vectors(*[[round(10 * x) for x in row] for row in TVS])
    masks = task_masks(tvs, task_arithmetic(tvs, scale=1.0), 1.0)["w"]
    assert ["".join(str(int(on)) for on in row) for row in masks] == ["10000", "01101", "00000"]


def test_the_merged_vector_is_masked_not_the_task_s_own(tvs: TaskVectors) -> None:
    near(tall_masks(tvs).for_task("t0")["w"], torch.tensor([0.6, 0.2, 0, 0.9, 0]))


def test_zero_deltas_stay_off_even_where_all_are_zero() -> None:
    """>= would turn frozen tensors on."""
    tvs = vectors([0.0, 1.0], [0.0, 0.0])
    masks = task_masks(tvs, task_arithmetic(tvs, scale=1.0), 0.0)["w"]
    assert masks.tolist() == [[False, True], [False, False]]


@pytest.mark.parametrize("threshold", [0.2, 0.6, 5.0])
def test_what_one_task_alone_changes_is_rebuilt_exactly_and_has_no_consensus(threshold: float) -> None:
    tvs = vectors([0.7, 1.0], [0.0, 1.0])
    merged = tall_masks(tvs, threshold=threshold)
    assert merged.for_task("t0")["w"][0] == tvs["w"][0, 0]
    assert merged.for_task("t1")["w"][0] == 0
    assert consensus(task_arithmetic(tvs, scale=1.0), tvs, threshold=threshold)["w"][0] == 0


def test_one_expert_is_rebuilt_exactly() -> None:
    tvs = vectors([0.3, 0.0, -2.0])
    assert tall_masks(tvs).patches["t0"].mask["w"].tolist() == [True, False, True]
    assert torch.equal(tall_masks(tvs).for_task("t0")["w"], tvs["w"][0])


def test_from_no_agreement_to_too_much(tvs: TaskVectors) -> None:
    """0 is Task Arithmetic; more than T leaves the base."""
    total = task_arithmetic(tvs, scale=1.0)
    assert torch.equal(consensus(total, tvs, k=0)["w"], total["w"])
    near(consensus(total, tvs, k=1, threshold=1.0)["w"], torch.tensor([0.6, 0.2, -0.3, 0, -0.2]))
    assert consensus(total, tvs, k=4)["w"].tolist() == [0] * 5


def test_scale_comes_after_the_masks(tvs: TaskVectors) -> None:
    """A scaled sum would give other masks: 0.1 of it makes even frozen directions look large."""
    total = task_arithmetic(tvs, scale=1.0)
    near(consensus(total, tvs, scale=0.5)["w"], consensus(total, tvs)["w"] / 2)


def test_composition_on_ties_is_its_steps_by_hand(tvs: TaskVectors) -> None:
    merged = ties(tvs, keep=0.5, combine="sum")
    tau = tvs["w"]
    votes = (tau.abs() > 0.4 * (merged["w"] - tau).abs()).sum(0)
    assert torch.equal(consensus(merged, tvs)["w"], torch.where(votes >= 2, merged["w"], 0.0))
    shared = tall_masks(tvs, inner=partial(ties, keep=0.5, combine="sum")).shared
    assert torch.equal(shared["w"], merged["w"])


def test_lines_on_consensus_uses_the_masked_vector_s_norm(tvs: TaskVectors) -> None:
    kept = consensus(task_arithmetic(tvs, scale=1.0), tvs)
    alpha = 2.2 / 1.1 / 3  # |.6|+|.2|+|.3|+|.9|+|.2| over |.2|+|.9|
    near(lines(kept, tvs, beta=0.0)["w"], kept["w"] * alpha)


def test_a_threshold_for_each_task(tvs: TaskVectors) -> None:
    mixed = task_masks(tvs, task_arithmetic(tvs, scale=1.0), {"t0": 0.4, "t1": 1.0, "t2": 0.4})["w"]
    assert ["".join(str(int(on)) for on in row) for row in mixed] == ["11010", "01101", "01010"]


@pytest.mark.parametrize(
    ("threshold", "message"), [({"t0": 0.4, "t1": 0.4}, "some tasks have none"), ({"t9": 1.0}, "no task 't9'")]
)
def test_thresholds_by_task_must_name_them_all(threshold: dict[str, float], message: str, tvs: TaskVectors) -> None:
    with pytest.raises(UsageError, match=message):
        tall_masks(tvs, threshold=threshold)


def test_a_negative_threshold_by_task_is_refused(tvs: TaskVectors) -> None:
    with pytest.raises(UsageError, match=r"threshold must hold for 't0' a value that must be at least 0|at least 0"):
        tall_masks(tvs, threshold={"t0": -1.0, "t1": 0.4, "t2": 0.4})


def test_the_base_is_not_compared(tvs: TaskVectors) -> None:
    """A peer's code compares |theta_0 - tau_t| and turns nearly every bit on."""
    experts = {t: {"w": tvs["w"][i] + 100} for i, t in enumerate(tvs.tasks)}
    moved = task_vectors({"w": torch.full((5,), 100.0)}, experts)
    torch.testing.assert_close(
        add(moved.base, tall_masks(moved).for_task("t2"))["w"] - 100,
        torch.tensor([0, 0.2, 0, 0.9, 0]),
        rtol=0,
        atol=5e-5,
    )
