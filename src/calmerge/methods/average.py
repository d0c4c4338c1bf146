"""Simple averaging of experts."""

from calmerge._task_vectors import TaskVectors
from calmerge._weights import Weights
from calmerge.pieces.blend import averaged


def average(tvs: TaskVectors) -> Weights:
    """The mean of the experts, as a delta over the base.

    theta = theta_0 + (1/T) sum_t tau_t, the same as (1/T) sum_t theta_t.

    Args:
        tvs: task vectors of T experts.

    >>> import torch; from calmerge import task_vectors
    >>> experts = {t: {"w": torch.tensor([x])} for t, x in {"a": 1.4, "b": 1.2, "c": 0.9}.items()}
    >>> average(task_vectors({"w": torch.tensor([1.0])}, experts))["w"] + 1
    tensor([1.1667])

    Source: Wortsman et al., "Model soups", ICML 2022 (uniform soup); the baseline of every paper of the field.
    """
    return tvs.reduce(lambda tau, site: averaged(tau))
