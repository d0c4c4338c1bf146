"""More unlabelled inputs out of few: mixtures of two, for objectives whose targets a task's own expert gives."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from calmerge._errors import DataError
from calmerge._random import permutation, uniform
from calmerge.tasks.base import Examples, Tasks
from calmerge.tasks.fingerprint import fingerprint

RUN = 8  # neighbouring positions of a text that stay together
FEW = 4  # a pool is small where this many times its inputs are too few


def mixed(tasks: Tasks, size: int, *, seed: int = 0) -> Tasks:
    """The same tasks with at least `size` inputs in every small pool: behind those it has come mixtures of two of them.

    A mixture has no label, and needs none where an expert tells what the merged model should say of it.

    Args:
        tasks: their pools are not touched; validation and test stay as they are.
        size: pools with a quarter of it or more stay as they are, smaller ones grow to the next multiple of theirs.
        seed: with the task's name and the mixture's number it decides what is mixed.

    Raises (when a batch is read):
        DataError: inputs that are no tensors, or have nothing but one number each.

    Source: of mixtures as inputs of a teacher, Beyer, Zhai, Royer, Markeeva, Anil, Kolesnikov, "Knowledge
    distillation: A good teacher is patient and consistent", CVPR 2022; of boxes, Yun et al., "CutMix", ICCV 2019; of
    sums, Zhang et al., "mixup", ICLR 2018.
    """
    pools = {task: tasks.split(task, "pool") for task in tasks}
    times = {task: -(-size // len(pool)) if FEW * len(pool) < size else 1 for task, pool in pools.items()}
    return tasks.with_pools({task: Mixed(pools[task], n, seed, task) for task, n in times.items() if n > 1})


class Mixed:
    """Examples, then `times - 1` rounds of mixtures of each of them with another.

    A share of the mixture, drawn evenly from 0 to 1, is the other's: a box of an image ([n, channels, height, width]),
    runs of eight positions of a text (integers [n, positions], its mask with them), a weighted sum of anything else.

    >>> from torch.utils.data import DataLoader
    >>> from calmerge.tasks.data import from_loader
    >>> pool = Mixed(from_loader(DataLoader([torch.zeros(2), torch.ones(2)])), 3, 0)
    >>> len(pool), pool.batch(torch.tensor([0, 1]))[0].tolist()
    (6, [[0.0, 0.0], [1.0, 1.0]])

    Args:
        examples: n examples.
        times: how many times n it has.
        key: decides what is mixed.
    """

    def __init__(self, examples: Examples, times: int, *key: object) -> None:
        self._examples, self._key, n = examples, key, len(examples)
        others = [permutation(n, *key, "other", turn) for turn in range(1, times)]
        self._other = torch.cat([torch.arange(n), *others])
        self._share = uniform((times * n,), *key, "share")
        self._share[:n] = 0
        self.fingerprint = fingerprint([repr((getattr(examples, "fingerprint", n), times, key)).encode()])

    def __len__(self) -> int:
        return len(self._other)

    def batch(self, indices: Tensor) -> tuple[Any, Tensor | None]:
        """The inputs of these rows; no labels, for a mixture has none."""
        pairs, _ = self._examples.batch(torch.cat([indices % len(self._examples), self._other[indices]]))
        return self._each(pairs, indices), None

    def _each(self, pairs: Any, indices: Tensor) -> Any:
        if isinstance(pairs, Tensor) and pairs.dim() > 1:
            return self._mixture(pairs[: len(indices)], pairs[len(indices) :], indices)
        if isinstance(pairs, Mapping):
            if "attention_mask" in pairs and not pairs["attention_mask"][:, 0].all():
                raise DataError(
                    "only texts padded on the right can be mixed, these are padded on the left. Take fill: 0."
                )
            return {name: self._each(values, indices) for name, values in pairs.items()}
        if isinstance(pairs, tuple | list):
            return type(pairs)(self._each(values, indices) for values in pairs)
        found = f"a tensor {list(pairs.shape)}" if isinstance(pairs, Tensor) else type(pairs).__name__
        raise DataError(f"only tensors [n, ...] can be mixed, the pool's inputs hold {found}. Take fill: 0.")

    def _mixture(self, one: Tensor, other: Tensor, indices: Tensor) -> Tensor:
        share = self._share[indices]
        if not one.is_floating_point():
            return torch.where(_over(self._runs(indices, one.shape[1]) < share[:, None], one), other, one)
        if one.dim() == 4:
            return torch.where(self._boxes(indices, share, one.shape[2], one.shape[3]), other, one)
        return torch.lerp(one, other, _over(share, one).to(one.dtype))

    def _runs(self, indices: Tensor, n: int) -> Tensor:
        """For each of n positions the number that decides it, the same in a run and whatever n: [examples, n]."""
        runs = -(-n // RUN)
        drawn = torch.stack([uniform((runs,), *self._key, "run", i) for i in indices.tolist()])
        return drawn.repeat_interleave(RUN, 1)[:, :n]

    def _boxes(self, indices: Tensor, share: Tensor, height: int, width: int) -> Tensor:
        """A box of its share of the area at a place of its own in every image: [examples, 1, height, width]."""
        corner = torch.stack([uniform((2,), *self._key, "corner", i) for i in indices.tolist()])
        inside = []
        for axis, n in enumerate((height, width)):
            side = (n * share.sqrt()).round()
            first = (corner[:, axis] * (n - side + 1)).floor()
            at = torch.arange(n)
            inside.append((at >= first[:, None]) & (at < (first + side)[:, None]))
        return (inside[0][:, :, None] & inside[1][:, None, :])[:, None]


def _over(values: Tensor, like: Tensor) -> Tensor:
    """`values` with as many dimensions as `like`, the missing ones behind."""
    return values.reshape(*values.shape, *[1] * (like.dim() - values.dim()))
