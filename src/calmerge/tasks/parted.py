"""Pools cut in two: examples to learn from, and others to judge by what was learned."""

from typing import Any

from torch import Tensor

from calmerge._errors import DataError
from calmerge._random import permutation
from calmerge.tasks.base import Examples, Tasks
from calmerge.tasks.fingerprint import fingerprint


def parted(tasks: Tasks, examples: int, *, seed: int = 0) -> tuple[Tasks, Tasks]:
    """The tasks with what is left of every pool, and with what was held out of it, at most half.

    Args:
        tasks: validation and test stay as they are in both.
        examples: how many are held out of each pool, at most.
        seed: with the task's name it decides which.

    Raises:
        DataError: a pool of fewer than two examples.

    >>> from torch.utils.data import DataLoader
    >>> import calmerge
    >>> encoder = calmerge.ModuleModel(torch.nn.Linear(1, 1))
    >>> tasks = calmerge.Tasks(encoder, {"a": calmerge.Task(DataLoader(torch.arange(5.0)[:, None]))})
    >>> [len(one.split("a", "pool")) for one in parted(tasks, 3)]
    [3, 2]
    """
    rest, held = {}, {}
    for task in tasks:
        pool = tasks.split(task, "pool")
        if len(pool) < 2:
            raise DataError(f"task '{task}' has a pool of one example; at least two are needed, one to be judged by.")
        drawn, n = permutation(len(pool), seed, "held out", task), min(examples, len(pool) // 2)
        held[task], rest[task] = Chosen(pool, drawn[:n]), Chosen(pool, drawn[n:])
    return tasks.with_pools(rest), tasks.with_pools(held)


class Chosen:
    """Some of a split's examples.

    Args:
        examples: the split.
        places: which of them, int64 [n].
    """

    def __init__(self, examples: Examples, places: Tensor) -> None:
        self._examples, self._places = examples, places
        self.fingerprint = fingerprint([repr(getattr(examples, "fingerprint", len(examples))).encode(), places])

    def __len__(self) -> int:
        return len(self._places)

    def batch(self, indices: Tensor) -> tuple[Any, Tensor | None]:
        """The inputs of these rows, and their labels."""
        return self._examples.batch(self._places[indices])
