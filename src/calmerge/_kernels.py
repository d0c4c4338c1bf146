"""Compiled loops for what goes by rank or at random, where NumPy takes several steps; the bits that come out are its.

They let other threads run. Each stands beside the NumPy lines that it takes the place of: `bracketed` in `_rank`,
`drawn` in `_random`, `between` in `pieces/middle`, `keyed` in `pieces/magprune`.
"""

from typing import Any

import numpy as np

from calmerge._machine import compiled
from calmerge._watch import Array

_FEW = 1024  # entries that are looked at twice
_MAGNITUDE = np.int32(0x7FFFFFFF)  # all bits of a float but its sign


@compiled()
def bracketed(bits: Array, low: int, high: int, inside: Array) -> tuple[int, int, int]:
    """How many magnitudes lie below `low`, how many up to `high`, and how many between, which are put into `inside`.

    Args:
        bits: int32 [n], those of floats.
        low: bits of a magnitude.
        high: bits of another.
        inside: int32 [n + 1]; the magnitudes from `low` to `high`, in order.
    """
    below, upto, found, least, most = 0, 0, 0, np.int32(low), np.int32(high)
    for begin in range(0, bits.size, _FEW):
        some = bits[begin : begin + _FEW]
        before, within = _counted(some, least, most)
        below, upto = below + before, upto + within
        if within > before:
            found += _gathered(some, least, most, inside[found:])
    return below, upto, found


@compiled()
def _gathered(bits: Array, low: Any, high: Any, inside: Array) -> Any:
    """Without a branch, which would be foreseen wrongly too often."""
    found: Any = 0
    for i in range(bits.size):
        magnitude = np.int32(bits[i] & _MAGNITUDE)
        inside[found] = magnitude
        found += np.intp(magnitude >= low) & np.intp(magnitude <= high)
    return found


@compiled()
def binned(inside: Array, low: int, shift: int, counts: Array, least: Array, most: Array) -> None:
    """Count magnitudes in bins, and keep the smallest and the largest of each.

    Args:
        inside: int32 [n], bits of magnitudes.
        low: bits of the smallest one of the first bin.
        shift: how many low bits differ within a bin.
        counts: int64 [bins].
        least: int32 [bins].
        most: int32 [bins].
    """
    for i in range(inside.size):
        bin = (inside[i] - low) >> shift
        counts[bin] += 1
        least[bin] = min(least[bin], inside[i])
        most[bin] = max(most[bin], inside[i])


@compiled()
def _counted(bits: Array, low: Any, high: Any) -> tuple[int, int]:
    below, upto = np.int32(0), np.int32(0)
    for i in range(bits.size):
        magnitude = np.int32(bits[i] & _MAGNITUDE)
        below += np.int32(magnitude < low)
        upto += np.int32(magnitude <= high)
    return below, upto  # type: ignore[return-value]


@compiled()
def less_than_one(x: Array, limit: int, z: Array, equal: Array) -> int:
    """Whether each is less than a limit; how many are equal to it.

    Args:
        x: uint16 [n].
        limit: uint16.
        z: uint8 [n].
        equal: int64 [most]; the places of the first of those.
    """
    found = 0
    for begin in range(0, x.size, _FEW):
        some, flags, any = x[begin : begin + _FEW], z[begin : begin + _FEW], np.uint16(0)
        for i in range(some.size):
            flags[i] = some[i] < limit
        for i in range(some.size):
            any |= np.uint16(some[i] == limit)
        if any:
            for i in range(some.size):
                if some[i] == limit:
                    found = _noted(equal, found, begin + i)
    return found


@compiled()
def less(x: Array, limits: Array, z: Array, equal: Array) -> int:
    """As `less_than_one`, with a limit for each."""
    found = 0
    for begin in range(0, x.size, _FEW):
        some, flags, any = x[begin : begin + _FEW], z[begin : begin + _FEW], np.uint16(0)
        bounds = limits[begin : begin + _FEW]
        for i in range(some.size):
            flags[i] = some[i] < bounds[i]
        for i in range(some.size):
            any |= np.uint16(some[i] == bounds[i])
        if any:
            for i in range(some.size):
                if some[i] == bounds[i]:
                    found = _noted(equal, found, begin + i)
    return found


@compiled()
def _noted(places: Array, found: int, place: int) -> int:
    if found < places.size:
        places[found] = place
    return found + 1


@compiled()
def mixed(pairs: Array, first: int, high: int) -> None:
    """The mix of `_random._mix32` for pairs of draws whose numbers are below 2^31.

    Args:
        pairs: uint32 [pairs].
        first: the number of the first, and half of the stream added to it; 32 bits.
        high: the other half.
    """
    start, half = np.uint32(first), np.uint32(high)
    for i in range(pairs.size):
        x = np.uint32(start + np.uint32(i))
        x ^= np.uint32(x >> np.uint32(16))
        x = np.uint32(x * np.uint32(0x21F0AAAD))
        x ^= np.uint32(x >> np.uint32(15))
        x ^= half
        x = np.uint32(x * np.uint32(0x735A2D97))
        x ^= np.uint32(x >> np.uint32(15))
        pairs[i] = x


@compiled()
def between(rows: Array, first: int, last: int, out: Array) -> None:
    """The entries of each row whose magnitudes lie between those of two ranks, both included, and 0 for the others.

    Args:
        rows: float32 [rows, n].
        first: a rank, 1 for the smallest.
        last: another.
        out: float32 [rows, n].
    """
    counts, some = np.empty((2, 2048), np.int32), np.empty(rows.shape[1] + 1, np.int32)
    for r in range(rows.shape[0]):
        bits = rows[r].view(np.int32)
        _count_bins(bits, counts)
        low, high = _nth(bits, counts, some, first), _nth(bits, counts, some, last)
        _kept(rows[r], np.int32(low), np.int32(high), out[r])


@compiled()
def _kept(x: Array, low: Any, high: Any, z: Array) -> None:
    bits = x.view(np.int32)
    for i in range(x.size):
        magnitude = np.int32(bits[i] & _MAGNITUDE)
        z[i] = x[i] * np.float32((magnitude >= low) & (magnitude <= high))


@compiled()
def _count_bins(bits: Array, counts: Array) -> None:
    """How many magnitudes have each of the upper 11 bits; in two halves, so that one count does not wait for the
    other."""
    counts[:] = 0
    for i in range(bits.size):
        counts[i & 1, (bits[i] & _MAGNITUDE) >> np.int32(20)] += np.int32(1)


@compiled()
def _nth(bits: Array, counts: Array, some: Array, rank: int) -> int:
    """The bits of the magnitude of a rank: what bin it lies in, and its place among the few that are there."""
    before, bin = 0, 0
    while before + counts[0, bin] + counts[1, bin] < rank:
        before += counts[0, bin] + counts[1, bin]
        bin += 1
    found: Any = 0
    for i in range(bits.size):  # without a branch, as in `_gathered`
        magnitude = np.int32(bits[i] & _MAGNITUDE)
        some[found] = magnitude
        found += np.intp((magnitude >> np.int32(20)) == bin)
    wanted, low, high = rank - before - 1, 0, found - 1
    while low < high:  # Hoare's selection
        pivot, i, j = some[(low + high) >> 1], low, high
        while i <= j:
            while some[i] < pivot:
                i += 1
            while some[j] > pivot:
                j -= 1
            if i <= j:
                some[i], some[j] = some[j], some[i]
                i += 1
                j -= 1
        if wanted <= j:
            high = j
        elif wanted >= i:
            low = i
        else:
            break
    return some[wanted]  # type: ignore[no-any-return]


@compiled()
def spread(first: int, step: int, limit: int, out: Array) -> None:
    """Whether i * step mod 2^32 is at most `limit`, for indices from `first` on."""
    for i in range(out.size):
        out[i] = np.uint32(np.uint32(first + i) * np.uint32(step)) <= np.uint32(limit)


@compiled()
def keyed(rows: Array, keys: Array) -> None:
    """One machine word for each entry that sorts by magnitude, and of equal ones by its place in the row.

    Args:
        rows: int32 [rows, n], bits of floats.
        keys: int64 [rows, n].
    """
    for r in range(rows.shape[0]):
        for i in range(rows.shape[1]):
            keys[r, i] = (np.int64(rows[r, i] & _MAGNITUDE) << 32) | i


@compiled()
def pruned(
    rows: Array, keys: Array, draws: Array, chance: Array, upper: Array, divided: bool, out: Array, met: Array
) -> int:
    """Entries whose draws are not below the limit of their rank; of how many the draw is equal to it.

    Args:
        rows: float32 [rows, n].
        keys: int64 [rows, n], as from `keyed`, sorted.
        draws: uint16 [rows, n].
        chance: float32 [n], by rank.
        upper: uint16 [n], the limits by rank.
        divided: whether entries are divided by their chances.
        out: float32 [rows, n].
        met: int64 [most, 2]: row times n plus column, and rank, of draws that are equal, which count as kept.
    """
    n, count = rows.shape[1], 0
    for r in range(rows.shape[0]):
        for rank in range(n):
            i = keys[r, rank] & 0xFFFFFFFF
            value = rows[r, i] / chance[rank] if divided else rows[r, i]
            out[r, i] = value * np.float32(draws[r, i] >= upper[rank])
            if draws[r, i] == upper[rank]:
                if count < met.shape[0]:
                    met[count, 0], met[count, 1] = r * n + i, rank
                count += 1
    return count
