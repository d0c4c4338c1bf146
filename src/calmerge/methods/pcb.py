"""PCB-Merging, parameter competition balancing (Du et al., NeurIPS 2024)."""

from typing import Annotated

import torch
from torch import Tensor

from calmerge._measure import kth_magnitude
from calmerge._signature import Interval, KeepFraction, check, raise_together
from calmerge._task_vectors import TaskVectors
from calmerge._weights import Site, Weights
from calmerge.pieces.blend import per_task


def pcb(
    tvs: TaskVectors,
    *,
    keep: KeepFraction = 0.1,
    scale: Annotated[float, Interval()] = 1.2,
    clip: Annotated[float, Interval(0, 0.5, open_high=True)] = 0.0001,
) -> Weights:
    """A mean in which an entry weighs by its size within its task and by how far the other tasks agree with it.

    A_t = |tau_t| clipped to its quantiles [q, 1 - q]; n_t = A_t scaled to [0, 1]; N_t = sign(tau_t) n_t;
    beta_t = exp(T n_t^2) sum_j tanh(N_t N_j); w_t = beta_t above its 1 - r quantile, scaled to [0, 1];
    theta = theta_0 + lambda sum_t w_t sign(tau_t) A_t / sum_t w_t. Quantiles are each task's, over the whole model.

    Args:
        tvs: task vectors of T experts.
        keep: r, share of a task's entries that have a weight, in (0, 1]; 0.05 for vision, 0.1 to 0.2 for language.
        scale: lambda; above 1, as few weights survive.
        clip: q, in [0, 0.5); 0.01 in the official vision script, 0.0001 in its reference.

    >>> import torch; from calmerge import task_vectors
    >>> a, b = torch.tensor([1.0, -2.0, 0.5, 3.0]), torch.tensor([2.0, 1.0, -0.5, 2.0])
    >>> tvs = task_vectors({"w": torch.zeros(4)}, {"a": {"w": a}, "b": {"w": b}})
    >>> pcb(tvs, keep=0.5, scale=1.0, clip=0.0)["w"]
    tensor([0.0000, 0.0000, 0.0000, 2.5000])

    Source: Du, Lee, Li, Jiang, Guo, Yu, Liu, Goh, Tang, He, Zhang, "Parameter Competition Balancing for Model Merging",
    NeurIPS 2024; duguodong7/pcb-merging (MIT).
    Differences: the paper writes softmax where the official code has exp and tanh; of the code's three agreement terms
    this is that of its search script, which no scale of the vectors changes. A quantile of beta below 0 counts as 0:
    entries in conflict never get a weight.
    """
    raise_together(check(pcb, {"keep": keep, "scale": scale, "clip": clip}))
    d, tasks = tvs.numel, len(tvs.tasks)
    low = kth_magnitude(tvs, min(d, int(d * clip) + 1))
    high = kth_magnitude(tvs, max(1, int(d * (1 - clip))))

    def balance(tau: Tensor, low: Tensor, high: Tensor, site: Site) -> Tensor:
        n = _unit(tau.abs(), per_task(low, tau), per_task(high, tau))
        signed = n * tau.sign()
        agreement = torch.stack([(signed * other).tanh().sum(0, dtype=torch.float64) for other in signed])
        return ((tasks * n.square()).exp() * agreement.to(tau)).clamp(min=0)

    beta = tvs.transform(balance, low, high)
    cut = kth_magnitude(beta, min(d, int(d * (1 - keep)) + 1))
    top = kth_magnitude(beta, d)

    def mean(tau: Tensor, beta: Tensor, low: Tensor, high: Tensor, cut: Tensor, top: Tensor, site: Site) -> Tensor:
        weights = _unit(beta, per_task(cut, tau), per_task(top, tau)).double()
        clipped = tau.abs().clamp(per_task(low, tau), per_task(high, tau)) * tau.sign()
        return ((weights * clipped).sum(0) / weights.sum(0).clamp(min=1e-12) * scale).to(tau)

    return tvs.reduce(mean, beta, low, high, cut, top)


def _unit(values: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """The values between two numbers scaled to [0, 1]; 0 where these are equal."""
    span = high - low
    return torch.where(span > 0, (values.clamp(low, high) - low) / span, 0.0)
