"""Iso-CTS: the traps and worked checks of its specification."""

from functools import partial

import pytest
import torch
from torch import Tensor

from calmerge import TaskVectors, iso_c, iso_cts, task_vectors
from calmerge._random import uniform
from calmerge.methods.iso_cts import dimensions

near = partial(torch.testing.assert_close, rtol=0, atol=1e-5)


def vectors(n: int, *shape: int) -> TaskVectors:
    experts = {f"t{i}": {"w": uniform(shape, "cts", i) - 0.5} for i in range(n)}
    return task_vectors({"w": torch.zeros(shape)}, experts)


@pytest.mark.parametrize(
    ("r", "common", "tasks", "expected"),
    [
        (768, 0.8, 8, (616, 19)),
        (768, 0.8, 14, (614, 11)),
        (768, 0.8, 20, (608, 8)),
        (1024, 0.8, 8, (816, 26)),
        (512, 0.8, 8, (408, 13)),
        (10, 0.8, 3, (7, 1)),
        (10, 0.8, 8, (10, 0)),
        (20, 0.8, 8, (20, 0)),  # a half goes to the even number
        (5, 0.0, 3, (2, 1)),
    ],
)
def test_the_table_of_dimensions(r: int, common: float, tasks: int, expected: tuple[int, int]) -> None:
    assert dimensions(r, common, tasks) == expected


@pytest.mark.parametrize("size", [10, 20])
def test_without_room_for_tasks_it_equals_iso_c(size: int) -> None:
    near(iso_cts(vectors(8, size, size))["w"], iso_c(vectors(8, size, size))["w"])


def test_the_steps_by_hand() -> None:
    tvs = vectors(2, 8, 6)
    tau = tvs["w"].double()
    u, s, vt = torch.linalg.svd(tau.sum(0), full_matrices=False)
    parts: list[tuple[Tensor, Tensor, Tensor]] = []
    for t in tau:  # r = 6, f = 0.3: q = round((6 - 1) / 2) = 2 and c = 2; the projection is on the left only
        ut, st, vtt = torch.linalg.svd(t - u[:, :2] @ u[:, :2].T @ t, full_matrices=False)
        parts.append((ut[:, :2], st[:2], vtt[:2]))
    parts.append((u[:, :2], s[:2], vt[:2]))
    a, _, b = torch.linalg.svd(torch.cat([p[0] for p in parts], 1), full_matrices=False)
    c, _, d = torch.linalg.svd(torch.cat([p[2] for p in parts]), full_matrices=False)
    near(iso_cts(tvs, common=0.3)["w"], (torch.cat([p[1] for p in parts]).mean() * (a @ b) @ (c @ d)).float())


def test_all_singular_values_are_equal() -> None:
    values = torch.linalg.svdvals(iso_cts(vectors(3, 20, 30))["w"])
    near(values, values.mean().expand(20))
