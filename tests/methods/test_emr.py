"""EMR: the traps and worked checks of its specification."""

from functools import partial

import pytest
import torch

from calmerge import TaskVectors, emr, task_vectors

near = partial(torch.testing.assert_close, rtol=0, atol=5e-4)


def vectors(*rows: list[float]) -> TaskVectors:
    return task_vectors({"w": torch.zeros(len(rows[0]))}, {f"t{i}": {"w": torch.tensor(r)} for i, r in enumerate(rows)})


def test_elect_mask_and_rescale_by_hand() -> None:
    """A sum of 0, the last entry's, counts as minus."""
    merged = emr(vectors([2, -1, 0.5], [1, 3, -0.5]))
    assert merged.shared["w"].tolist() == [2, 3, -0.5]
    assert merged.patches["t0"].mask["w"].tolist() == [True, False, False]
    assert merged.patches["t1"].mask["w"].tolist() == [True, True, True]
    near(merged.for_task("t0")["w"], torch.tensor([3.5, 0, 0]))
    near(merged.for_task("t1")["w"], torch.tensor([1.636, 2.455, -0.409]))


def test_one_expert_is_rebuilt_exactly() -> None:
    tvs = vectors([0.3, 0.0, -2.0])
    assert torch.equal(emr(tvs).for_task("t0")["w"], tvs["w"][0])


def test_an_empty_mask_gives_the_base_not_a_division_by_zero() -> None:
    merged = emr(vectors([0.0, 0.0], [1.0, -1.0]))
    assert merged.for_task("t0")["w"].tolist() == [0, 0]


@pytest.mark.parametrize(("rescale", "expected"), [("official", 5 / 1), ("l1", 8 / 4)])
def test_the_official_rescaler_sums_means_of_tensors_the_paper_s_sums_entries(rescale: str, expected: float) -> None:
    """t0 is [4] and [1, 1, 1, 1]; it is outvoted in the small tensor, where its mask is off. Means: (4 + 1) / (0 + 1);
    sums: (4 + 4) / (0 + 4)."""
    base = {"small": torch.zeros(1), "large": torch.zeros(4)}
    t0 = {"small": torch.tensor([4.0]), "large": torch.ones(4)}
    t1 = {"small": torch.tensor([-5.0]), "large": torch.zeros(4)}
    merged = emr(task_vectors(base, {"t0": t0, "t1": t1}), rescale=rescale)  # type: ignore[arg-type]
    assert merged.for_task("t0")["large"].tolist() == [expected] * 4
    assert merged.for_task("t0")["small"].tolist() == [0]
