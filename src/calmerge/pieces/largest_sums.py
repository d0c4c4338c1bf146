"""The largest entries of every tensor, and sums of other weights over them, found in one pass as a rule.

What is above a cut can be added up in the pass that finds it, but for the few entries inside the bracket of a sample
(see `_rank`). Those are taken along, with what is to be added up and their places.
"""

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from calmerge._compiled import ByStrips, kernels, strips
from calmerge._dot import flat_rows, into_lanes, lanes_of, row_sums, rows_of
from calmerge._measure import Fold, Measure, Pass, PerTensor, total
from calmerge._passes import TOGETHER, Sample
from calmerge._rank import Bracket, guessed, nth, sample, usually_inside
from calmerge._task_vectors import TaskVectors
from calmerge._watch import Array
from calmerge._weights import BLOCK, Site, Weights
from calmerge.pieces.blend import sums
from calmerge.pieces.largest import chosen, cut, last_of, spread
from calmerge.pieces.mask import masked

_SAMPLED = 1 << 16  # entries of a tensor from which on there is a sample; of smaller ones all are taken along
_INFINITY = 0x7F800000  # its bits
_ALONG = 1 << 24  # numbers taken along at most: 64 MB


def largest_and_sums(weights: Weights, share: float, beside: TaskVectors) -> tuple[Weights, PerTensor]:
    """Whether each entry is among the largest of its tensor, as in `largest`, and sums over those of each task.

    Args:
        weights: float tensors.
        share: of the entries of a tensor other than 0 so many stay, rounded down; in (0, 1).
        beside: what is added up, in float64; finite.

    Returns:
        The booleans, and for each tensor float64 [T].

    >>> from calmerge import StateDict, task_vectors
    >>> tvs = task_vectors({"w": torch.zeros(3)}, {"a": {"w": torch.tensor([5.0, 6.0, 7.0])}})
    >>> kept, found = largest_and_sums(StateDict({"w": torch.tensor([1.0, 3.0, 2.0])}), 0.7, tvs)
    >>> kept["w"], found.measures["w"].value()
    (tensor([False,  True,  True]), tensor([13.], dtype=torch.float64))
    """
    both = {n: _both(weights.only_names([n]), share, beside.only_names([n])) for n in weights.specs}
    cuts = {name: one.map(lambda found: found[:2, None]) for name, one in both.items()}
    return chosen(weights, cuts), PerTensor({name: one.map(lambda found: found[2:]) for name, one in both.items()})


def _both(weights: Weights, share: float, beside: TaskVectors) -> Measure:
    """[2 + T]: what `cut` finds, and the sums."""
    n, tasks = weights.numel, len(beside.tasks)
    most = usually_inside(weights, 1) if n > _SAMPLED else n
    if not n or not (weights.elementwise and beside.elementwise) or most * (tasks + 2) > _ALONG:
        return _apart(weights, share, beside)

    def rounds() -> Generator[Pass | Sample, Any, Tensor]:
        bracket = Bracket(1, _INFINITY, n)
        if n > _SAMPLED:
            blocks = yield sample(weights, 1)
            bracket = _likely([block[0] for block in blocks], share, n)
        if bracket.entries * (tasks + 2) <= _ALONG:
            part = _Part(bracket, tasks)
            found: _Found = yield Fold(part, _together, rounded=True, strips=part.strips)
            result = found.result(n, share)
            if result is not None:
                return result
        return _apart(weights, share, beside).value()

    room = 4 * (tasks + 2) * min(n, TOGETHER * BLOCK)  # of a thread, for what might be taken along of some blocks
    return Measure((weights, beside), rounds, passes=1, holds=2 * most * (4 * tasks + 12) + room)


def _apart(weights: Weights, share: float, beside: TaskVectors) -> Measure:
    """The same in passes of their own."""
    alone = cut(weights, share)
    kept = chosen(weights, dict.fromkeys(weights.specs, alone))
    added = total(beside.transform(lambda x, stays, site: masked(x, stays), kept), sums)
    return added.map(lambda found, cut: torch.cat([cut[:, 0], found]), alone)


def _likely(blocks: Sequence[Array], share: float, n: int) -> Bracket:
    """Where the cut lies by a sample: magnitudes other than 0 between which its rank is."""
    some = [block[block > 0] for block in blocks]
    seen, varying = sum(map(len, blocks)), sum(map(len, some))
    if not varying:
        return Bracket(1, _INFINITY, n)
    bracket = guessed(some, varying - int(varying * share), varying)
    return Bracket(max(1, bracket.low), bracket.high, bracket.entries * n / seen)


class _Found(NamedTuple):
    """What some blocks have.

    Args:
        zeros: how many entries are 0.
        below: how many lie below the bracket.
        inside: of those inside it what is to be added up, T times [m], magnitudes [m] and places [m].
        above: the sums above it, of each block, [blocks, T].
    """

    zeros: int
    below: int
    inside: Sequence[Any]
    above: Array

    def result(self, n: int, share: float) -> Tensor | None:
        """[2 + T]; None where the cut lies elsewhere."""
        *rows, sizes = (np.frombuffer(one, np.float32) for one in self.inside[:-1])
        k, places = int((n - self.zeros) * share), np.frombuffer(self.inside[-1], np.int64)
        left = k - (n - self.below - len(sizes))
        if not k:
            return torch.tensor([torch.inf, 2.0**32, *[0.0] * len(rows)], dtype=torch.float64)
        if not 0 < left <= len(sizes):
            return None
        at, limit = nth(sizes, len(sizes) - left + 1), 1 << 32
        bits = int(np.float32(at).view(np.int32))
        equal = _Part(Bracket(bits, bits, 1), len(rows)).of(sizes, np.stack(rows), 0)
        which, left = places[equal.inside[-1]], left - (len(sizes) - equal.below - len(equal.inside[-1]))
        if left < len(which):
            limit = last_of(which, left)
        some = np.stack(equal.inside[:-2])[:, spread(which) <= limit]
        return torch.from_numpy(np.concatenate([[at, limit], self.above[0] + equal.above[0] + row_sums(some)]))


@dataclass(frozen=True)
class _Part:
    """What a block has."""

    bracket: Bracket
    tasks: int

    def __call__(self, block: Tensor, beside: Tensor, site: Site) -> _Found:
        size = np.ascontiguousarray(block.numpy(force=True).reshape(-1))
        return self.of(size, rows_of(beside), site.offset)

    def of(self, size: Array, rows: Array, offset: int) -> _Found:
        """That of a block of some magnitudes [n], and rows [T, n]."""
        loops, lanes = kernels(), lanes_of(1, self.tasks)
        if loops is not None:
            inside, counts = self._room(len(size) + loops.LANES)
            flat, step, _ = flat_rows(rows)
            loops.above(size.view(np.int32), flat, step, 0, *self.bracket[:2], lanes[0], inside, counts)
            return self._found(lanes, inside, counts, offset)
        low, high = np.array(self.bracket[:2], np.int32).view(np.float32)
        size = np.abs(size)
        less, above = size < low, ~(size <= high)
        places = np.flatnonzero(~(less | above))
        for row, into in zip(rows, lanes[0], strict=True):
            into_lanes((row * above).astype(np.float64), into)
        zeros, below = len(size) - int(np.count_nonzero(size)), int(np.count_nonzero(less))
        return _Found(
            zeros, below, [*np.ascontiguousarray(rows[:, places]), size[places], places + offset], lanes.sum(2)
        )

    def strips(self) -> ByStrips | None:
        """The same of several blocks, by a compiled loop."""
        loops = strips()
        if loops is None:
            return None

        def found(tape: tuple[int, ...], planes: Array, ends: Array, offset: int) -> _Found | None:
            lanes, (inside, counts) = lanes_of(len(ends), self.tasks), self._room(ends[-1] + loops.LANES)
            sound = loops.above_by_strips(tape, planes, ends, *self.bracket[:2], lanes, inside, counts)
            return self._found(lanes, inside, counts, offset) if sound else None

        return found

    def _room(self, n: int) -> tuple[Array, Array]:
        return np.empty((self.tasks + 2, n), np.int32), np.zeros(3, np.int64)

    def _found(self, lanes: Array, inside: Array, counts: Array, offset: int) -> _Found:
        zeros, below, m = counts.tolist()
        some = inside[:, :m].copy()  # so that the room, which is much larger, does not live on with it
        return _Found(zeros, below, [*some[:-1].view(np.float32), some[-1].astype(np.int64) + offset], lanes.sum(2))


def _together(so_far: _Found | None, part: _Found) -> _Found:
    """The blocks so far and more; what was taken along in one buffer for each of it."""
    if so_far is None:
        so_far = _Found(0, 0, [bytearray() for _ in part.inside], np.zeros((1, part.above.shape[1])))
    for into, more in zip(so_far.inside, part.inside, strict=True):
        into.extend(more.view(np.uint8).data)
    zeros, below = so_far.zeros + part.zeros, so_far.below + part.below
    return so_far._replace(zeros=zeros, below=below, above=sum(part.above, so_far.above))
