"""mergekit's `model_stock`: any number of models, not clamped."""

import torch
from torch import Tensor

from calmerge._errors import UsageError
from calmerge._signature import check, raise_together
from calmerge._task_vectors import TaskVectors
from calmerge._weights import Weights
from calmerge.pieces.gram import along, lengths, spanned


def mergekit_model_stock(tvs: TaskVectors, *, filter_wise: bool = False) -> Weights:
    """The mean of the experts, drawn to the base by the angles between them, as mergekit's `model_stock`.

    theta = t mean_t theta_t + (1 - t) theta_0, t = N cos / (1 + (N - 1) cos), where cos is the mean over pairs of the
    cosine of tau_i and tau_j in one tensor.

    Args:
        tvs: task vectors of N experts of the same task, at least two.
        filter_wise: whether every vector along the last dimension (each row) has its own t; whole tensors are held.

    Raises:
        UsageError: there is one expert only.

    >>> from calmerge import task_vectors
    >>> experts = {"a": {"w": torch.tensor([1.0, 0.0])}, "b": {"w": torch.tensor([0.5, 3**0.5 / 2])}}
    >>> mergekit_model_stock(task_vectors({"w": torch.zeros(2)}, experts))["w"]
    tensor([0.5000, 0.2887])

    Source: "model_stock" of arcee-ai/mergekit 0.1.5 (LGPL-3.0; Goddard et al., arXiv 2024); Jang et al., ECCV 2024.
    Differences: from `model_stock`, t is not clamped to [0, 1]: negative cosines extrapolate. Where 1 + (N - 1) cos
    vanishes the base is left, where mergekit gives NaN.
    """
    raise_together(check(mergekit_model_stock, {"filter_wise": filter_wise}))
    n = len(tvs.tasks)
    if n < 2:
        raise UsageError(f"mergekit_model_stock needs the angle between two or more models, got 1 ({tvs.tasks[0]}).")
    first, second = torch.triu_indices(n, n, 1)

    def drawn(gram: Tensor, name: str) -> Tensor:
        norms = lengths(gram)
        products = (norms[..., :, None] * norms[..., None, :]).clamp(min=1e-6)
        cos = (gram / products).clamp(-1, 1)[..., first, second].mean(-1, keepdim=True)
        divisor = 1 + (n - 1) * cos
        return torch.where(divisor.abs() > 1e-9, cos / divisor, 0.0).expand(norms.shape)  # t / N for each

    return along(tvs, drawn, dim=-1) if filter_wise else spanned(tvs, drawn)
