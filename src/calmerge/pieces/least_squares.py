"""Matrices merged by least squares on what each expert sees, given as Gram matrices of its inputs."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor


def gram_closed_form(deltas: Sequence[Tensor], grams: Iterable[Tensor], *, ridge: float) -> Tensor:
    """The matrix that disturbs the experts least on their own inputs, in float64.

    M = argmin sum_t tr((M - Delta_t) H_t (M - Delta_t)^T) = (sum_t Delta_t H_t) (sum_t H_t)^-1, H_t = G_t + lambda
    mean(diag G_t) I. So the ridge draws every expert's part to that expert, not to 0: equal experts come out unchanged.

    Args:
        deltas: T matrices [m, n].
        grams: T Gram matrices [n, n] of inputs, in the same order, one of which is held at a time.
        ridge: lambda, relative to the mean of each diagonal.

    >>> gram_closed_form([torch.tensor([[1.0]]), torch.tensor([[3.0]])], [torch.eye(1), torch.eye(1)], ridge=1e-3)
    tensor([[2.]], dtype=torch.float64)
    """
    n = deltas[0].shape[1]
    seen, inputs = torch.zeros_like(deltas[0], dtype=torch.float64), deltas[0].new_zeros(n, n, dtype=torch.float64)
    for delta, gram in zip(deltas, grams, strict=True):
        one = gram.double()
        one = one + ridge * one.diagonal().mean() * torch.eye(n, dtype=one.dtype, device=one.device)
        seen += delta.double() @ one
        inputs += one
    return torch.cholesky_solve(seen.T, torch.linalg.cholesky(inputs)).T
