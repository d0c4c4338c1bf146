"""Singular value calibration: the traps and worked checks of its specification."""

from functools import partial

import torch
from torch import Tensor

from calmerge import TaskVectors, svc, task_arithmetic, task_vectors, ties
from calmerge._random import uniform

near = partial(torch.testing.assert_close, rtol=0, atol=1e-5)
plain = partial(task_arithmetic, scale=1.0)


def noise(*shape: int, key: object = 0) -> Tensor:
    return uniform(shape, "svc", key) - 0.5


def vectors(*deltas: Tensor) -> TaskVectors:
    return task_vectors({"w": torch.zeros_like(deltas[0])}, {f"t{i}": {"w": d} for i, d in enumerate(deltas)})


def test_one_expert_stays() -> None:
    tvs = vectors(noise(5, 7))
    near(svc(plain(tvs), tvs)["w"], noise(5, 7))


def test_two_equal_experts_summed_come_back_to_one() -> None:
    tvs = vectors(noise(5, 7), noise(5, 7))
    near(svc(plain(tvs), tvs)["w"], noise(5, 7))


def test_orthogonal_output_directions_stay() -> None:
    """An expert without a part along a direction counts as alpha, not as 0."""
    one, two = torch.diag(torch.tensor([3.0, 1.0, 0.0, 0.0])), torch.diag(torch.tensor([0.0, 0.0, 2.0, 5.0]))
    tvs = vectors(one, two)
    near(svc(plain(tvs), tvs)["w"], one + two)


def test_directions_are_those_of_the_output_not_of_the_input() -> None:
    """u = e1, a = (2, 1), b = (2, 0) and (0, 1): s = 1 twice. The wrong variant, on right vectors, has 5/4 and 5."""
    tvs = vectors(torch.tensor([[2.0, 0.0], [0.0, 0.0]]), torch.tensor([[0.0, 1.0], [0.0, 0.0]]))
    near(svc(plain(tvs), tvs)["w"], torch.tensor([[2.0, 1.0], [0.0, 0.0]]))


def test_the_formula_by_hand() -> None:
    tvs = vectors(noise(4, 6, key=1), noise(4, 6, key=2), noise(4, 6, key=3))
    merged = ties(tvs, keep=0.5)
    u, s, vt = torch.linalg.svd(merged["w"].double(), full_matrices=False)
    expected = torch.zeros(4, 6, dtype=torch.float64)
    for r in range(4):
        a = s[r] * vt[r]
        shares = [
            max(0.1, float(a @ (t.double().T @ u[:, r]) / (t.double().T @ u[:, r]).square().sum())) for t in tvs["w"]
        ]
        expected += 3 / sum(shares) * s[r] * torch.outer(u[:, r], vt[r])
    near(svc(merged, tvs, alpha=0.1)["w"], expected.float())


def test_with_one_it_only_shrinks() -> None:
    tvs = vectors(*[noise(6, 5, key=i) for i in range(3)])
    before = torch.linalg.svdvals(plain(tvs)["w"])
    assert (torch.linalg.svdvals(svc(plain(tvs), tvs)["w"]) <= before + 1e-5).all()


def test_other_tensors_stay() -> None:
    tvs = task_vectors({"b": torch.zeros(2)}, {t: {"b": torch.ones(2)} for t in "ac"})
    assert svc(plain(tvs), tvs)["b"].tolist() == [2.0, 2.0]
