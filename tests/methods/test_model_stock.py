"""Model Stock: the traps and worked checks of its specification."""

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from calmerge import TaskVectors, add, average, model_stock, task_vectors
from calmerge._random import uniform

near = partial(torch.testing.assert_close, rtol=0, atol=1e-6)


def vectors(*deltas: Any) -> TaskVectors:
    rows = [torch.as_tensor(d, dtype=torch.float32) for d in deltas]
    return task_vectors({"w": torch.zeros_like(rows[0])}, {f"t{i}": {"w": d} for i, d in enumerate(rows)})


def test_sixty_degrees_keep_two_thirds_of_the_mean() -> None:
    near(model_stock(vectors([1, 0], [0.5, 3**0.5 / 2]))["w"], torch.tensor([0.5, 0.288675]))


def test_equal_models_come_out_as_they_are() -> None:
    near(model_stock(vectors([3, 4], [3, 4]))["w"], torch.tensor([3.0, 4.0]))
    near(model_stock(vectors([3, 4], [3, 4], [3, 4]))["w"], torch.tensor([3.0, 4.0]))


def test_orthogonal_vectors_give_the_base() -> None:
    """As those of different tasks nearly are: the method is not for them."""
    tvs = vectors([1, 0], [0, 1])
    assert add(tvs.base, model_stock(tvs))["w"].tolist() == [0.0, 0.0]


def test_a_cosine_below_zero_gives_the_base_unless_unclamped() -> None:
    tvs = vectors([1, 0], [-0.5, 3**0.5 / 2])
    assert model_stock(tvs)["w"].tolist() == [0.0, 0.0]
    near(model_stock(tvs, clamp=False)["w"], -2 * average(tvs)["w"])  # 2 (-1/2) / (1 - 1/2)
    assert model_stock(vectors([1, 2], [-1, -2]))["w"].tolist() == [0.0, 0.0]


def test_more_than_two_models_take_the_mean_of_cosines_or_of_angles() -> None:
    tvs = vectors([1, 0], [1, 0], [0.5, 3**0.5 / 2])  # cosines 1, 1/2, 1/2; angles 0, 60, 60 degrees
    mean = average(tvs)["w"]
    near(model_stock(tvs)["w"], mean * (3 * 2 / 3) / (1 + 2 * 2 / 3))
    cos = torch.tensor(40.0).deg2rad().cos()
    near(model_stock(tvs, angle="mean_angle")["w"], mean * 3 * cos / (1 + 2 * cos))


def test_the_angle_is_that_of_a_whole_tensor_whatever_its_blocks() -> None:
    deltas = [uniform((300, 3), "stock", i) for i in range(3)]
    flat = [d.reshape(-1) for d in deltas]
    near(model_stock(vectors(*deltas))["w"].reshape(-1), model_stock(vectors(*flat))["w"])


def test_filters_have_an_angle_each() -> None:
    a = torch.tensor([[1.0, 0.0], [2.0, 0.0]])
    b = torch.tensor([[0.5, 3**0.5 / 2], [2.0, 0.0]])
    near(model_stock(vectors(a, b), per="filter")["w"], torch.tensor([[0.5, 0.288675], [2.0, 0.0]]))
    vector = vectors([1, 0], [0.5, 3**0.5 / 2])
    assert torch.equal(model_stock(vector, per="filter")["w"], model_stock(vector)["w"])


@pytest.mark.parametrize("per", ["tensor", "filter"])
def test_filters_of_convolutions_are_their_rows(per: Any) -> None:
    def weights(shape: tuple[int, ...]) -> Tensor:
        deltas = [uniform((4, 6), "conv", i).reshape(shape) for i in range(2)]
        return model_stock(vectors(*deltas), per=per)["w"].reshape(4, 6)

    near(weights((4, 3, 2, 1)), weights((4, 6)))


def test_tiny_updates_have_an_angle_too() -> None:
    """A floor on the norms would send the small tensors of a model to the base."""
    small = model_stock(vectors([1e-6, 0], [0.5e-6, 3**0.5 / 2 * 1e-6]))["w"]
    torch.testing.assert_close(small, 1e-6 * torch.tensor([0.5, 0.288675]), rtol=1e-5, atol=0)
    assert model_stock(vectors([0, 0], [1, 1]))["w"].tolist() == [0.0, 0.0]
