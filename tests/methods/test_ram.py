"""RAM and RAM+: the worked checks of their specification."""

from functools import partial

import torch

from calmerge import TaskVectors, ram, ram_plus, task_vectors

near = partial(torch.testing.assert_close, rtol=0, atol=1e-6)


def vectors(*rows: list[float]) -> TaskVectors:
    tensors = [torch.tensor(r) for r in rows]
    return task_vectors({"w": torch.zeros_like(tensors[0])}, {f"t{i}": {"w": w} for i, w in enumerate(tensors)})


def test_unique_entries_stay_whole_and_shared_ones_are_averaged() -> None:
    assert ram(vectors([1.0, 0, 2], [0.0, 3, 4]))["w"].tolist() == [1, 3, 3]


def test_the_mean_is_over_those_that_changed_it() -> None:
    assert ram(vectors([3.0, 0], [5.0, 0], [0.0, 0]))["w"].tolist() == [4, 0]


def test_unique_entries_grow_with_what_is_shared_up_to_a_limit() -> None:
    """Each task shares 1 entry and has 1 alone: 1 / 1 is cut to 0.2, and 1 + 0.1 * 0.2 = 1.02."""
    near(ram_plus(vectors([1.0, 0, 2], [0.0, 3, 4]))["w"], torch.tensor([1.02, 3.06, 3.0]))


def test_below_the_limit_the_ratio_counts() -> None:
    """The first task has 10 entries alone and 1 shared: 1 + 0.1 / 10."""
    near(ram_plus(vectors([1.0] * 11, [0.0] * 10 + [3.0]))["w"], torch.tensor([1.01] * 10 + [2.0]))


def test_counts_are_those_of_the_tensor_not_of_the_model() -> None:
    base = {"u": torch.zeros(1), "v": torch.zeros(1)}
    experts = {"a": {"u": torch.ones(1), "v": torch.ones(1)}, "b": {"u": torch.zeros(1), "v": torch.ones(1)}}
    assert ram_plus(task_vectors(base, experts))["u"].tolist() == [1]


def test_the_threshold_is_absolute() -> None:
    tvs = vectors([0.01, 1.0], [1.0, 1.0])
    near(ram(tvs, threshold=0.1)["w"], torch.tensor([1.0, 1.0]))
    near(ram(tvs)["w"], torch.tensor([0.505, 1.0]))


def test_without_a_rate_ram_plus_is_ram() -> None:
    tvs = vectors([1.0, 0, 2], [0.0, 3, 4])
    assert torch.equal(ram_plus(tvs, rate=0.0)["w"], ram(tvs)["w"])
