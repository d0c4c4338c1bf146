"""Products of thin factors: their singular values without forming them, and spaces that several of them share."""

from collections.abc import Sequence

import torch
from torch import Tensor

from calmerge._lora import Factors
from calmerge.pieces.spectral import SVD

Pair = tuple[Tensor, Tensor]
"""(left [m, r], right [r, n]) in float64; the matrix is left @ right."""


def product_svd(left: Tensor, right: Tensor) -> SVD:
    """All min(m, r, n) singular triples of left @ right, from r x r matrices: O((m + n) r^2).

    >>> product_svd(torch.tensor([[0.0], [2.0]]), torch.tensor([[3.0, 0.0, 0.0]])).s
    tensor([6.], dtype=torch.float64)
    """
    q_left, r_left = torch.linalg.qr(left.double())
    q_right, r_right = torch.linalg.qr(right.double().T)
    u, s, vt = torch.linalg.svd(r_left @ r_right.T, full_matrices=False)
    return SVD(q_left @ u, s, q_right @ vt.T)


def balanced(factors: Factors) -> Pair:
    """The same matrix as U sqrt(S), sqrt(S) V^T of its singular triples, whichever factors it was stored as.

    (B G, G^-1 A) and (B, A) are one adapter for every invertible G; their balanced factors are the same but for signs.

    >>> left, right = balanced(Factors(torch.tensor([[8.0], [0.0]]), torch.tensor([[0.5, 0.0]]), 1.0))
    >>> left.abs(), right.abs()
    (tensor([[2.], [0.]], dtype=torch.float64), tensor([[2., 0.]], dtype=torch.float64))
    """
    u, s, v = product_svd(factors.scaled, factors.right)
    return u * s.sqrt(), (v * s.sqrt()).T


def left_basis(parts: Sequence[Tensor]) -> Tensor:
    """The left singular vectors of [parts side by side], as many as they have columns or rows, those of value 0 too.

    >>> left_basis([torch.tensor([[0.0], [2.0], [0.0]]), torch.tensor([[1.0], [0.0], [0.0]])]).abs()
    tensor([[0., 1.],
            [1., 0.],
            [0., 0.]], dtype=torch.float64)
    """
    return _tall_svd(torch.cat([p.double() for p in parts], 1)).u


def joint_space(pairs: Sequence[Pair], *, tolerance: float = 1e-5) -> tuple[Tensor, list[Tensor]]:
    """U [m, k] and C_t [k, n] with U C_t = Delta_t, from the SVD of [Delta_1 .. Delta_T] = U S V^T, C_t = S V_t^T.

    The wide matrix is never formed: with right_t^T = Q_t P_t, its singular values are those of [left_1 P_1^T ..].

    Args:
        pairs: factors of each Delta_t.
        tolerance: singular values up to this are left out.

    >>> eye = torch.eye(2, dtype=torch.float64)
    >>> u, c = joint_space([(eye[:, :1], 3 * eye[:1]), (eye[:, :1], 4 * eye[:1])])
    >>> u.shape, [(u @ part).round(decimals=9).tolist() for part in c]
    (torch.Size([2, 1]), [[[3.0, 0.0], [0.0, 0.0]], [[4.0, 0.0], [0.0, 0.0]]])
    """
    inner = [torch.linalg.qr(right.double().T) for _, right in pairs]
    u, s, v = _tall_svd(torch.cat([left.double() @ r.T for (left, _), (_, r) in zip(pairs, inner, strict=True)], 1))
    kept = int((s > tolerance).sum())
    blocks = torch.split((v * s)[:, :kept], [len(r) for _, r in inner])
    return u[:, :kept], [block.T @ q.T for block, (q, _) in zip(blocks, inner, strict=True)]


def _tall_svd(matrix: Tensor) -> SVD:
    """All singular triples of a matrix with many more rows than columns, by way of its square factor."""
    q, r = torch.linalg.qr(matrix)
    u, s, vt = torch.linalg.svd(r, full_matrices=False)
    return SVD(q @ u, s, vt.T)
