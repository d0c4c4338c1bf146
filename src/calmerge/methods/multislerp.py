"""Multi-SLERP: any number of models on one sphere."""

from typing import Annotated

import torch
from torch import Tensor

from calmerge._errors import CheckpointError
from calmerge._signature import Interval
from calmerge._task_vectors import TaskVectors
from calmerge._weights import Weights
from calmerge.pieces.gram import Of, lengths, spanned
from calmerge.pieces.per_model import PerModel, checked


def multislerp(
    tvs: TaskVectors,
    *,
    weight: PerModel,
    normalize_weights: bool = True,
    eps: Annotated[float, Interval(0)] = 1e-8,
    of: Of = "deltas",
) -> Weights:
    """The weighted mean direction of the task vectors, as long as they are in the weighted mean, tensor by tensor.

    m = sum_t w_t tau_t / |tau_t|; tau = (sum_t w_t |tau_t|) m / |m|. Moving along the sphere from m by the weighted
    mean of the tangents, as the method is told, adds nothing: that mean is 0 at m.

    Args:
        tvs: task vectors of T experts.
        weight: w, one number for each model or one for all.
        normalize_weights: whether the weights are made to sum to 1; otherwise the length scales with their sum.
        eps: lengths up to this count as 0: such a vector gives no direction, and such an m none either.
        of: whether task vectors (`deltas`) are merged or the experts' `weights`.

    Raises:
        CheckpointError: the directions of more than two models cancel in a tensor. Two opposite ones are added with
            their weights.

    >>> from calmerge import task_vectors
    >>> experts = {"a": {"w": torch.tensor([1.0, 0.0])}, "b": {"w": torch.tensor([0.0, 2.0])}}
    >>> multislerp(task_vectors({"w": torch.zeros(2)}, experts), weight=[1.0, 3.0])["w"]
    tensor([0.5534, 1.6602])

    Source: "multislerp" of arcee-ai/mergekit 0.1.5 (LGPL-3.0; Goddard et al., arXiv 2024).
    Differences: in closed form, with lengths found in float64. A tensor of one entry has no direction but its sign, so
    that the weighted mean is taken, which is the same where signs agree.
    """
    given = {"weight": weight, "normalize_weights": normalize_weights, "eps": eps, "of": of}
    w = torch.tensor(checked(multislerp, tvs, given)["weight"], dtype=torch.float64)
    if normalize_weights:
        w = w / w.sum()

    def direction(gram: Tensor, name: str) -> Tensor:
        norms = lengths(gram)
        along = torch.where(norms > eps, w / norms, 0.0)
        size = (along @ gram @ along).clamp(min=0).sqrt()
        if size > eps and tvs.specs[name].numel > 1:
            return along * (w @ norms) / size
        if len(w) > 2 and tvs.specs[name].numel > 1 and bool((norms > eps).any()):
            raise CheckpointError(
                f"multislerp: the weighted directions of the {len(w)} models cancel in tensor '{name}': there is no "
                "mean direction. Change the weights, or use karcher."
            )
        return w

    return spanned(tvs, direction, of=of)
