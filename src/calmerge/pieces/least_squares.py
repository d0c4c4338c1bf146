"""Least squares: matrices merged on what each expert sees, and affine maps between what two models see."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

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


class Affine(NamedTuple):
    """y ~ weight x + bias: weight [q, p], bias [q], the ridge, and the mean squared error on a pair left out."""

    weight: Tensor
    bias: Tensor
    ridge: float
    error: float


RIDGES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)


def affine_fit(x: Tensor, y: Tensor, *, ridges: Sequence[float] = RIDGES) -> Affine:
    """The affine map from x to y by ridge regression, with the ridge that predicts best what is left out, in float64.

    W = argmin sum_i |W (x_i - mean x) - (y_i - mean y)|^2 + lambda mean(diag C) |W|^2, C = sum_i (x_i - mean x)(...)^T.

    So W falls to 0 where the pairs do not tell it; the bias is free. The error with each pair left out in turn is exact
    and needs no other fit: (y_i - fitted_i) / (1 - h_i), h the diagonal of the matrix that makes fitted values of y.

    Args:
        x: [n, p].
        y: [n, q].
        ridges: lambda, relative to the mean of the diagonal; the best of these is taken, the largest of equal ones.

    >>> x = torch.tensor([[0.0], [1.0], [2.0], [3.0]])
    >>> found = affine_fit(x, 2 * x + 1, ridges=[1e-9])
    >>> found.weight.round(decimals=4), found.bias.round(decimals=4)
    (tensor([[2.]], dtype=torch.float64), tensor([1.], dtype=torch.float64))
    """
    x, y = x.double(), y.double()
    mean_x, mean_y = x.mean(0), y.mean(0)
    x, y = x - mean_x, y - mean_y
    gram = x.T @ x
    unit = float(gram.diagonal().mean()) or 1.0
    values, vectors = torch.linalg.eigh(gram)
    turned = x @ vectors  # [n, p]
    seen = turned.T @ y

    def at(ridge: float) -> Affine:
        shrunk = values.clamp(min=0) + ridge * unit
        leverage = (turned.square() / shrunk).sum(1) + 1 / len(x)
        left_out = (y - turned @ (seen / shrunk[:, None])) / (1 - leverage).clamp(min=1e-9)[:, None]
        weight = (vectors @ (seen / shrunk[:, None])).T
        return Affine(weight, mean_y - weight @ mean_x, ridge, left_out.square().sum(1).mean().item())

    return min((at(ridge) for ridge in sorted(ridges, reverse=True)), key=lambda found: found.error)
