"""Compiled loops that have a tape played strip after strip, so that what it makes is looked at in the cache.

Each makes of all strips what the loop of `_kernels` makes of a block. Python is asked once for several blocks.
"""

from typing import Any

import numpy as np

from calmerge._kernels import above, bracketed_beside
from calmerge._lanes import LANES as LANES
from calmerge._lanes import played
from calmerge._machine import SOUND, STRIP, compiled
from calmerge._watch import Array


@compiled()
def windows(tape: tuple[int, ...], planes: Array, begins: Array, ends: Array, out: Array) -> bool:
    """Some stretches of what a tape makes, side by side; whether all their entries are sound.

    Args:
        tape: as in `played`.
        planes: float32 [planes, STRIP].
        begins: int64 [stretches], the first entry of each.
        ends: int64 [stretches], where each ends in `out`.
        out: float32 [planes, n].
    """
    start: Any = 0
    for begin, end in zip(begins, ends):  # noqa: B905
        size = end - start
        if played(tape, begin, begin + size) != SOUND:
            return False
        out[:, start:end] = planes[:, :size]
        start = end
    return True


@compiled()
def above_by_strips(
    tape: tuple[int, ...], planes: Array, ends: Array, low: int, high: int, lanes: Array, inside: Array, counts: Array
) -> bool:
    """`above` of what a tape makes, magnitudes first and then rows; whether all entries are sound.

    Args:
        tape: as in `played`.
        planes: float32 [T + 1, STRIP].
        ends: int64 [blocks], where each block ends.
        low: as in `above`; so are the others, but for lanes [blocks, T, 64].
    """
    begin: Any = 0
    for block in range(ends.size):
        while begin < ends[block]:
            size = min(STRIP, ends[block] - begin)
            if played(tape, begin, begin + size) != SOUND:
                return False
            bits, flat = planes[0, :size].view(np.int32), planes.reshape(-1)[STRIP:]
            above(bits, flat, STRIP, begin, low, high, lanes[block], inside, counts)
            begin += size
    return True


@compiled()
def bracketed_beside_by_strips(
    tape: tuple[int, ...], planes: Array, n: int, low: Array, high: Array, counts: Array, beside: Array
) -> tuple[int, int]:
    """`bracketed_beside` of what a tape makes, with the sum of whole numbers that it makes as well.

    Args:
        tape: as in `played`.
        planes: float32 [T + 1, STRIP], the last of them the whole numbers.
        n: entries.
        low: as in `bracketed_beside`; so are the others.

    Returns:
        How many places there are, -1 where an entry is not sound; and the sum.
    """
    found: Any = 0
    total: Any = 0
    tasks = low.size
    for begin in range(0, n, STRIP):
        size = min(STRIP, n - begin)
        if played(tape, begin, begin + size) != SOUND:
            return -1, 0
        found = bracketed_beside(planes[:tasks, :size].view(np.int32), low, high, counts, beside, found)
        some = np.int32(0)
        for i in range(size):
            some = np.int32(some + np.int32(planes[tasks, i]))
        total += some
    return found, total
