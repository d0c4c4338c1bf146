"""Merges that lie in the span of the experts: one coefficient a task and tensor, found from inner products alone."""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from calmerge._dot import row_products, rows_of
from calmerge._measure import Measure, PerTensor, total
from calmerge._task_vectors import TaskVectors
from calmerge._weights import Site, Weights
from calmerge.pieces.blend import per_task, summed

Of = Literal["weights", "deltas"]
"""What a method works on: the experts' weights theta_t, or their task vectors tau_t."""
Coefficients = Callable[[Tensor, str], Tensor]
"""From the inner products G[i, j] = <x_i, x_j> of one tensor's vectors, float64 [T, T], and its name, to c, [T]; for
`along`, from [vectors, T, T] to [vectors, T]."""


def experts(tvs: TaskVectors) -> TaskVectors:
    """The experts themselves instead of their differences to the base, theta_t = theta_0 + tau_t.

    >>> from calmerge import task_vectors
    >>> experts(task_vectors({"w": torch.tensor([1.0])}, {"a": {"w": torch.tensor([3.0])}}))["w"]
    tensor([[3.]])
    """
    return tvs.transform(lambda tau, base, site: tau + base.to(tau), tvs.base)


def spanned(tvs: TaskVectors, coefficients: Coefficients, *, of: Of = "deltas") -> Weights:
    """One delta, a sum of the task vectors with coefficients that follow from their inner products in each tensor.

    delta = sum_t c_t tau_t for `of="deltas"`; for `of="weights"` what must be added to the base to give
    sum_t c_t theta_t. One pass finds the inner products, another the result; no tensor is held whole.

    Args:
        tvs: task vectors.
        coefficients: from inner products and name of one tensor to c.
        of: whether the inner products and the sum are those of task vectors or of the experts' weights.

    >>> from calmerge import task_vectors
    >>> tvs = task_vectors({"w": torch.zeros(2)}, {"a": {"w": torch.tensor([3.0, 4.0])}})
    >>> spanned(tvs, lambda gram, name: 1 / lengths(gram))["w"]
    tensor([0.6000, 0.8000])
    """
    vectors = experts(tvs) if of == "weights" else tvs

    def found(name: str) -> Measure:
        return total(vectors.only_names([name]), products).map(lambda gram: coefficients(gram, name))

    numbers = {name: found(name) for name in tvs.specs}
    delta = tvs.reduce(lambda tau, c, site: summed(tau * per_task(c, tau)), PerTensor(numbers, factor=True))
    if of == "deltas":
        return delta
    return delta.map(beyond, tvs.base, PerTensor({n: c.map(excess) for n, c in numbers.items()}, factor=True))


def along(tvs: TaskVectors, coefficients: Coefficients, *, dim: int, of: Of = "deltas") -> Weights:
    """As `spanned`, with coefficients of their own for every vector along `dim` of a tensor; tensors are held whole.

    >>> from calmerge import task_vectors
    >>> tvs = task_vectors({"w": torch.zeros(2, 2)}, {"a": {"w": torch.tensor([[3.0, 4.0], [0.0, 2.0]])}})
    >>> along(tvs, lambda gram, name: 1 / lengths(gram), dim=-1)["w"]
    tensor([[0.6000, 0.8000],
            [0.0000, 1.0000]])
    """

    def mixed(vectors: Tensor, site: Site) -> Tensor:
        if vectors.dim() == 1:
            return mixed(vectors[:, None], site)[0]
        last = vectors.movedim(dim % (vectors.dim() - 1) + 1, -1)  # [T, ..., n]
        rows = last.reshape(len(last), -1, last.shape[-1])
        step = max(1, 2**18 // max(1, rows.shape[-1]))
        parts = [_mixed_rows(rows[:, i : i + step].double(), coefficients, site) for i in range(0, rows.shape[1], step)]
        return torch.cat(parts).reshape(last.shape[1:]).movedim(-1, dim)

    if of == "deltas":
        return tvs.reduce(mixed, elementwise=False)
    return experts(tvs).reduce(mixed, elementwise=False).map(lambda theta, base, site: theta - base.to(theta), tvs.base)


def lengths(gram: Tensor) -> Tensor:
    """The lengths of the vectors whose inner products these are.

    >>> lengths(torch.tensor([[4.0, 1.0], [1.0, 1.0]]))
    tensor([2., 1.])
    """
    return gram.diagonal(dim1=-2, dim2=-1).sqrt()


def excess(c: Tensor) -> Tensor:
    """By how much coefficients sum to more than 1; 0 where only rounding says so.

    >>> excess(torch.tensor([0.5, 0.75]))
    tensor(0.2500)
    """
    over = c.sum() - 1
    return torch.where(over.abs() < 1e-12, 0.0, over)


def beyond(delta: Tensor, base: Tensor, over: Tensor, site: Site) -> Tensor:
    """sum_t c_t theta_t - theta_0, where `delta` is sum_t c_t tau_t and the c sum to 1 + `over`.

    >>> beyond(torch.tensor([1.0]), torch.tensor([2.0]), torch.tensor(-0.5), Site("w", 0))
    tensor([0.])
    """
    return delta + base.to(delta) * over.to(delta)


def _mixed_rows(rows: Tensor, coefficients: Coefficients, site: Site) -> Tensor:
    """[T, vectors, n] to [vectors, n]."""
    c = coefficients(torch.einsum("irn,jrn->rij", rows, rows), site.name)
    return torch.einsum("rt,trn->rn", c, rows).float()


def products(block: Tensor) -> Tensor:
    """Inner products of all pairs of task vectors, [T, T], float64, in one order on every processor.

    >>> products(torch.tensor([[1.0, 2.0], [3.0, 0.0]]))
    tensor([[5., 3.],
            [3., 9.]], dtype=torch.float64)
    """
    return torch.from_numpy(row_products(rows_of(block)))
