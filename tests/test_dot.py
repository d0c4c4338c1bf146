"""Sums and inner products, compiled and by NumPy."""

import numpy as np
import pytest
import torch

from calmerge import _dot
from calmerge._dot import row_products, row_sums, rows_of
from calmerge._watch import Array

SIZES = [1, 63, 64, 65, 2047, 2048, 2049, 10_000]


def rows(n: int, tasks: int = 3) -> Array:
    return np.random.default_rng(n).normal(size=(tasks, n)).astype(np.float32)


def test_entries_are_added_lane_by_lane_in_float64() -> None:
    x = np.zeros((1, 65), np.float32)
    x[0, 0], x[0, 64], x[0, 1] = 1, 2**-40, -1
    assert row_sums(x).tolist() == [2**-40]
    assert row_products(x).tolist() == [[2 + 2**-80]]


@pytest.mark.parametrize("n", SIZES)
def test_compiled_loops_give_the_bits_of_numpy(n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("numba")
    from calmerge import _kernels

    monkeypatch.setattr(_dot, "kernels", lambda: _kernels)
    compiled = row_sums(rows(n)), row_products(rows(n))
    monkeypatch.setattr(_dot, "kernels", lambda: None)
    assert [found.tolist() for found in compiled] == [row_sums(rows(n)).tolist(), row_products(rows(n)).tolist()]


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("tasks", [1, 3])
def test_rows_that_lie_apart_give_the_same_bits(n: int, tasks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("numba")
    from calmerge import _kernels

    monkeypatch.setattr(_dot, "kernels", lambda: _kernels)
    apart = rows(n + 7, tasks)[:, 3 : n + 3]
    near = np.ascontiguousarray(apart)
    assert row_sums(apart).tolist() == row_sums(near).tolist()
    assert row_products(apart).tolist() == row_products(near).tolist()
    assert row_sums(near.T.copy().T).tolist() == row_sums(near).tolist()  # column by column


def test_inner_products_are_those_of_all_pairs() -> None:
    x = rows(1000)
    assert row_products(x) == pytest.approx(x.astype(np.float64) @ x.astype(np.float64).T)


def test_float64_stays_as_it_is_and_half_precision_is_widened() -> None:
    assert rows_of(torch.ones(2, 3, dtype=torch.float64)).dtype == np.float64
    assert row_sums(rows_of(torch.ones(2, 3, 4, dtype=torch.bfloat16))).tolist() == [12.0, 12.0]
