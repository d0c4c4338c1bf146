"""Iso-C: the traps and worked checks of its specification."""

from functools import partial

import torch
from torch import Tensor

from calmerge import TaskVectors, iso_c, task_vectors
from calmerge._random import uniform

near = partial(torch.testing.assert_close, rtol=0, atol=1e-5)


def noise(*shape: int, key: object = 0) -> Tensor:
    return uniform(shape, "iso", key) - 0.5


def vectors(*deltas: Tensor) -> TaskVectors:
    return task_vectors({"w": torch.zeros_like(deltas[0])}, {f"t{i}": {"w": d} for i, d in enumerate(deltas)})


def test_all_singular_values_become_their_mean() -> None:
    both = vectors(torch.diag(torch.tensor([4.0, 0.0])), torch.diag(torch.tensor([0.0, 2.0])))
    near(iso_c(both)["w"], 3 * torch.eye(2))


def test_the_nuclear_norm_of_the_sum_stays() -> None:
    tvs = vectors(*[noise(5, 9, key=i) for i in range(3)])
    values = torch.linalg.svdvals(iso_c(tvs)["w"])
    near(values, values.mean().expand(5))
    near(values.sum(), torch.linalg.svdvals(tvs["w"].sum(0)).sum())


def test_other_tensors_are_the_mean_not_the_sum() -> None:
    tvs = task_vectors({"b": torch.zeros(2)}, {"a": {"b": torch.ones(2)}, "c": {"b": 3 * torch.ones(2)}})
    assert iso_c(tvs)["b"].tolist() == [2.0, 2.0]
    assert iso_c(tvs, scale=1.5)["b"].tolist() == [3.0, 3.0]


def test_a_low_rank_sum_gets_no_arbitrary_directions() -> None:
    """The official rule shrinks the mean by rank / r and fills the null space."""
    low = noise(6, 2, key=1) @ noise(2, 6, key=2)
    values = torch.linalg.svdvals(low)[:2]
    ours = torch.linalg.svdvals(iso_c(vectors(low))["w"])
    near(ours, torch.cat([values.mean().expand(2), torch.zeros(4)]))
    near(torch.linalg.svdvals(iso_c(vectors(low), rank="full")["w"]), (values.sum() / 6).expand(6))


def test_full_and_numerical_rank_agree_where_there_is_no_null_space() -> None:
    tvs = vectors(noise(6, 6, key=1), noise(6, 6, key=2))
    near(iso_c(tvs, rank="full")["w"], iso_c(tvs)["w"])
