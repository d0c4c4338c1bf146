"""MagMax."""

import torch

from calmerge import magmax, task_vectors


def test_the_largest_magnitude_wins_and_equal_ones_do_not_depend_on_order() -> None:
    a, b = {"w": torch.tensor([1.0, -3.0, 2.0, 0.0])}, {"w": torch.tensor([-2.0, 1.0, -2.0, 0.0])}
    for experts in ({"a": a, "b": b}, {"b": b, "a": a}):
        assert magmax(task_vectors({"w": torch.zeros(4)}, experts), scale=1.0)["w"].tolist() == [-2, -3, 2, 0]
