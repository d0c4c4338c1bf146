"""TSV-M: the traps and worked checks of its specification."""

from functools import partial

import torch
from torch import Tensor

from calmerge import TaskVectors, average, dare, task_vectors, tsv_m
from calmerge._random import uniform
from calmerge.pieces.drop import drop_and_rescale
from calmerge.pieces.spectral import svd

near = partial(torch.testing.assert_close, rtol=0, atol=1e-5)


def noise(*shape: int, key: object = 0) -> Tensor:
    return uniform(shape, "tsv", key) - 0.5


def vectors(*deltas: Tensor) -> TaskVectors:
    return task_vectors({"w": torch.zeros_like(deltas[0])}, {f"t{i}": {"w": d} for i, d in enumerate(deltas)})


def test_each_task_keeps_its_share_of_the_rank() -> None:
    """Task 0's second direction is cut; the plain sum would be diag(3, 3)."""
    near(tsv_m(vectors(torch.diag(torch.tensor([3.0, 1.0])), torch.diag(torch.tensor([0.0, 2.0]))))["w"],
         torch.diag(torch.tensor([3.0, 2.0])))  # fmt: skip


def test_directions_of_tasks_are_made_orthogonal() -> None:
    """The plain sum has singular values 3 and 1."""
    e, u = torch.tensor([1.0, 0.0]), torch.tensor([0.5, 3**0.5 / 2])
    both = vectors(2 * torch.outer(e, e), 2 * torch.outer(u, u))
    near(tsv_m(both)["w"], 2 * torch.eye(2))
    near(tsv_m(both, orthogonalize=False)["w"], both["w"].sum(0))
    near(torch.linalg.svdvals(both["w"].sum(0)), torch.tensor([3.0, 1.0]))


def test_orthogonal_experts_give_their_sum() -> None:
    u, _, v = svd(noise(6, 6))
    deltas = [(u[:, i : i + 2] * torch.tensor([3.0, 1.0]) @ v[:, i : i + 2].T).float() for i in (0, 2, 4)]
    near(tsv_m(vectors(*deltas))["w"], sum(deltas))


def test_one_expert_comes_out_unchanged() -> None:
    near(tsv_m(vectors(noise(4, 7)))["w"], noise(4, 7))


def test_more_tasks_than_rank_are_averaged_not_dropped() -> None:
    tvs = vectors(*[noise(2, 5, key=i) for i in range(3)])
    assert torch.equal(tsv_m(tvs)["w"], average(tvs)["w"])


def test_the_same_expert_twice_adds_no_direction() -> None:
    """Duplicates change k for all, and share one direction: each leading triple counts once."""
    delta = noise(6, 6)
    near(tsv_m(vectors(delta, delta))["w"], svd(delta, 3).product().float())


def test_an_expert_without_update_takes_nothing_but_rank() -> None:
    delta = noise(6, 6)
    near(tsv_m(vectors(delta, torch.zeros(6, 6)))["w"], svd(delta, 3).product().float())


def test_scale_multiplies_everything() -> None:
    base = {"w": torch.zeros(2, 2), "b": torch.zeros(2)}
    experts = {t: {"w": torch.eye(2) * c, "b": torch.ones(2) * c} for t, c in {"a": 1.0, "b": 3.0}.items()}
    once, twice = (tsv_m(task_vectors(base, experts), scale=s) for s in (1.0, 2.0))
    assert once["b"].tolist() == [2.0, 2.0]
    assert all(torch.equal(twice[n], 2 * once[n]) for n in once)


def test_dare_before_tsv_m_is_the_steps_by_hand() -> None:
    tvs = vectors(noise(8, 6, key=1), noise(8, 6, key=2))
    composed = dare(tvs, rate=0.5, seed=3, inner=tsv_m)["w"]
    dropped = drop_and_rescale(tvs, rate=0.5, seed=3)["w"]
    (u1, s1, v1), (u2, s2, v2) = (torch.linalg.svd(d.double(), full_matrices=False) for d in dropped)
    u, s, v = torch.cat([u1[:, :3], u2[:, :3]], 1), torch.cat([s1[:3], s2[:3]]), torch.cat([v1[:3], v2[:3]])
    a, _, b = torch.linalg.svd(u, full_matrices=False)
    c, _, d = torch.linalg.svd(v, full_matrices=False)
    near(composed, (a @ b * s @ c @ d).float())
