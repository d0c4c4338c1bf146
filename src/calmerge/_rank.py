"""The exact k-th smallest magnitude of weights of any size, as a rule in one pass over them.

A sample of small blocks says between which two magnitudes the rank lies, with a margin of four standard errors. One
pass counts what is below that bracket and takes along what is inside: a few entries in a hundred. Where the rank lies
outside after all, the bracket becomes all floats. What is too much to take along is counted in bins of its bits, which
order as magnitudes do; the bin that holds the rank is the next bracket, or the result where it holds one magnitude
only, as it mostly does where weights are stored in few bits. So the result is always exact; the sample decides only how
many passes there are.
"""

from bisect import bisect_right
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from calmerge._compiled import kernels
from calmerge._passes import Fold, Sample
from calmerge._random import uniform
from calmerge._weights import ALL, Spec, Weights, row_size

Array = np.ndarray[Any, np.dtype[Any]]

_GATHERED = 1 << 22  # magnitudes taken along at most, over all tasks: 16 MB
_COUNTERS = 1 << 18  # bins at most, over all tasks
_INFINITY = 0x7F800000  # its bits; those of NaN are above
_PROBE = 1 << 12  # entries of a block of the sample, in the mean
_MARGIN = 4.0  # standard errors
_FEW = 1 << 10  # magnitudes that tell about where a rank lies


class Bracket(NamedTuple):
    """Magnitudes from `low` to `high`, both included, as the bits of floats; about `entries` of the weights' are."""

    low: int
    high: int
    entries: float


def usual_passes(weights: Weights, tasks: int) -> int:
    """How many passes `rank_rounds` makes as a rule."""
    return 1 if weights.elementwise or fits(weights, tasks) else 2


def fits(weights: Weights, tasks: int) -> bool:
    """Whether so few magnitudes are all held, and none is sampled."""
    return weights.numel * tasks <= _GATHERED


def held_at_most(weights: Weights, tasks: int) -> int:
    """Bytes that these passes hold beside their blocks: magnitudes, room to find a rank among them, and bins."""
    entries = weights.numel * tasks
    return 8 * min(entries, _GATHERED) + (16 * _COUNTERS if entries > _GATHERED else 0)


def rank_rounds(
    weights: Weights, tasks: int, ranks: Callable[[], Sequence[int]]
) -> Generator[Fold | Sample, Any, Tensor]:
    """The rounds of a measure: for each task, the magnitude whose rank, counted from 1, is asked for.

    Args:
        weights: their blocks are [tasks, ...], or, with one task, of any shape.
        tasks: how many thresholds come out.
        ranks: asked for when the first round begins.
    """
    k, numel = ranks(), weights.numel
    if not numel:
        return torch.zeros(tasks)
    if fits(weights, tasks):
        rows = yield from held(numel, tasks)
        return torch.tensor([nth(row, rank) for row, rank in zip(rows, k, strict=True)])
    everything = Bracket(0, _INFINITY, numel)
    first = (yield from sampled(weights, tasks, k)) if weights.elementwise else [everything] * tasks
    brackets = dict(enumerate(first))
    found = [float("nan")] * tasks
    while brackets:
        search = _Search(brackets, tasks)
        counted = yield Fold(search.part, search.add)
        for t, bracket in list(brackets.items()):
            below, upto, inside = counted[t]
            if not below < k[t] <= upto:
                narrower: Bracket | float = everything if bracket != everything else float("nan")
            elif bracket.low == bracket.high:
                narrower = float(_float(bracket.low))
            elif isinstance(inside, bytearray):
                narrower = nth(np.frombuffer(inside, dtype=np.float32), k[t] - below)
            else:
                bracket = inside.bracket(k[t] - below)
                narrower = float(_float(bracket.low)) if bracket.low == bracket.high else bracket
            if isinstance(narrower, Bracket):
                brackets[t] = narrower
            else:
                found[t] = narrower
                del brackets[t]
    return torch.tensor(found)


class _Search:
    """One pass: for each task how many entries lie below its bracket, how many up to its end, and which inside."""

    def __init__(self, brackets: Mapping[int, Bracket], tasks: int) -> None:
        self._brackets, self._tasks = dict(brackets), tasks
        self._gathers = {t: b.entries * len(brackets) <= _GATHERED for t, b in brackets.items()}

    def part(self, block: Tensor, *_: object) -> dict[int, tuple[int, int, Array]]:
        """What one block has."""
        rows = np.ascontiguousarray(_floats(block, self._tasks))
        return {t: within(rows[t], bracket) for t, bracket in self._brackets.items()}

    def add(self, so_far: dict[int, list[Any]] | None, part: dict[int, tuple[int, int, Array]]) -> dict[int, list[Any]]:
        """What the blocks so far have, with the entries inside as they are, or as counts of bins.

        They are copied into one buffer: thousands of small arrays that live on would keep freed blocks between them.
        """
        most = _COUNTERS // len(self._brackets)
        total = so_far or {t: [0, 0, bytearray() if self._gathers[t] else _Bins(self._brackets[t], most)] for t in part}
        for t, (below, upto, inside) in part.items():
            total[t][0] += below
            total[t][1] += upto
            if self._gathers[t]:
                total[t][2].extend(inside.view(np.uint8).data)
            else:
                total[t][2].add(inside.view(np.int32))
        return total


class _Bins:
    """How many magnitudes fall into each bin of a bracket, and the smallest and the largest of each, as bits.

    Bins go in pairs: the first of a pair is for one magnitude, whose low bits are 0, the other for those that follow.
    Where weights are stored in few bits most entries have such magnitudes, and another pass is spared.
    """

    def __init__(self, bracket: Bracket, most: int) -> None:
        self._shift = max(0, (bracket.high - bracket.low).bit_length() - most.bit_length() + 2)
        self._low = bracket.low >> self._shift << self._shift
        count = 2 * ((bracket.high - self._low) >> self._shift) + 2
        self._counts = np.zeros(count, np.int64)
        self._least, self._most = np.full(count, _INFINITY, np.int32), np.zeros(count, np.int32)

    def add(self, inside: Array) -> None:
        """Count some more."""
        loops = kernels()
        if loops is not None:
            loops.binned(inside, self._low, self._shift, self._counts, self._least, self._most)
            return
        bins = 2 * ((inside - np.int32(self._low)) >> self._shift) + ((inside & ((1 << self._shift) - 1)) != 0)
        np.add.at(self._counts, bins, 1)
        np.minimum.at(self._least, bins, inside)
        np.maximum.at(self._most, bins, inside)

    def bracket(self, rank: int) -> Bracket:
        """What is known of the magnitude of a rank among those that were counted."""
        at = int(np.searchsorted(self._counts.cumsum(), rank))
        return Bracket(int(self._least[at]), int(self._most[at]), self._counts[at])


def within(row: Array, bracket: Bracket) -> tuple[int, int, Array]:
    """How many magnitudes lie below a bracket, how many up to its end, and those inside; none where they are equal.

    Args:
        row: float32 [n], in one piece.
        bracket: where to look.

    >>> low, high = (int(np.float32(x).view(np.int32)) for x in (1, 2))
    >>> within(np.float32([0, -1, 2, 3]), Bracket(low, high, 2))
    (1, 3, array([1., 2.], dtype=float32))
    """
    loops = kernels()
    if loops is not None:
        room = np.empty(len(row) + loops.LANES, np.int32)
        below, upto, count = loops.bracketed(row.view(np.int32), bracket.low, bracket.high, room)
        return below, upto, room[: count if bracket.low < bracket.high else 0].view(np.float32).copy()
    size = np.abs(row)
    less, most = size < _float(bracket.low), size <= _float(bracket.high)
    inside = size[np.flatnonzero(less ^ most)] if bracket.low < bracket.high else size[:0]
    return int(np.count_nonzero(less)), int(np.count_nonzero(most)), inside


def sampled(weights: Weights, tasks: int, ranks: Sequence[int]) -> Generator[Sample, list[Array], list[Bracket]]:
    """For each task the bracket in which its rank lies, by a sample of blocks."""
    blocks = yield sample(weights, tasks)
    return [guessed([block[t] for block in blocks], ranks[t], weights.numel) for t in range(tasks)]


def sample(weights: Weights, tasks: int) -> Sample:
    """Magnitudes, [tasks, n], of small blocks from all over the weights."""
    places = [(name, *_rows(weights.specs[name], first, n)) for name, first, n in _places(weights, _probe(tasks))]
    return Sample(weights, places, lambda block, n: magnitudes(block, tasks)[:, :n].copy())


def _probe(tasks: int) -> int:
    """Entries of a block of the sample, in the mean: many tasks' blocks are large."""
    return max(_PROBE // max(1, tasks // 4), 1 << 9)


def _blocks(numel: int) -> int:
    """How many blocks a sample has, but for rounding."""
    return min(max(numel >> 17, 8), max(numel >> 20, 256))


def usually_inside(weights: Weights, tasks: int) -> int:
    """How many entries of a task lie inside its bracket, as a rule at most: half as many more than draws would have."""
    share = 5 / (_blocks(weights.numel) * _probe(tasks)) ** 0.5
    return min(weights.numel, int(weights.numel * share))


def _rows(spec: Spec, first: int, n: int) -> tuple[slice, int]:
    """The rows of a tensor that hold `n` entries from the first one on, or as many before its end; and `n`."""
    if not spec.shape:
        return ALL, n
    most = min(spec.shape[0], -(-n // row_size(spec)))
    start = min(first // row_size(spec), spec.shape[0] - most)
    return slice(start, start + most), n


def _places(weights: Weights, probe: int) -> Iterator[tuple[str, int, int]]:
    """The tensor, the first entry and the length of each block of a sample.

    Tensors differ from each other more than parts of one do. So each that is no small part of the weights has blocks in
    proportion to its entries, an even number, and the small ones have theirs as if they were one tensor.
    """
    each = weights.numel / _blocks(weights.numel)  # entries that a block stands for
    large = [name for name, spec in weights.specs.items() if spec.numel >= each / 4]
    small = [name for name, spec in weights.specs.items() if 0 < spec.numel < each / 4]
    for names in [*([name] for name in large), small]:
        ends = list(accumulate(weights.specs[name].numel for name in names))
        if not ends:
            continue
        parts = 2 * max(1, round(ends[-1] / each / 2))
        places = np.arange(parts) + uniform((parts,), "sample of magnitudes", names[0]).double().numpy()
        for place in (places / parts * ends[-1]).astype(np.int64).tolist():
            at = bisect_right(ends, place)
            first = place - (ends[at] - weights.specs[names[at]].numel)
            yield names[at], first, max(1, round(probe * ends[-1] / parts / each))


def guessed(sample: list[Array], rank: int, numel: int) -> Bracket:
    """Two magnitudes of the sample between which the rank lies, as far as neighbouring blocks differ."""
    pooled = np.concatenate(sample)
    middle = (rank - 0.5) / numel
    guess = np.float32(nth(pooled, int(middle * len(pooled)) + 1))
    sizes = np.array([len(block) for block in sample]) / len(pooled)
    below = np.array([np.count_nonzero(block <= guess) / len(block) if len(block) else middle for block in sample])
    spread = np.linalg.norm((sizes[::2] + sizes[1::2]) * (below[::2] - below[1::2])) / 2
    margin = _MARGIN * spread + 4 / len(pooled)
    first, last = int((middle - margin) * len(pooled)), int((middle + margin) * len(pooled)) + 1
    low = np.float32(nth(pooled, first + 1) if first > 0 else 0)
    high = np.float32(nth(pooled, last + 1) if last < len(pooled) else np.inf)
    share = np.count_nonzero((pooled >= low) & (pooled <= high)) / len(pooled)
    return Bracket(int(low.view(np.int32)), int(high.view(np.int32)), numel * share)


def held(n: int, tasks: int) -> Generator[Fold, Any, Array]:
    """All magnitudes, [tasks, n], from one pass over blocks [tasks, ...] that have as many entries in all.

    >>> round, found = held(3, 1), None
    >>> fold = next(round)
    >>> for block in torch.tensor([3.0, -1.0]), torch.tensor([2.0]):
    ...     found = fold.add(found, fold.part(block))
    >>> found
    array([[3., 1., 2.]], dtype=float32)
    """
    rows, filled = np.empty((tasks, n), np.float32), 0

    def part(block: Tensor, *_: object) -> Array:
        return _floats(block, tasks)

    def add(_: Array | None, part: Array) -> Array:
        nonlocal filled
        np.abs(part, out=rows[:, filled : filled + part.shape[1]])
        filled += part.shape[1]
        return rows

    found: Array = yield Fold(part, add)
    return found


def magnitudes(block: Tensor, tasks: int) -> Array:
    """Those of a block, [tasks, n]."""
    return np.abs(_floats(block, tasks))


def _floats(block: Tensor, tasks: int) -> Array:
    """The entries of a block, [tasks, n]; by NumPy, since every call of torch lets go of Python's lock."""
    return (block if block.dtype == torch.float32 else block.float()).numpy(force=True).reshape(tasks, -1)


def nth(row: Array, rank: int) -> float:
    """The magnitude of a rank, 1 for the smallest.

    Args:
        row: float32 [n], magnitudes.
        rank: from 1 to n.

    >>> nth(np.float32([3.0, 1.0, 2.0]), 2)
    2.0
    """
    loops = kernels()
    if loops is None:
        return float(np.partition(row, rank - 1)[rank - 1])
    few = np.sort(row[:: 1 + len(row) // _FEW])
    guess = few[(rank - 1) * len(few) // len(row)]
    some = np.empty(len(row) + loops.LANES, np.int32)
    return float(_float(loops.nth(row.view(np.int32), rank, int(guess.view(np.int32)), some)))


def _float(bits: int) -> np.float32:
    return np.int32(bits).view(np.float32)
