"""Merges that lie in the span of the experts: one coefficient a task and tensor, found from inner products alone."""

from collections.abc import Callable
from typing import Literal

from torch import Tensor

from calmerge._measure import Measure, PerTensor, total
from calmerge._task_vectors import TaskVectors
from calmerge._weights import Site, Weights
from calmerge.pieces.blend import per_task, summed

Of = Literal["weights", "deltas"]
"""What a method works on: the experts' weights theta_t, or their task vectors tau_t."""


def experts(tvs: TaskVectors) -> TaskVectors:
    """The experts themselves instead of their differences to the base, theta_t = theta_0 + tau_t.

    >>> import torch; from calmerge import task_vectors
    >>> experts(task_vectors({"w": torch.tensor([1.0])}, {"a": {"w": torch.tensor([3.0])}}))["w"]
    tensor([[3.]])
    """
    return tvs.transform(lambda tau, base, site: tau + base.to(tau), tvs.base)


def spanned(tvs: TaskVectors, coefficients: Callable[[Tensor], Tensor], *, of: Of = "deltas") -> Weights:
    """One delta, a sum of the task vectors with coefficients that follow from their inner products in each tensor.

    delta = sum_t c_t tau_t for `of="deltas"`; for `of="weights"` what must be added to the base to give
    sum_t c_t theta_t. One pass finds the inner products, another the result; no tensor is held whole.

    Args:
        tvs: task vectors.
        coefficients: from G[i, j] = <x_i, x_j> of one tensor, float64 [T, T], to c, [T].
        of: whether x_t are the task vectors or the experts' weights.

    >>> import torch; from calmerge import task_vectors
    >>> tvs = task_vectors({"w": torch.zeros(2)}, {"a": {"w": torch.tensor([3.0, 4.0])}})
    >>> spanned(tvs, lambda gram: 1 / gram.diagonal().sqrt())["w"]
    tensor([0.6000, 0.8000])
    """
    vectors = experts(tvs) if of == "weights" else tvs

    def found(name: str) -> Measure:
        return total(vectors.only_names([name]), _products).map(coefficients)

    return combined(tvs, PerTensor({name: found(name) for name in tvs.specs}), of=of)


def combined(tvs: TaskVectors, coefficients: PerTensor, *, of: Of = "deltas") -> Weights:
    """One delta, a sum of the task vectors, or of the experts' weights, with the coefficients of each tensor, [T].

    >>> import torch; from calmerge import task_vectors
    >>> tvs = task_vectors({"w": torch.ones(2)}, {"a": {"w": torch.tensor([3.0, 4.0])}})
    >>> spanned(tvs, lambda gram: torch.tensor([2.0]), of="weights")["w"] + 1
    tensor([6., 8.])
    """

    def mixed(tau: Tensor, c: Tensor, site: Site) -> Tensor:
        return summed(tau * per_task(c, tau))

    def beyond(delta: Tensor, base: Tensor, c: Tensor, site: Site) -> Tensor:
        excess = float(c.sum()) - 1
        return delta if abs(excess) < 1e-12 else delta + base.to(delta) * excess

    delta = tvs.reduce(mixed, coefficients)
    return delta.map(beyond, tvs.base, coefficients) if of == "weights" else delta


def _products(block: Tensor) -> Tensor:
    rows = block.reshape(len(block), -1).double()
    return rows @ rows.T
