"""Sums and inner products in float64, in one order on every processor.

Entry i goes to lane i mod 64, each lane is added up from front to back, and the lanes in the end. The product of two
float32 is exact in float64, so that it makes no difference whether a processor fuses it with the sum.
"""

import math

import numpy as np
from torch import Tensor

from calmerge._compiled import kernels
from calmerge._watch import Array

SUM_LANES = 64


def rows_of(block: Tensor) -> Array:
    """The entries of each of the first dimension, float32 where they are stored in fewer bits: [T, n]."""
    return (block if block.itemsize > 2 else block.float()).numpy(force=True).reshape(len(block), -1)


def lanes_of(*shape: int) -> Array:
    """Zeros, float64 [*shape, 64], that begin where a line of the cache does: else sums take up to twice as long.

    >>> lanes_of(2).shape
    (2, 64)
    """
    n = math.prod(shape) * SUM_LANES
    room = np.zeros(n + 7)
    first = -room.ctypes.data % 64 // 8
    return room[first : first + n].reshape(*shape, SUM_LANES)


def row_sums(rows: Array) -> Array:
    """The sum of each row.

    Args:
        rows: [T, n].

    >>> row_sums(np.float32([[1, 2], [3, 4]]))
    array([3., 7.])
    """
    lanes = lanes_of(len(rows))
    loops = kernels()
    if loops is not None and rows.dtype == np.float32:
        loops.row_lanes(*flat_rows(rows), lanes)
    else:
        for row, into in zip(rows, lanes, strict=True):
            into_lanes(row.astype(np.float64), into)
    return lanes.sum(1)  # type: ignore[no-any-return]


def row_products(rows: Array) -> Array:
    """The inner products of all pairs of rows, [T, T].

    Args:
        rows: [T, n].

    >>> row_products(np.float32([[1, 2], [3, 0]]))
    array([[5., 3.],
           [3., 9.]])
    """
    lanes = lanes_of(len(rows), len(rows))
    loops = kernels()
    if loops is not None and rows.dtype == np.float32:
        loops.pair_lanes(*flat_rows(rows), lanes)
    else:
        wide = rows.astype(np.float64)
        for i in range(len(rows)):
            for j in range(i + 1):
                into_lanes(wide[i] * wide[j], lanes[i, j])
    found = lanes.sum(2)
    return found + np.tril(found, -1).T  # type: ignore[no-any-return]


def flat_rows(rows: Array) -> tuple[Array, int, int]:
    """Rows that may lie apart, as one array from the first entry to the last; the step between rows; their length."""
    count, n = rows.shape
    if n and (rows.strides[1] != rows.itemsize or (count > 1 and rows.strides[0] < n * rows.itemsize)):
        rows = np.ascontiguousarray(rows)
    step = rows.strides[0] // rows.itemsize if count > 1 else n
    size = (count - 1) * step + n if count else 0
    return np.lib.stride_tricks.as_strided(rows, (size,), (rows.itemsize,), writeable=False), step, n


def into_lanes(row: Array, lanes: Array) -> None:
    """By NumPy, which adds whole rows of lanes from front to back."""
    whole = len(row) - len(row) % SUM_LANES
    np.add.reduce(row[:whole].reshape(-1, SUM_LANES), axis=0, out=lanes)
    lanes[: len(row) - whole] += row[whole:]
