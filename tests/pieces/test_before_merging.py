"""Steps before a merge: truncation and equal norms."""

from functools import partial

import torch
from torch import Tensor

from calmerge import equal_norms, task_arithmetic, task_vectors, ties, truncate
from calmerge._random import uniform
from calmerge.pieces.spectral import svd

near = partial(torch.testing.assert_close, rtol=0, atol=1e-5)


def noise(*shape: int, key: object = 0) -> Tensor:
    return uniform(shape, "before", key) - 0.5


def test_truncation_keeps_leading_directions_of_matrices_alone() -> None:
    shapes = {"w": (6, 8), "b": (6,), "conv": (2, 2, 3, 3)}
    experts = {t: {n: noise(*s, key=(t, n)) for n, s in shapes.items()} for t in "ab"}
    tvs = task_vectors({n: torch.zeros(s) for n, s in shapes.items()}, experts)
    cut = truncate(tvs, keep=0.5)
    near(cut["w"], torch.stack([svd(t, 3).product().float() for t in tvs["w"]]))
    assert all(torch.equal(cut[n], tvs[n]) for n in ("b", "conv"))
    assert torch.equal(truncate(tvs, keep=1.0)["w"], tvs["w"])
    near(truncate(tvs, keep=0.01)["w"], torch.stack([svd(t, 1).product().float() for t in tvs["w"]]))
    by_hand = task_vectors(tvs.base, {t: {n: cut[n][i] for n in shapes} for i, t in enumerate("ab")})
    assert all(torch.equal(ties(cut)[n], ties(by_hand)[n]) for n in shapes)


def test_norms_are_those_of_the_whole_model() -> None:
    experts = {
        "a": {"x": torch.tensor([3.0, 0.0]), "y": torch.tensor([4.0])},
        "b": {"x": torch.tensor([0.0, 1.0]), "y": torch.tensor([0.0])},
    }
    tvs = task_vectors({"x": torch.zeros(2), "y": torch.zeros(1)}, experts)
    equal = equal_norms(tvs)  # norms 5 and 1, their mean 3
    near(equal["x"], torch.tensor([[1.8, 0.0], [0.0, 3.0]]))
    near(equal["y"], torch.tensor([[2.4], [0.0]]))


def test_a_vector_of_zeros_stays() -> None:
    tvs = task_vectors({"x": torch.zeros(2)}, {"a": {"x": torch.tensor([3.0, 4.0])}, "b": {"x": torch.zeros(2)}})
    near(task_arithmetic(equal_norms(tvs), scale=1.0)["x"], torch.tensor([1.5, 2.0]))
