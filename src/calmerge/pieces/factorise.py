"""A matrix as a product of two thin ones, of a rank, of a share of its energy, or exact."""

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from calmerge._lora import Factors
from calmerge.pieces.low_rank import left_basis
from calmerge.pieces.spectral import SVD, svd

_OUTSIDE = 2e-6  # share of a matrix outside a space that rounding of its entries alone may leave there


class Product(NamedTuple):
    """left [m, k] and right [k, n], and how far left @ right is from the matrix.

    Args:
        left: U sqrt(S).
        right: sqrt(S) V^T.
        norm: Frobenius norm of the matrix.
        error: norm of what is missing, as a share of `norm`.
        energy: the squared singular values kept, as a share of all.
    """

    left: Tensor
    right: Tensor
    norm: float
    error: float
    energy: float

    @property
    def rank(self) -> int:
        """k."""
        return self.left.shape[1]


def factorise(
    matrix: Tensor,
    *,
    rank: int | None = None,
    energy: float | None = None,
    dtype: torch.dtype = torch.float32,
    within: Sequence[Factors] | None = None,
) -> Product:
    """The best product of a matrix: all of its singular triples, or as few as `rank` and `energy` allow.

    Singular values are found in float64, whatever the type of the entries; the error is that of the factors as they
    are stored.

    Args:
        matrix: [m, n].
        rank: most triples kept.
        energy: share of the squared singular values that is kept, in (0, 1].
        dtype: of the factors.
        within: factors whose columns and rows may span the matrix, as those of adapters span every linear merge of
            them; if they do, up to rounding, its triples are found from a matrix as small as their ranks.

    >>> found = factorise(torch.diag(torch.tensor([4.0, 3.0, 0.0])))
    >>> found.rank, found.norm, (found.left @ found.right).round()
    (2, 5.0, tensor([[4., 0., 0.], [0., 3., 0.], [0., 0., 0.]]))
    >>> cut = factorise(torch.diag(torch.tensor([4.0, 3.0, 0.0])), energy=0.6)
    >>> cut.rank, round(cut.error, 6), round(cut.energy, 6)
    (1, 0.6, 0.64)
    """
    norm = math.sqrt(sum(float(block.square().sum()) for _, block in _blocks(matrix)))
    if norm == 0:
        m, n = matrix.shape
        return Product(matrix.new_zeros(m, 0, dtype=dtype), matrix.new_zeros(0, n, dtype=dtype), 0.0, 0.0, 1.0)
    u, s, v = (_inside(matrix, within, norm) if within else None) or svd(matrix, rank if energy is None else None)
    shares = s.square().cumsum(0) / norm**2
    kept = len(s)
    if energy is not None and energy < 1:
        kept = min(kept, int((shares < energy).sum()) + 1)
    kept = min(kept, rank or kept)
    root = s[:kept].sqrt()
    left, right = (u[:, :kept] * root).to(dtype), (v[:, :kept] * root).T.contiguous().to(dtype)
    error = _distance(matrix, left.double(), right.double()) / norm
    return Product(left, right, norm, error, min(1.0, float(shares[kept - 1])))


def _blocks(matrix: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Rows of a matrix in float64, some at a time."""
    step = max(1, 2**20 // max(1, matrix.shape[1]))
    for i in range(0, len(matrix), step):
        yield slice(i, i + step), matrix[i : i + step].double()


def _distance(matrix: Tensor, left: Tensor, right: Tensor) -> float:
    """The norm of matrix - left @ right."""
    squares = [float((block - left[rows] @ right).square().sum()) for rows, block in _blocks(matrix)]
    return math.sqrt(sum(squares))


def _inside(matrix: Tensor, factors: Sequence[Factors], norm: float) -> SVD | None:
    """The triples of a matrix that lies in the space of some factors; None where it does not."""
    ranks = sum(f.left.shape[1] for f in factors)
    if not ranks or ranks >= min(matrix.shape):
        return None
    u, v = left_basis([f.left for f in factors]), left_basis([f.right.T for f in factors])
    core = torch.zeros(u.shape[1], v.shape[1], dtype=torch.float64)
    for rows, block in _blocks(matrix):
        core += u[rows].T @ (block @ v)
    if _distance(matrix, u @ core, v.T) > _OUTSIDE * norm:
        return None
    left, s, right = torch.linalg.svd(core)
    kept = int((s > torch.finfo(torch.float32).eps * s[0]).sum())
    return SVD((u @ left)[:, :kept], s[:kept], (v @ right.T)[:, :kept])
