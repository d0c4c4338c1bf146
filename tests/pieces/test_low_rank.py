"""Products of thin factors: against the matrices that they make."""

import torch

from calmerge._lora import Factors
from calmerge._random import uniform
from calmerge.pieces.low_rank import balanced, joint_space, left_basis, product_svd


def noise(*shape: int) -> torch.Tensor:
    return (uniform(shape, shape) - 0.5).double()


def test_a_product_s_triples_are_those_of_the_matrix() -> None:
    left, right = noise(10, 3), noise(3, 8)
    u, s, v = product_svd(left, right)
    torch.testing.assert_close(s, torch.linalg.svdvals(left @ right)[:3])
    torch.testing.assert_close(u * s @ v.T, left @ right)


def test_balanced_factors_forget_how_the_product_was_stored() -> None:
    left, right, gauge = noise(6, 2), noise(2, 5), torch.tensor([[3.0, 1.0], [0.0, 0.1]]).double()
    one = balanced(Factors(left, right, 2.0))
    two = balanced(Factors(left @ gauge, gauge.inverse() @ right, 2.0))
    torch.testing.assert_close(one[0] @ one[1], 2 * left @ right)
    for a, b in zip(one, two, strict=True):
        torch.testing.assert_close(a.abs(), b.abs())


def test_a_basis_has_all_directions_even_where_columns_repeat() -> None:
    same = noise(6, 2)
    u = left_basis([same, same])
    assert u.shape == (6, 4)
    torch.testing.assert_close(u.T @ u, torch.eye(4).double())
    torch.testing.assert_close(u @ (u.T @ same), same)


def test_a_joint_space_is_that_of_the_wide_matrix() -> None:
    """m=10, n=8, r=2, T=3: k = 6, and U C_t gives every matrix back."""
    pairs = [(noise(10, 2) * (t + 1), noise(2, 8)) for t in range(3)]
    pairs[1] = (pairs[1][0].flip(0), pairs[1][1].flip(1))
    pairs[2] = (pairs[2][0].roll(1, 0), pairs[2][1].roll(3, 1))
    u, c = joint_space(pairs)
    assert u.shape == (10, 6)
    for (left, right), part in zip(pairs, c, strict=True):
        torch.testing.assert_close(u @ part, left @ right)
    wide = torch.linalg.svd(torch.cat([left @ right for left, right in pairs], 1), full_matrices=False)
    torch.testing.assert_close(u.abs(), wide.U[:, :6].abs())


def test_directions_of_no_size_are_left_out_of_a_joint_space() -> None:
    left, right = noise(5, 1), noise(1, 4)
    u, c = joint_space([(left, right), (left, 2 * right)])
    assert u.shape == (5, 1)
    torch.testing.assert_close(c[1], 2 * c[0])
