"""Whether the inputs of a merge hold numbers only: found by reading all of them, block by block."""

from collections.abc import Iterator

import torch
from torch import Tensor

from calmerge._errors import CheckpointError
from calmerge._measure import count, settle
from calmerge._run import Run
from calmerge._signature import raise_together
from calmerge._task_vectors import TaskVectors
from calmerge._weights import Weights


def check_values(tvs: TaskVectors, *, run: Run | None = None) -> None:
    """Refuses inputs with entries that are NaN or infinite, all such tensors together.

    Looked at are all tensors of the base, and of each expert those that are merged and its head. A merge itself refuses
    the first one that it comes to.

    Args:
        tvs: task vectors.
        run: progress in entries.

    Raises:
        CheckpointError: a sentence for each tensor.

    >>> from calmerge import task_vectors
    >>> bad = {"w": torch.tensor([1.0, float("nan")])}
    >>> check_values(task_vectors({"w": torch.zeros(2)}, {"cars": bad}))
    Traceback (most recent call last):
    calmerge._errors.CheckpointError: expert 'cars': tensor 'w' has entries that are no numbers: 1 NaN, 0 infinite, ...
    """
    run = run or Run()
    found = list(_of("the base", tvs.base, run))
    for task, expert in tvs.experts.items():
        found += _of(f"expert '{task}'", expert.only_names([name for name in tvs.specs if name in expert.specs]), run)
        if task in tvs.heads:
            found += _of(f"the head of expert '{task}'", tvs.heads[task], run)
    raise_together(found, CheckpointError)


def _of(whose: str, weights: Weights, run: Run) -> Iterator[str]:
    numbers = {
        name: count(weights.only_names([name]), _counts)
        for name, spec in weights.specs.items()
        if spec.dtype.is_floating_point and spec.numel
    }
    settle(numbers.values(), run=run)
    for name, number in numbers.items():
        nan, infinite = (int(n) for n in number.value())
        if nan or infinite:
            n = weights.specs[name].numel
            yield f"{whose}: tensor '{name}' has entries that are no numbers: {nan} NaN, {infinite} infinite, of {n}."


def _counts(block: Tensor) -> Tensor:
    wide = block.float() if block.dtype.itemsize < 4 else block
    if torch.isfinite(wide.sum()):
        return torch.zeros(2)
    return torch.stack([wide.isnan().sum(), wide.isinf().sum()])
