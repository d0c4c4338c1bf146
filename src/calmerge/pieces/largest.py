"""The largest entries of every tensor, exactly as many as asked for, in any weights that can be read by rows."""

from collections.abc import Callable, Generator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from calmerge._compiled import kernels
from calmerge._flags import Flags
from calmerge._measure import Fold, Measure, Pass, PerTensor, count, kth_magnitude
from calmerge._rank import Bracket, held, magnitudes, nth, within
from calmerge._task_vectors import Stacked, TaskVectors
from calmerge._watch import recording
from calmerge._weights import Computed, Site, Weights
from calmerge.pieces.blend import per_task
from calmerge.pieces.mask import masked

Array = np.ndarray[Any, np.dtype[Any]]

_GATHERED = 1 << 21  # indices taken along at most, over all tasks
_HELD = 1 << 22  # magnitudes held at most to find the cut of a tensor at once: 16 MB a thread
_HALF = 1 << 16
_STEP = 2654435769  # 2^32 over the golden ratio, odd: i -> i * _STEP mod 2^32 is one to one and spreads its values
Counts = Callable[[str, int], Sequence[int] | float]
"""From name and size of a tensor to how many of its entries each task keeps, or what share of those that are not 0."""


def keep_largest(tvs: TaskVectors, counts: Counts) -> TaskVectors:
    """Task vectors with all but the largest entries of every tensor set to 0; see `largest` for `counts` and ties.

    >>> from calmerge import task_vectors
    >>> tvs = task_vectors({"w": torch.zeros(4)}, {"a": {"w": torch.tensor([3.0, 1.0, -2.0, 0.5])}})
    >>> keep_largest(tvs, lambda name, n: [2])["w"]
    tensor([[ 3.,  0., -2.,  0.]])
    """
    return tvs.transform(lambda tau, kept, site: masked(tau, kept), largest(tvs, counts))


def largest(weights: Weights, counts: Counts) -> Weights:
    """Whether each entry is among the largest of its tensor, of which exactly as many are as asked for.

    Equal magnitudes at the cut are common where weights are stored in few bits. Of them as many stay as are wanted,
    spread evenly over the tensor: those first whose index i has the smallest i * 2654435769 mod 2^32. That is a rule
    of the index alone, so that no block size changes the choice. A cut at magnitude 0 keeps every zero.

    Args:
        weights: float tensors, or task vectors.
        counts: from name and number of entries of a tensor to how many stay, for each task (of other weights, one
            number); 0 keeps none, the number of entries keeps all. A float is the share that stays of the entries
            other than 0, rounded down.

    >>> from calmerge import StateDict
    >>> largest(StateDict({"w": torch.tensor([3.0, -1.0, 2.0, 0.5])}), lambda name, n: [2])["w"]
    tensor([ True, False,  True, False])
    """
    return chosen(
        weights, {n: cut(weights.only_names([n]), counts(n, spec.numel)) for n, spec in weights.specs.items()}
    )


def chosen(weights: Weights, cuts: Mapping[str, Measure]) -> Weights:
    """Whether each entry is among the largest of its tensor, by the `cut` of each.

    >>> from calmerge import StateDict
    >>> weights = StateDict({"w": torch.tensor([3.0, -1.0, 2.0, 0.5])})
    >>> chosen(weights, {"w": cut(weights, [1])})["w"]
    tensor([ True, False, False, False])
    """
    numbers = PerTensor(cuts, factor=True)
    flags = Flags(weights, lambda n, task, at, into: _first(int(cuts[n].value()[1, task]), at, into), numbers)
    kind = Stacked if isinstance(weights, TaskVectors) else Computed
    return kind(_among, (weights, numbers, flags), flags.specs)


def _among(tensor: Tensor, cut: Tensor, first: Tensor, site: Site) -> Tensor:
    """Above the cut, or at it and one of the first."""
    at = cut[0].to(tensor)
    if recording():
        least = per_task(at, tensor) if len(at) > 1 else at
        return (tensor.abs() > least) | ((tensor.abs() == least) & first)
    n = len(at)
    size, bound = tensor.detach().cpu().float().reshape(n, -1).abs().numpy(), at.cpu().reshape(n, 1).numpy()
    chosen = (size > bound) | ((size == bound) & first.reshape(n, -1).numpy())
    return torch.from_numpy(chosen).reshape(tensor.shape).to(tensor.device)


def _first(limit: int, offset: int, into: Array) -> None:
    """Whether the spread indices from an entry on are at most `limit`."""
    loops = kernels()
    if limit >= 1 << 32:
        into[:] = True
    elif loops is not None:
        loops.spread(offset & 0xFFFFFFFF, _STEP, limit, into)
    else:
        index = np.arange(len(into), dtype=np.uint32)
        index += np.uint32(offset & 0xFFFFFFFF)
        index *= np.uint32(_STEP)
        np.less_equal(index, np.uint32(limit), out=into.view(bool))


def spread(index: Array) -> Array:
    """The spread indices of entries.

    >>> spread(np.array([0, 1, 2]))
    array([         0, 2654435769, 1013904242])
    """
    return (index * _STEP) & 0xFFFFFFFF


def last_of(index: Array, count: int) -> int:
    """The largest spread index of as many entries as are wanted, from 1 to all.

    >>> last_of(np.array([0, 1, 2]), 2)
    1013904242
    """
    return int(np.partition(spread(index), count - 1)[count - 1])


def cut(weights: Weights, counts: Sequence[int] | float) -> Measure:
    """[2, T]: the smallest magnitude that stays in a tensor, and the largest spread index with which it does.

    >>> from calmerge import StateDict
    >>> cut(StateDict({"w": torch.tensor([3.0, -1.0, 2.0, 0.5])}), [2]).value()
    tensor([[2.0000e+00],
            [4.2950e+09]], dtype=torch.float64)
    """
    n, tasks = weights.numel, len(weights.tasks) if isinstance(weights, TaskVectors) else 1
    k = [] if isinstance(counts, float) else [int(counts[t % len(counts)]) for t in range(tasks)]
    if k and all(one <= 0 or one >= n for one in k):
        return Measure((), lambda: _trivial(torch.tensor(k), n), passes=0)
    if n * tasks <= _HELD:
        # magnitudes, room to find a rank among them, which are equal to it, and where those are
        holds = n * (4 * tasks + 12)
        return Measure((weights,), lambda: _at_once(n, tasks, counts), passes=1, holds=holds)
    number: Measure | None = None
    if isinstance(counts, float):
        varying = count(weights, lambda block: torch.count_nonzero(block.reshape(tasks, -1), 1))
        number = varying.map(lambda m: (m * counts).floor().long())
        threshold = kth_magnitude(weights, number.map(lambda k: (n + 1 - k).clamp(1, n)))
    else:
        threshold = kth_magnitude(weights, [min(max(n + 1 - one, 1), n) for one in k])

    def rounds() -> Generator[Pass, Any, Tensor]:
        at, wanted = threshold.value(), torch.tensor(k) if number is None else number.value()
        left = np.zeros(tasks, np.int64)  # how many of the equal ones stay
        limit = np.full(tasks, 1 << 32)
        search = _Equal(tasks, at, dict.fromkeys(range(tasks), (0, 32)))
        while search.within:
            counted = yield Fold(search.part, search.add)
            within = {}
            for t, (first, width) in search.within.items():
                above, keys, bins, _ = counted[t]
                if width == 32:
                    left[t] = wanted[t] - above
                if keys is None:  # too many to take along: look inside the bin that holds the last one that stays
                    running = bins.cumsum()
                    if running[-1] > left[t]:
                        at_bin = int(np.searchsorted(running, left[t]))
                        left[t] -= running[at_bin] - bins[at_bin]
                        within[t] = (first + (at_bin << (width - 16)), width - 16)
                        limit[t] = within[t][0] + (1 << (width - 16)) - 1
                else:
                    found = np.frombuffer(keys, np.int64)
                    if 0 < left[t] < len(found):
                        limit[t] = np.partition(found, left[t] - 1)[left[t] - 1]
            search = _Equal(tasks, at, {t: bits for t, bits in within.items() if bits[1]})
        inside = torch.stack([at.double(), torch.from_numpy(limit).double()])
        return torch.where((wanted <= 0) | (wanted >= n), _whole(wanted, n), inside)

    return Measure((weights, threshold) if number is None else (weights, threshold, number), rounds, passes=1)


def _at_once(n: int, tasks: int, counts: Sequence[int] | float) -> Generator[Pass, Any, Tensor]:
    """The cut of a tensor that can be held, from its magnitudes."""
    rows = yield from held(n, tasks)
    cuts: list[tuple[float, int]] = []
    for t, row in enumerate(rows):
        k = int(np.count_nonzero(row > 0) * counts) if isinstance(counts, float) else int(counts[t % len(counts)])
        if k <= 0 or k >= n:
            cuts.append((-1.0 if k > 0 else torch.inf, 1 << 32))
            continue
        at, limit = nth(row, n - k + 1), 1 << 32
        if at > 0:
            bits = int(np.float32(at).view(np.int32))
            below, upto, _ = within(row, Bracket(bits, bits, 1))
            left = k - (n - upto)
            if left < upto - below:
                limit = last_of(np.flatnonzero(row == at), left)
        cuts.append((at, limit))
    return torch.tensor(cuts, dtype=torch.float64).T.contiguous()


class _Equal:
    """One pass: for each task how many entries lie above its threshold, and the spread indices of those at it.

    Args:
        tasks: T.
        at: thresholds.
        within: by task, the first spread index that counts, and of how many bits the range is that begins there.
    """

    def __init__(self, tasks: int, at: Tensor, within: Mapping[int, tuple[int, int]]) -> None:
        self._tasks, self._at, self.within = tasks, at.float().numpy(), within

    def part(self, block: Tensor, *others: Any) -> dict[int, tuple[int, Array]]:
        """What one block has."""
        size = magnitudes(block, self._tasks)
        found = {}
        for t, (first, width) in self.within.items():
            above = int(np.count_nonzero(size[t] > self._at[t]))
            keys = np.flatnonzero(size[t] == self._at[t]) if self._at[t] > 0 else np.empty(0, np.int64)
            keys = spread(keys + others[-1].offset)
            found[t] = above, keys if width == 32 else keys[(keys >= first) & (keys < first + (1 << width))]
        return found

    def add(self, so_far: dict[int, list[Any]] | None, part: dict[int, tuple[int, Array]]) -> dict[int, list[Any]]:
        """What the blocks so far have, the indices as they are; once they are too many, as counts of bins."""
        total = so_far or {t: [0, bytearray(), None, 0] for t in part}
        for t, (above, keys) in part.items():
            first, width = self.within[t]
            total[t][0] += above
            total[t][3] += len(keys)
            if total[t][1] is not None:
                total[t][1].extend(keys.view(np.uint8).data)
                if total[t][3] <= _GATHERED // self._tasks:
                    continue
                keys, total[t][1], total[t][2] = np.frombuffer(total[t][1], np.int64), None, np.zeros(_HALF, np.int64)
            np.add.at(total[t][2], (keys - first) >> (width - 16), 1)
        return total


def _trivial(wanted: Tensor, n: int) -> Generator[Pass, Tensor, Tensor]:
    yield from ()
    return _whole(wanted, n)


def _whole(wanted: Tensor, n: int) -> Tensor:
    """The cut that keeps everything where n are wanted, and nothing otherwise."""
    at = torch.where(wanted >= n, -1.0, torch.inf).double()
    return torch.stack([at, torch.full_like(at, 2.0**32)])
