"""Singular values and polar factors."""

import logging
from functools import partial

import pytest
import torch
from torch import Tensor

from calmerge._random import uniform
from calmerge.pieces.spectral import full_svd, polar, svd, truncated

near = partial(torch.testing.assert_close, rtol=0, atol=1e-6)


def noise(*shape: int, key: object = 0) -> Tensor:
    return uniform(shape, "spectral", key) - 0.5


@pytest.mark.parametrize("shape", [(7, 7), (9, 4), (4, 9), (1, 5), (5, 1), (1, 1)])
def test_triples_make_the_matrix_with_orthonormal_factors(shape: tuple[int, int]) -> None:
    matrix = noise(*shape)
    found = svd(matrix)
    near(found.product(), matrix.double())
    near(found.s, torch.linalg.svdvals(matrix.double()))
    k = min(shape)
    near(found.u.T @ found.u, torch.eye(k, dtype=torch.float64))
    near(found.v.T @ found.v, torch.eye(k, dtype=torch.float64))


def test_small_singular_values_keep_their_digits() -> None:
    """A Gram matrix in float32 would lose everything below 3e-4 of the largest."""
    u, v = svd(noise(6, 6, key=1)).u, svd(noise(6, 6, key=2)).v
    values = torch.tensor([1.0, 1e-1, 1e-2, 1e-3, 1e-4, 1e-5], dtype=torch.float64)
    torch.testing.assert_close(svd(u * values @ v.T).s, values, rtol=1e-9, atol=0)


@pytest.mark.parametrize("shape", [(8, 6), (6, 8)])
def test_the_null_space_is_left_out(shape: tuple[int, int]) -> None:
    low = noise(shape[0], 2, key=1) @ noise(2, shape[1], key=2)
    assert len(svd(low).s) == 2
    assert len(full_svd(low).s) == 6
    near(svd(low).product(), low.double())
    assert len(svd(torch.zeros(shape)).s) == 0
    assert svd(torch.zeros(shape)).product().tolist() == torch.zeros(shape).tolist()


def test_a_rank_keeps_the_largest() -> None:
    kept = svd(torch.diag(torch.tensor([1.0, 5.0, 3.0])), 2)
    near(kept.s, torch.tensor([5.0, 3.0], dtype=torch.float64))
    near(kept.product(), torch.diag(torch.tensor([0.0, 5.0, 3.0])).double())
    assert truncated(noise(3, 4), 3) is not None
    whole = noise(3, 4)
    assert truncated(whole, 3) is whole


@pytest.mark.parametrize("shape", [(6, 6), (8, 3), (3, 8)])
def test_the_polar_factor_is_the_one_of_the_svd(shape: tuple[int, int]) -> None:
    u, _, vt = torch.linalg.svd(noise(*shape).double(), full_matrices=False)
    near(polar(noise(*shape)), u @ vt)


def test_dependent_columns_share_one_direction_and_are_logged(caplog: pytest.LogCaptureFixture) -> None:
    """The polar factor is not unique there; a full one would add a direction that no column has."""
    column = torch.tensor([[0.6], [0.8], [0.0]])
    with caplog.at_level(logging.INFO, logger="calmerge.pieces.spectral"):
        found = polar(torch.cat([column, column], 1), of="fc.weight")
    near(found, torch.cat([column, column], 1).double() / 2**0.5)
    assert "fc.weight: 1 of 2 directions depend on the others" in caplog.text
    near(polar(torch.cat([column, column + 1e-6], 1)), torch.cat([column, column], 1).double() / 2**0.5)


def test_columns_that_are_nearly_dependent_by_chance_are_kept() -> None:
    """With 768 rows and 8 tasks one pair in several has a singular value below 1e-4: officially it counts in full."""
    factors, values = svd(noise(8, 8)), torch.logspace(0, -5, 8, dtype=torch.float64)
    near(polar(factors.u * values @ factors.v.T), factors.u @ factors.v.T)


def test_isotropic_keeps_the_sum_of_the_singular_values() -> None:
    flat = svd(noise(5, 8)).isotropic()
    values = torch.linalg.svdvals(flat)
    near(values, values.mean().expand(5))
    near(values.sum(), svd(noise(5, 8)).s.sum())
