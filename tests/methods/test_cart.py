"""CART: the traps and worked checks of its specification."""

from functools import partial

import pytest
import torch
from torch import Tensor

from calmerge import TaskVectors, average, cart, task_vectors
from calmerge._random import uniform

near = partial(torch.testing.assert_close, rtol=0, atol=1e-5)


def vectors(n: int, *shape: int) -> TaskVectors:
    experts = {f"t{i}": {"w": uniform(shape, "cart", i) - 0.5} for i in range(n)}
    return task_vectors({"w": torch.zeros(shape)}, experts)


@pytest.mark.parametrize("scale", [0.5, 3.0])
def test_full_rank_gives_the_average_whatever_the_scale(scale: float) -> None:
    assert torch.equal(cart(vectors(4, 6, 5), keep=1.0, scale=scale)["w"], average(vectors(4, 6, 5))["w"])


def test_two_experts_give_the_average_whatever_the_rank() -> None:
    near(cart(vectors(2, 6, 5), keep=0.4, scale=3.0)["w"], average(vectors(2, 6, 5))["w"])


def test_deviations_from_the_average_are_cut_and_summed() -> None:
    tvs = vectors(3, 6, 8)
    mean = tvs["w"].mean(0)
    expected = mean.clone()
    for t in tvs["w"]:
        u, s, vt = torch.linalg.svd(t - mean, full_matrices=False)
        expected += 1.5 * (u[:, :2] * s[:2] @ vt[:2])
    near(cart(tvs, keep=0.4, scale=1.5)["w"], expected)  # floor(0.4 * 6) = 2


def test_at_least_one_direction_is_kept() -> None:
    tvs = vectors(3, 6, 8)
    assert torch.equal(cart(tvs, keep=0.01)["w"], cart(tvs, keep=0.17)["w"])
    near(torch.linalg.matrix_rank(cart(tvs, keep=0.01)["w"] - average(tvs)["w"], atol=1e-4), torch.tensor(3))


def test_other_tensors_are_averaged() -> None:
    tvs: TaskVectors = task_vectors({"b": torch.zeros(1)}, {str(i): {"b": torch.tensor([float(i)])} for i in range(3)})
    merged: Tensor = cart(tvs)["b"]
    assert merged.tolist() == [1.0]
