"""Singular value decompositions of whole matrices, and the rule which tensors count as matrices."""

import logging
from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from typing import NamedTuple

import torch
from torch import Tensor

from calmerge._errors import UsageError, did_you_mean
from calmerge._task_vectors import TaskVectors
from calmerge._weights import Node, Site, Weights
from calmerge.pieces.blend import averaged

TABLES = (
    "*text_projection*", "*embed_tokens*", "*token_embedding*", "*word_embeddings*", "*wte.weight", "*lm_head*",
    "shared.weight",
)  # fmt: skip
"""What `skip` is by default: CLIP's text projection, which the official codes leave out, and tables of a vocabulary."""

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


def polar(matrix: Tensor, *, tolerance: float = 1e-4, of: str = "") -> Tensor:
    """The nearest matrix with orthonormal columns (rows, where it is wide): u v^T of its singular triples, in float64.

    Where columns depend on each other the nearest is not unique: directions whose singular value is below `tolerance`
    times the largest are left out then, so that nothing is added that no column has.

    Args:
        matrix: [m, n].
        tolerance: share of the largest singular value, below which a direction is left out.
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


def is_matrix(name: str, dims: int, skip: Sequence[str] = TABLES) -> bool:
    """Whether a tensor is treated by its spectrum: it has two dimensions and no pattern in `skip` fits its name.

    >>> is_matrix("fc.weight", 2), is_matrix("fc.bias", 1), is_matrix("conv.weight", 4), is_matrix("lm_head.weight", 2)
    (True, False, False, False)
    """
    return dims == 2 and not any(fnmatchcase(name, pattern) for pattern in skip)


def by_matrix(
    tvs: TaskVectors,
    fn: Callable[..., Tensor],
    *others: Node,
    skip: Sequence[str] = TABLES,
    split: Sequence[str] = (),
    rest: Callable[..., Tensor] | None = None,
) -> Weights:
    """One delta, `fn(tau, *others, site)` of every matrix and the mean over tasks of all other tensors.

    Tensors are read whole: T of one tensor in float32 are held, and what `fn` makes of them.

    Args:
        tvs: task vectors of T experts.
        fn: from [T, m, n] to [m, n], of any floating type.
        others: weights or measures, as in `Weights.map`.
        skip: shell patterns of matrices that are not treated as such.
        split: shell patterns of matrices that are three of equal height in one (fused query, key, value); `fn` gets
            each alone.
        rest: what is done with all other tensors, called as `fn` is; the mean when None.

    Raises:
        UsageError: a pattern fits no tensor, or a tensor to split has not three times the rows of anything.

    >>> experts = {t: {"w": torch.eye(2) * c, "b": torch.ones(2) * c} for t, c in {"a": 1.0, "b": 3.0}.items()}
    >>> tvs = task_vectors({"w": torch.zeros(2, 2), "b": torch.zeros(2)}, experts)
    >>> dict(by_matrix(tvs, lambda tau, site: tau.amax(0)))
    {'w': tensor([[3., 0.], [0., 3.]]), 'b': tensor([2., 2.])}
    """
    _check_patterns(tvs, skip, split)

    def merged(tau: Tensor, *given: Tensor, site: Site) -> Tensor:
        if not is_matrix(site.name, tau.dim() - 1, skip) or not tau.numel():
            return averaged(tau) if rest is None else rest(tau, *given, site)
        if not any(fnmatchcase(site.name, pattern) for pattern in split):
            return fn(tau, *given, site).float()
        parts = zip(tau.chunk(3, 1), *(g.chunk(3, 0) for g in given), strict=True)
        return torch.cat([fn(*part, site).float() for part in parts])

    return tvs.reduce(lambda tau, *given: merged(tau, *given[:-1], site=given[-1]), *others, elementwise=False)


def _check_patterns(weights: Weights, skip: Sequence[str], split: Sequence[str]) -> None:
    for option, patterns in (("skip", skip), ("split", split)):
        for pattern in patterns:
            if pattern not in TABLES and not any(fnmatchcase(name, pattern) for name in weights):
                raise UsageError(f"{option}: '{pattern}' fits no tensor. {did_you_mean(pattern, weights)}")
    for name, spec in weights.specs.items():
        if any(fnmatchcase(name, pattern) for pattern in split) and len(spec.shape) == 2 and spec.shape[0] % 3:
            raise UsageError(
                f"split: tensor '{name}' has {spec.shape[0]} rows, which cannot be cut into three equal parts. "
                "Name only tensors that hold query, key and value below each other."
            )
