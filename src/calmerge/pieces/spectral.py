"""Singular value decompositions of whole matrices: exact, deterministic, as wide as they need to be."""

import logging
from typing import NamedTuple

import torch
from torch import Tensor

_log = logging.getLogger(__name__)


class SVD(NamedTuple):
    """Singular triples, the largest first: matrix = u diag(s) v^T, with u [m, k], s [k] and v [n, k] in float64."""

    u: Tensor
    s: Tensor
    v: Tensor

    def product(self) -> Tensor:
        """The matrix that the triples make."""
        return self.u * self.s @ self.v.T

    def isotropic(self) -> Tensor:
        """The same with every singular value set to their mean, so that the sum of them stays."""
        return self.s.sum() / max(1, len(self.s)) * (self.u @ self.v.T)


def svd(matrix: Tensor, rank: int | None = None, *, tolerance: float | None = None) -> SVD:
    """The leading singular triples of a matrix, exact, without its null space, whose directions are free.

    Found from the eigenvectors of the smaller Gram matrix in float64. Squaring costs half the digits, and float64 has
    twice those of float32: this is as exact as the entries are, as fast as a float32 SVD of a square matrix and faster
    for others, and converges always.

    Args:
        matrix: [m, n].
        rank: how many triples at most; all when None.
        tolerance: singular values up to this share of the largest count as zero; sqrt(max(m, n)) float32 roundings,
            which is what the entries' own rounding can add, when None.

    >>> u, s, v = svd(torch.tensor([[0.0, 2.0], [3.0, 0.0], [0.0, 0.0]]))
    >>> s, (u * s @ v.T).round()
    (tensor([3., 2.], dtype=torch.float64), tensor([[0., 2.], [3., 0.], [0., 0.]], dtype=torch.float64))
    """
    m, n = matrix.shape
    if m < n:
        u, s, v = svd(matrix.T, rank, tolerance=tolerance)
        return SVD(v, s, u)
    if tolerance is None:
        tolerance = max(m, n) ** 0.5 * torch.finfo(torch.float32).eps
    wide = matrix.double()
    squares, v = torch.linalg.eigh(wide.T @ wide)  # the smallest first
    kept = int((squares > tolerance**2 * squares[-1:]).sum())
    k = kept if rank is None else min(rank, kept)
    v = v[:, n - k :].flip(1)
    scaled = wide @ v  # its columns have the singular values as norms, to more digits than the square roots
    s = torch.linalg.vector_norm(scaled, dim=0)
    return SVD(scaled / s, s, v)


def full_svd(matrix: Tensor) -> SVD:
    """All min(m, n) singular triples, those of value 0 too, whose directions are the solver's choice.

    >>> full_svd(torch.tensor([[2.0, 0.0], [0.0, 0.0]])).s
    tensor([2., 0.], dtype=torch.float64)
    """
    u, s, vt = torch.linalg.svd(matrix.double(), full_matrices=False)
    return SVD(u, s, vt.T)


def polar(matrix: Tensor, *, tolerance: float = 1e-6, of: str = "") -> Tensor:
    """The nearest matrix with orthonormal columns (rows, where it is wide): u v^T of its singular triples, in float64.

    Where columns depend on each other the nearest is not unique: directions whose singular value is below `tolerance`
    times the largest are left out then, so that nothing is added that no column has.

    Args:
        matrix: [m, n].
        tolerance: share of the largest singular value, below which a direction is left out. The singular vectors of
            several tasks make a square matrix at best, and one with n rows has now and then, by chance alone, a
            singular value of 1e-2 / n: that is no dependence, and far above the rounding that equal columns leave.
        of: the tensor's name, for the log.

    >>> polar(torch.tensor([[2.0, 0.0], [0.0, 0.5]]))
    tensor([[1., 0.], [0., 1.]], dtype=torch.float64)
    >>> polar(torch.tensor([[1.0, 1.0], [0.0, 0.0]]))  # the same column twice: half of its square each
    tensor([[0.7071, 0.7071], [0.0000, 0.0000]], dtype=torch.float64)
    """
    u, s, v = svd(matrix, tolerance=tolerance)
    most = min(matrix.shape)
    if len(s) < most:
        _log.info("%s: %d of %d directions depend on the others, left out", of, most - len(s), most)
    return u @ v.T


def truncated(matrix: Tensor, rank: int) -> Tensor:
    """The nearest matrix of at most some rank; the matrix itself where it has no more rows or columns than that.

    >>> truncated(torch.tensor([[3.0, 0.0], [0.0, 1.0]]), 1).abs()
    tensor([[3., 0.], [0., 0.]])
    """
    return matrix if rank >= min(matrix.shape) else svd(matrix, rank).product().to(matrix)
