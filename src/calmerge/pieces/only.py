"""Some of the experts, for a merge that the others take no part in."""

from collections.abc import Sequence

from calmerge._errors import UsageError
from calmerge._task_vectors import TaskVectors


def only(tvs: TaskVectors, *, experts: Sequence[str]) -> TaskVectors:
    """The task vectors of some experts, in the order given; the others are not read.

    With `where`, different tensors are merged from different experts:
    `where: [{tensors: ["vision.*"], merge: [{only: {experts: [cars]}}, average]}, {merge: average}]`.

    Args:
        tvs: task vectors of T experts.
        experts: names of some of them.

    Raises:
        UsageError: no expert is named, one twice, or one that is not there.

    >>> tvs = task_vectors({"w": torch.zeros(1)}, {"cars": {"w": torch.ones(1)}, "dtd": {"w": 2 * torch.ones(1)}})
    >>> only(tvs, experts=["dtd"])["w"]
    tensor([[2.]])

    Source: what modules with models of their own are in arcee-ai/mergekit (LGPL-3.0; Goddard et al., arXiv 2024).
    """
    if not experts or len(set(experts)) < len(experts):
        raise UsageError(f"only: expected names of experts, each once, got {list(experts)}.")
    return tvs.only(experts)
