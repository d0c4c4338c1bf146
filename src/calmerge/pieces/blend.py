"""Weighted sums of task vectors, in one fixed order."""

from collections.abc import Callable

import torch
from torch import Tensor

from calmerge._dot import row_products, row_sums, rows_of
from calmerge._task_vectors import TaskVectors
from calmerge._weights import Site, Weights


def summed(tau: Tensor) -> Tensor:
    """The sum over tasks, added one after the other, so that no block size can change its rounding.

    >>> summed(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
    tensor([4., 6.])
    """
    if len(tau) == 1:
        return tau[0]
    result = tau[0] + tau[1]
    for t in range(2, len(tau)):
        result += tau[t]
    return result


def averaged(tau: Tensor) -> Tensor:
    """The mean over tasks, from the sum in the fixed order.

    >>> averaged(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
    tensor([2., 3.])
    """
    return summed(tau) / len(tau)


def sums(tau: Tensor) -> Tensor:
    """The sum over the entries of each task, in float64 and in one order on every processor.

    >>> sums(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
    tensor([3., 7.], dtype=torch.float64)
    """
    return torch.from_numpy(row_sums(rows_of(tau)))


def squares(tau: Tensor) -> Tensor:
    """The squared length of the vector of each task, as `sums` of products.

    >>> squares(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
    tensor([ 5., 25.], dtype=torch.float64)
    """
    return torch.tensor([row_products(row[None]).item() for row in rows_of(tau)], dtype=torch.float64)


def per_task(values: Tensor, tau: Tensor) -> Tensor:
    """One number for each task, of the type of the task vectors and shaped to meet each of them.

    >>> per_task(torch.tensor([0.5, 2.0]), torch.ones(2, 1)) * torch.ones(2, 1)
    tensor([[0.5000],
            [2.0000]])
    """
    return values.to(tau).reshape(-1, *[1] * (tau.dim() - 1))


def plain_sum(tvs: TaskVectors) -> Weights:
    """The sum of all task vectors: what methods start from that come with a scale of their own.

    >>> from calmerge import task_vectors
    >>> plain_sum(task_vectors({"w": torch.zeros(1)}, {t: {"w": torch.ones(1)} for t in "ab"}))["w"]
    tensor([2.])
    """
    return tvs.reduce(lambda tau, site: summed(tau))


def blend(tvs: TaskVectors, coefficients: Tensor | Callable[[str], Tensor]) -> Weights:
    """One delta, delta(l) = sum_t lambda[t, l] tau_t(l), with gradients flowing to the coefficients.

    Args:
        tvs: task vectors.
        coefficients: lambda, of shape [T], the same for all tensors, or a function from a tensor's name to such.

    >>> from calmerge import task_vectors
    >>> tvs = task_vectors({"w": torch.zeros(1)}, {"a": {"w": torch.ones(1)}, "b": {"w": torch.ones(1)}})
    >>> blend(tvs, torch.tensor([0.5, 2.0]))["w"]
    tensor([2.5000])
    """

    def weighted(tau: Tensor, site: Site) -> Tensor:
        lam = coefficients(site.name) if callable(coefficients) else coefficients
        result = tau[0] * lam[0]
        for t in range(1, len(tau)):
            result = result + tau[t] * lam[t]
        return result

    return tvs.reduce(weighted)
