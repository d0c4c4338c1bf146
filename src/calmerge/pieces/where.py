"""A choice of merge for every tensor, by its name."""

from collections.abc import Sequence
from fnmatch import fnmatchcase

from calmerge._errors import UsageError, did_you_mean
from calmerge._task_vectors import Merge, TaskVectors
from calmerge._weights import Gathered, Weights

Case = tuple[Sequence[str], Merge]
"""Shell patterns of tensors, and what merges the tensors that one of them fits."""


def where(tvs: TaskVectors, *, cases: Sequence[Case]) -> Weights:
    """Merge every tensor with the first case whose patterns fit its name.

    A case sees its own tensors only: a threshold "over the whole model" is one over the tensors of the case. Tensors
    that fit no case have no delta and stay as in the base. In a recipe:
    `where: [{tensors: ["*.mlp.*"], merge: [ties]}, {merge: [average]}]`; a case without `tensors` takes the rest.

    Args:
        tvs: task vectors of T experts.
        cases: shell patterns (`*.mlp.*`) with a merge, in the order in which they are tried.

    Raises:
        UsageError: a pattern that fits no tensor.

    >>> from calmerge import average, task_vectors
    >>> tvs = task_vectors({"a": torch.zeros(1), "b": torch.zeros(1)}, {"x": {"a": torch.ones(1), "b": torch.ones(1)}})
    >>> dict(where(tvs, cases=[(["b"], average)]))
    {'b': tensor([1.])}
    """
    left = list(tvs.specs)
    parts: dict[str, tuple[Weights, str]] = {}
    for patterns, merge in cases:
        for pattern in patterns:
            if not any(fnmatchcase(name, pattern) for name in tvs.specs):
                raise UsageError(f"where: '{pattern}' fits no tensor. {did_you_mean(pattern, tvs.specs)}")
        chosen = dict.fromkeys(name for name in left if any(fnmatchcase(name, pattern) for pattern in patterns))
        if not chosen:
            continue
        merged = merge(tvs.only_names(chosen))
        parts |= {name: (merged, name) for name in merged}
        left = [name for name in left if name not in chosen]
    return Gathered({name: parts[name] for name in tvs.specs if name in parts})
