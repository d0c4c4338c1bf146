"""Thresholds of task vectors, and counts that depend on them, found in one pass together.

What is above a threshold can be said in the pass that finds it, but for the few entries inside the bracket of a sample
(see `_rank`). So a count over all entries is made with a guess, the entries inside are taken along, and once the
threshold is known they are counted anew. That spares a pass: files that memory does not hold are read once less.
"""

from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from calmerge._compiled import ByStrips, kernels, strips
from calmerge._measure import Fold, Measure, Pass, count, kth_magnitude
from calmerge._passes import Sample, added
from calmerge._rank import Bracket, fits, nth, sampled, usually_inside, within
from calmerge._task_vectors import TaskVectors
from calmerge._watch import Array
from calmerge._weights import BLOCK, Number, Site, Weights

_BESIDE = 1 << 26  # entries taken along at most, those of all tasks where one is inside: 256 MB

Cutting = Callable[[Tensor, Tensor], Tensor]
"""A function of task vectors [T, ...] and thresholds [T]."""


class Cut(NamedTuple):
    """How task vectors were trimmed: by which threshold, and what it leaves of a block."""

    threshold: "Threshold"
    kept: Cutting


class Threshold(Measure):
    """The k-th smallest magnitude of each task vector, and sums that depend on what reaches it.

    Args:
        tvs: task vectors of T experts.
        rank: k, from 1 to the number of entries.

    >>> from calmerge import task_vectors
    >>> tvs = task_vectors({"w": torch.zeros(3)}, {"a": {"w": torch.tensor([3.0, -1.0, 2.0])}})
    >>> Threshold(tvs, 2).value()
    tensor([2.])
    """

    def __init__(self, tvs: TaskVectors, rank: int) -> None:
        self._plain = kth_magnitude(tvs, rank)
        super().__init__((tvs,), self._found, passes=self._plain.passes, holds=self._plain.holds)
        self._vectors, self._k = tvs, rank
        self._guess, self._most = _Guess(), 0
        self._along: Cutting | None = None
        self._sum: Tensor | None = None

    def total(self, fn: Cutting, exact: Weights) -> Measure:
        """The sum over all entries of `fn(tau, threshold)`, in the pass that finds the threshold if that is possible.

        Args:
            fn: from a block [T, ...] to one whole number for each entry, as float32; at an entry it may depend on the
                thresholds only through which of them the entry's magnitudes reach.
            exact: the same as weights, to be added up in a pass of their own.
        """
        otherwise, tasks = count(exact, whole_sum), len(self._vectors.tasks)
        samples = self._vectors.elementwise and not fits(self._vectors, tasks)
        over_all = exact.specs.keys() == self._vectors.specs.keys()
        most = tasks * min(self._vectors.numel, tasks * usually_inside(self._vectors, tasks))
        if self.settled or self._along is not None or not samples or not over_all or most > _BESIDE:
            return otherwise
        self._along = fn
        self.inputs = (self._vectors, self._vectors.reduce(lambda tau, at, site: fn(tau, at), self._guess))
        self._most = most
        self.holds += (9 * most) // 2 + 5 * most // tasks  # with what growing takes, and to find a rank among one's

        def rounds() -> Generator[Pass, Any, Tensor]:
            own = self._sum
            if own is None:
                own = yield Fold(lambda plane, at, site: whole_sum(plane), added)
            return own

        return Measure((exact, self), rounds, passes=0)

    def _found(self) -> Generator[Pass | Sample, Any, Tensor]:
        along, tasks = self._along, len(self._vectors.tasks)
        if along is None:
            return (yield from self._plain._rounds())
        brackets = yield from sampled(self._vectors, tasks, [self._k] * tasks)
        bits = np.array([[b.low, b.high] for b in brackets], np.int32).T.copy()
        self._guess.number = torch.from_numpy(bits[0].view(np.float32))
        if tasks * sum(b.entries for b in brackets) > self._most:
            return (yield from self._plain._rounds())
        part = _Part(bits)
        counts, beside, total = yield Fold(part, _put_together, strips=part.strips)
        rows = [np.frombuffer(row, np.float32) for row in beside]
        found = [
            _ranked(row, bracket, below, upto, self._k)
            for row, bracket, (below, upto) in zip(rows, brackets, counts.tolist(), strict=True)
        ]
        if None in found:  # the sample misled
            return (yield from self._plain._rounds())
        threshold = torch.tensor(found, dtype=torch.float32)
        for start in range(0, len(rows[0]), BLOCK):
            some = torch.from_numpy(np.stack([row[start : start + BLOCK] for row in rows]))
            total += whole_sum(along(some, threshold)) - whole_sum(along(some, self._guess.number))
        self._sum = total
        return threshold


class _Guess(Number):
    """Thresholds that are near the true ones."""

    number = torch.zeros(0)

    def at(self, site: Site) -> Tensor:
        return self.number


@dataclass(frozen=True)
class _Part:
    """What a block has: how many magnitudes of each task lie below its bracket and up to its end, [T, 2]; all tasks'
    entries where one lies inside, [T, m]; and the sum of a plane of whole numbers.

    Args:
        bits: int32 [2, T]; the ends of brackets.
    """

    bits: Array

    def __call__(self, tau: Tensor, plane: Tensor, site: Site) -> tuple[Array, Array, Tensor]:
        rows, loops = np.ascontiguousarray(tau.numpy(force=True).reshape(len(tau), -1)), kernels()
        if loops is not None:
            counts, beside = self._room(rows.shape[1] + loops.LANES)
            n = loops.bracketed_beside(rows.view(np.int32), *self.bits, counts, beside, 0)
            return counts, beside[:, :n].copy().view(np.float32), whole_sum(plane)
        low, high = self.bits.view(np.float32)[:, :, None]
        size = np.abs(rows)
        below, upto = size < low, size <= high
        counts = np.stack([below.sum(1), upto.sum(1)], 1)
        return counts, np.ascontiguousarray(rows[:, np.flatnonzero((below ^ upto).any(0))]), whole_sum(plane)

    def strips(self) -> ByStrips | None:
        """The same by a compiled loop."""
        loops = strips()
        if loops is None:
            return None

        def found(tape: tuple[int, ...], planes: Array, ends: Array, _: int) -> tuple[Array, Array, Tensor] | None:
            counts, beside = self._room(ends[-1] + loops.LANES)
            n, total = loops.bracketed_beside_by_strips(tape, planes, ends[-1], *self.bits, counts, beside)
            if n < 0:
                return None
            return counts, beside[:, :n].copy().view(np.float32), torch.tensor(total, dtype=torch.float64)

        return found

    def _room(self, n: int) -> tuple[Array, Array]:
        tasks = self.bits.shape[1]
        return np.zeros((tasks, 2), np.int64), np.empty((tasks, n), np.int32)


def _put_together(so_far: Any, part: tuple[Array, Array, Tensor]) -> tuple[Array, list[bytearray], Tensor]:
    """Counts and sums of the blocks so far, and what was taken along, in one buffer for each task."""
    counts, beside, total = so_far or (0, [bytearray() for _ in part[1]], 0)
    for row, more in zip(beside, part[1], strict=True):
        row.extend(more.view(np.uint8).data)
    return counts + part[0], beside, total + part[2]


def _ranked(row: Array, bracket: Bracket, below: int, upto: int, rank: int) -> float | None:
    """The magnitude of a rank, which is among those inside the bracket; None where it is not."""
    if not below < rank <= upto:
        return None
    if bracket.low == bracket.high:
        return float(np.int32(bracket.low).view(np.float32))
    return nth(within(row, bracket)[2], rank - below)


def whole_sum(plane: Tensor) -> Tensor:
    """The sum of whole numbers; of up to 2^24 in float32, which holds it exactly and takes a fraction of the time."""
    return plane.sum(dtype=torch.float32 if plane.numel() <= 2**24 else torch.float64).double().cpu()
