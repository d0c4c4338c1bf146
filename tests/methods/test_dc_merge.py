"""DC-Merge: the traps and worked checks of its specification."""

from functools import partial

import pytest
import torch
from torch import Tensor

from calmerge import TaskVectors, average, dc_merge, task_vectors, tsv_m
from calmerge._random import uniform
from calmerge.methods.dc_merge import _smoothed
from calmerge.pieces.spectral import SVD, svd

near = partial(torch.testing.assert_close, rtol=0, atol=1e-5)


def noise(*shape: int, key: object = 0) -> Tensor:
    return uniform(shape, "dc", key) - 0.5


def vectors(*deltas: Tensor) -> TaskVectors:
    return task_vectors({"w": torch.zeros_like(deltas[0])}, {f"t{i}": {"w": d} for i, d in enumerate(deltas)})


def orthogonal() -> TaskVectors:
    u, _, v = svd(noise(6, 6))
    return vectors(*[(u[:, i : i + 2] * torch.tensor([3.0, 1.0]) @ v[:, i : i + 2].T).float() for i in (0, 2, 4)])


def test_orthogonal_experts_give_tsv_m() -> None:
    near(dc_merge(orthogonal())["w"], tsv_m(orthogonal())["w"])


def test_officially_a_small_core_keeps_a_single_entry_for_each_task() -> None:
    values = torch.linalg.svdvals(dc_merge(orthogonal(), at_least="official")["w"])
    near(values, torch.tensor([3.0, 3.0, 3.0, 0.0, 0.0, 0.0]))


def test_the_steps_by_hand() -> None:
    tvs = vectors(noise(8, 6, key=1), noise(8, 6, key=2))
    parts = [torch.linalg.svd(t.double(), full_matrices=False) for t in tvs["w"]]
    a, _, b = torch.linalg.svd(torch.cat([u[:, :3] for u, _, _ in parts], 1), full_matrices=False)
    c, _, d = torch.linalg.svd(torch.cat([vt[:3] for _, _, vt in parts]), full_matrices=False)
    u, vt = a @ b, c @ d
    cores = torch.stack([u.T @ (p[0][:, :3] * p[1][:3] @ p[2][:3]) @ vt.T for p in parts])
    kept = int(0.5 * 36)
    cores = torch.stack([m.where(m.abs() >= m.abs().flatten().sort(descending=True)[0][kept - 1], 0.0) for m in cores])
    agree = (cores.sign() == cores.sum(0).sign()) & (cores != 0)
    merged = cores.where(agree, 0.0).sum(0) / agree.sum(0).clamp(min=1)
    blocks = torch.block_diag(torch.ones(3, 3), torch.ones(3, 3))
    near(dc_merge(tvs, keep=0.5)["w"], (u @ (merged * blocks) @ vt).float())


@pytest.mark.parametrize(
    ("how", "expected"), [("none", [8.0, 3.0, 1.0]), ("average", [4.0, 4.0, 4.0]), ("linear", [20 / 3, 4.0, 4 / 3])]
)
def test_smoothing_keeps_the_sum(how: str, expected: list[float]) -> None:
    """8 to 1 is steeper than 5 to 1, which the ramp is limited to."""
    triples = SVD(torch.eye(3), torch.tensor([8.0, 3.0, 1.0]), torch.eye(3))
    near(_smoothed(triples, how).s, torch.tensor(expected))


def test_more_tasks_than_rank_are_averaged() -> None:
    tvs = vectors(*[noise(2, 5, key=i) for i in range(3)])
    assert torch.equal(dc_merge(tvs)["w"], average(tvs)["w"])


def test_a_rank_limits_the_directions_of_a_task() -> None:
    tvs = vectors(noise(8, 8))
    near(dc_merge(tvs, rank=2, keep=1.0)["w"], svd(noise(8, 8), 2).product().float())
