"""Compiled loops for sums, ranks and draws, where NumPy takes several steps; the bits that come out are its.

They let other threads run. Each stands beside the NumPy lines that it takes the place of: `bracketed` and `nth` in
`_rank`, `bracketed_beside` in `_threshold`, `above` in `pieces/largest_sums`, `drawn` in `_random`, `row_lanes` and
`pair_lanes` in `_dot`, `between` in `pieces/middle`, `ordered` in `pieces/magprune`.
"""

from typing import Any

import numpy as np

from calmerge._dot import SUM_LANES
from calmerge._lanes import LANES, flagged, packed
from calmerge._machine import compiled
from calmerge._watch import Array

_FEW = 1024  # entries that are looked at twice
_MAGNITUDE = np.int32(0x7FFFFFFF)  # all bits of a float but its sign
_LARGEST = 0x7FFFFFFE  # but for the one that stands for none
_STRIP = 32 * SUM_LANES  # entries of all rows that stay in cache
_NEAR = 1 << 20  # a magnitude's eighth, in its bits


@compiled()
def bracketed(bits: Array, low: int, high: int, inside: Array) -> tuple[int, int, int]:
    """How many magnitudes lie below `low`, how many up to `high`, and how many between, which are put into `inside`.

    Args:
        bits: int32 [n], those of floats.
        low: bits of a magnitude.
        high: bits of another.
        inside: int32 [n + LANES]; the magnitudes from `low` to `high`, in order.
    """
    below: Any = 0
    found: Any = 0
    least, most = np.int32(low), np.int32(high)
    whole = bits.size - bits.size % LANES
    for i in range(0, whole, LANES):
        less, between, which = flagged(bits, i, least, most)
        packed(bits, i, which, _MAGNITUDE, inside, found)
        below += less
        found += between
    for i in range(whole, bits.size):
        magnitude = np.int32(bits[i] & _MAGNITUDE)
        inside[found] = magnitude
        below += np.intp(magnitude < least)
        found += np.intp(magnitude >= least) & np.intp(magnitude <= most)
    return below, below + found, found


@compiled()
def bracketed_beside(rows: Array, low: Array, high: Array, counts: Array, beside: Array, found: int) -> int:
    """As `bracketed` for several rows: of places where any magnitude lies between, all entries are put into `beside`.

    Args:
        rows: int32 [T, n], bits of floats.
        low: int32 [T].
        high: int32 [T].
        counts: int64 [T, 2], to which are added how many lie below, and how many up to the end.
        beside: int32 [T, n + LANES]; the entries, in order.
        found: how many there are already.

    Returns:
        How many there are.
    """
    whole = rows.shape[1] - rows.shape[1] % LANES
    which = np.empty(_STRIP // LANES, np.int64)
    for start in range(0, whole, _STRIP):
        groups = min(_STRIP, whole - start) // LANES
        which[:groups] = 0
        for t in range(rows.shape[0]):
            _flagged_row(rows[t, start:], low[t], high[t], counts[t], which[:groups])
        for g in range(groups):
            flags = which[g]
            if flags:
                for t in range(rows.shape[0]):
                    packed(rows[t], start + g * LANES, flags, np.int32(-1), beside[t], found)
                while flags:
                    found += 1
                    flags &= flags - 1
    for i in range(whole, rows.shape[1]):
        wanted = False
        for t in range(rows.shape[0]):
            magnitude = np.int32(rows[t, i] & _MAGNITUDE)
            beside[t, found] = rows[t, i]
            counts[t, 0] += magnitude < low[t]
            counts[t, 1] += magnitude <= high[t]
            wanted |= low[t] <= magnitude <= high[t]
        found += int(wanted)
    return found


@compiled()
def _flagged_row(bits: Array, low: Any, high: Any, counts: Array, which: Array) -> None:
    below: Any = 0
    inside: Any = 0
    for g in range(which.size):
        less, between, flags = flagged(bits, g * LANES, low, high)
        below += less
        inside += between
        which[g] |= flags
    counts[0] += below
    counts[1] += below + inside


@compiled()
def above(
    bits: Array, flat: Array, step: int, begin: int, low: int, high: int, lanes: Array, inside: Array, counts: Array
) -> None:
    """The sums of several rows where a magnitude is above a bracket; what lies inside it is put into `inside`.

    Args:
        bits: int32 [n], those of floats.
        flat: float32, in which T rows lie.
        step: from the first entry of a row to that of the next.
        begin: the place of the first entry.
        low: bits of a magnitude.
        high: bits of another.
        lanes: float64 [T, 64], as in `row_lanes`; `begin` is one of the first lane.
        inside: int32 [T + 2, n + LANES]; behind what is there the bits of rows, magnitudes from `low` to `high`, and
            their places, in order.
        counts: int64 [3], to which are added how many magnitudes are 0, how many lie below `low`, and how many inside.
    """
    tasks = lanes.shape[0]
    zeros: Any = 0
    below: Any = 0
    found: Any = counts[2]
    least, most, taken = np.int32(low), np.int32(high), flat.view(np.int32)
    order = np.arange(_STRIP).astype(np.int32)
    for start in range(0, bits.size, _STRIP):
        size, before = min(_STRIP, bits.size - start), found
        some = bits[start : start + size]
        for t in range(tasks):
            _added_above(some, most, flat[t * step + start : t * step + start + size], lanes[t])
        whole = size - size % LANES
        for i in range(0, whole, LANES):
            less, between, which = flagged(some, i, least, most)
            zeros += flagged(some, i, np.int32(1), np.int32(0))[0]
            below += less
            if between:
                for t in range(tasks):
                    packed(taken, t * step + start + i, which, np.int32(-1), inside[t], found)
                packed(some, i, which, _MAGNITUDE, inside[tasks], found)
                packed(order, i, which, np.int32(-1), inside[tasks + 1], found)
                found += between
        for i in range(whole, size):
            magnitude = np.int32(some[i] & _MAGNITUDE)
            for t in range(tasks):
                inside[t, found] = taken[t * step + start + i]
            inside[tasks, found], inside[tasks + 1, found] = magnitude, order[i]
            zeros += np.intp(magnitude == 0)
            below += np.intp(magnitude < least)
            found += np.intp(magnitude >= least) & np.intp(magnitude <= most)
        for i in range(before, found):
            inside[tasks + 1, i] += np.int32(begin + start)
    counts[0] += zeros
    counts[1] += below
    counts[2] = found


@compiled()
def _added_above(bits: Array, most: Any, row: Array, into: Array) -> None:
    whole = row.size - row.size % SUM_LANES
    for first in range(0, whole, SUM_LANES):
        for lane in range(SUM_LANES):
            above = np.float32((bits[first + lane] & _MAGNITUDE) > most)
            into[lane] += np.float64(row[first + lane] * above)
    for lane in range(row.size - whole):
        above = np.float32((bits[whole + lane] & _MAGNITUDE) > most)
        into[lane] += np.float64(row[whole + lane] * above)


@compiled()
def binned(inside: Array, low: int, shift: int, counts: Array, least: Array, most: Array) -> None:
    """Count magnitudes in bins, and keep the smallest and the largest of each.

    Args:
        inside: int32 [n], bits of magnitudes.
        low: bits of the smallest one of the first bin, of which the lowest `shift` are 0.
        shift: how many low bits differ within a pair of bins: in the first of it they are 0.
        counts: int64 [bins].
        least: int32 [bins].
        most: int32 [bins].
    """
    start, rest = np.int32(low), np.int32((1 << shift) - 1)
    for i in range(inside.size):
        bits = inside[i]
        bin = 2 * ((bits - start) >> shift) + np.intp((bits & rest) != 0)
        counts[bin] += 1
        if bits < least[bin]:  # rarely, so that a write need not wait for the one before
            least[bin] = bits
        if bits > most[bin]:
            most[bin] = bits


@compiled()
def less(x: Array, limits: Array, z: Array, equal: Array) -> int:
    """Whether each is less than its limit; how many are equal to it.

    Args:
        x: uint16 [n].
        limits: uint16 [n], or [1] for all.
        z: uint8 [n].
        equal: int64 [most]; the places of the first of those.
    """
    found, same = 0, np.full(_FEW, limits[0] if limits.size else np.uint16(0))
    for begin in range(0, x.size, _FEW):
        some, flags, any = x[begin : begin + _FEW], z[begin : begin + _FEW], np.uint16(0)
        bounds = same if limits.size == 1 else limits[begin : begin + _FEW]
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
    some = np.empty(rows.shape[1] + LANES, np.int32)
    low, high = 0, 0
    for r in range(rows.shape[0]):
        bits = rows[r].view(np.int32)
        low = nth(bits, first, low, some)  # rows of a tensor are much alike
        high = nth(bits, last, high, some)
        _kept(rows[r], np.int32(low), np.int32(high), out[r])


@compiled()
def _kept(x: Array, low: Any, high: Any, z: Array) -> None:
    bits = x.view(np.int32)
    for i in range(x.size):
        magnitude = np.int32(bits[i] & _MAGNITUDE)
        z[i] = x[i] * np.float32((magnitude >= low) & (magnitude <= high))


@compiled()
def nth(bits: Array, rank: int, guess: int, some: Array) -> int:
    """The bits of the magnitude of a rank, 1 for the smallest; sooner where it is near a guess.

    Args:
        bits: int32 [n], those of floats.
        rank: from 1 to n.
        guess: bits of a magnitude.
        some: int32 [n + LANES], room.
    """
    low: Any = max(0, guess - _NEAR)
    high: Any = min(guess + _NEAR, _LARGEST)
    below, upto, n = bracketed(bits, low, high, some)
    if rank <= below or rank > upto:
        low, high, below = 0, _LARGEST, 0
        _, _, n = bracketed(bits, low, high, some)
    rank -= below
    while n:  # Hoare's selection: what is wanted is of rank `rank` among the first n of `some`
        some[n : n + LANES] = _MAGNITUDE  # above `high`, so that whole vectors may be looked at
        pivot = _middle(some[0], some[n >> 1], some[n - 1])
        less, equal, kept = 0, 0, 0
        for i in range(0, n, LANES):
            before, same, _ = flagged(some, i, pivot, pivot)
            less += before
            equal += same
        if less < rank <= less + equal:
            return pivot  # type: ignore[no-any-return]
        if rank <= less:
            high = pivot - 1
        else:
            low, rank = pivot + 1, rank - less - equal
        for i in range(0, n, LANES):
            _, between, which = flagged(some, i, np.int32(low), np.int32(high))
            packed(some, i, which, _MAGNITUDE, some, kept)
            kept += between
        n = kept
    return _MAGNITUDE  # type: ignore[return-value]


@compiled()
def _middle(a: Any, b: Any, c: Any) -> Any:
    return max(min(a, b), min(max(a, b), c))


@compiled()
def spread(first: int, step: int, limit: int, out: Array) -> None:
    """Whether i * step mod 2^32 is at most `limit`, for indices from `first` on."""
    for i in range(out.size):
        out[i] = np.uint32(np.uint32(first + i) * np.uint32(step)) <= np.uint32(limit)


@compiled()
def ordered(rows: Array, keys: Array, room: Array) -> None:
    """For each row its entries by magnitude, those that are equal by their place.

    Args:
        rows: float32 [rows, n].
        keys: int64 [rows, n]; bits of the magnitude in the upper half of each word, the place in the lower.
        room: integers [2, n] that can count to n; the fewer bits they have, the more of them a cache holds.
    """
    for r in range(rows.shape[0]):
        _ordered(rows[r], keys[r], room[0], room[1])


@compiled()
def _ordered(row: Array, keys: Array, bins: Array, ends: Array) -> None:
    """As many bins as entries, each as wide as the others, up to four times the mean magnitude; then neighbours are
    exchanged. How large magnitudes are decides how long it takes, and not what comes out.

    Args:
        row: float32 [n].
        keys: int64 [n], as in `ordered`.
        bins: integers [n], room.
        ends: integers [n], room.
    """
    n, bits = row.size, row.view(np.int32)
    total: Any = np.float32(0)
    some: Any = 0
    for i in range(0, n, 8):
        total += abs(row[i])
        some += np.intp(row[i] != 0)
    width = np.float32(n * some / 4) / total if total > 0 else np.float32(0)  # of bins in an entry's units
    for i in range(n):
        place = abs(row[i]) * width
        bins[i] = min(np.int32(place), np.int32(n - 1)) if place < np.float32(n) else np.int32(n - 1)  # NaN is largest
    ends[:] = 0
    for i in range(n):
        ends[bins[i]] += 1
    end: Any = 0
    for bin in range(n):
        count = ends[bin]
        ends[bin] = end
        end += count
    for i in range(n):
        at = ends[bins[i]]
        ends[bins[i]] = at + 1
        keys[at] = (np.int64(bits[i] & _MAGNITUDE) << 32) | i
    patience = 8 * n
    for i in range(1, n):
        key, at = keys[i], i
        while at > 0 and keys[at - 1] > key:
            keys[at] = keys[at - 1]
            at -= 1
        keys[at] = key
        patience -= i - at
        if patience < 0:  # most entries lie in few bins
            keys.sort()
            return


@compiled()
def pruned(
    rows: Array, draws: Array, chance: Array, upper: Array, divided: bool, out: Array, met: Array, room: Array
) -> int:
    """Entries whose draws are not below the limit of their rank; of how many the draw is equal to it.

    Args:
        rows: float32 [rows, n].
        draws: uint16 [rows, n].
        chance: float32 [n], by rank.
        upper: uint16 [n], the limits by rank.
        divided: whether entries are divided by their chances.
        out: float32 [rows, n].
        met: int64 [most, 2]: row times n plus column, and rank, of draws that are equal, which count as kept.
        room: as for `ordered`.
    """
    n, count = rows.shape[1], 0
    keys, limits = np.empty(n, np.int64), np.empty(n, np.uint16)
    for r in range(rows.shape[0]):
        _ordered(rows[r], keys, room[0], room[1])
        row, drawn, kept = rows[r], draws[r], out[r]
        for rank in range(n):  # to their places, so that what follows goes from one entry to the next
            i = keys[rank] & 0xFFFFFFFF
            kept[i], limits[i] = chance[rank], upper[rank]
        equal = np.uint16(0)
        for i in range(n):
            value = row[i] / kept[i] if divided else row[i]
            kept[i] = value * np.float32(drawn[i] >= limits[i])
            equal |= np.uint16(drawn[i] == limits[i])
        if equal:
            for rank in range(n):
                i = keys[rank] & 0xFFFFFFFF
                if drawn[i] == limits[i]:
                    if count < met.shape[0]:
                        met[count, 0], met[count, 1] = r * n + i, rank
                    count += 1
    return count


@compiled()
def row_lanes(flat: Array, step: int, n: int, lanes: Array) -> None:
    """Add every entry of each row to the lane of its place.

    Args:
        flat: float32, in which T rows lie.
        step: from the first entry of a row to that of the next.
        n: entries of a row.
        lanes: float64 [T, 64].
    """
    whole = n - n % SUM_LANES
    for t in range(lanes.shape[0]):
        row, into = flat[t * step : t * step + n], lanes[t]
        for first in range(0, whole, SUM_LANES):
            for lane in range(SUM_LANES):
                into[lane] += np.float64(row[first + lane])
        for lane in range(n - whole):
            into[lane] += np.float64(row[whole + lane])


@compiled()
def pair_lanes(flat: Array, step: int, n: int, lanes: Array) -> None:
    """Add the products of every two rows, the second not behind the first, to the lanes of their places.

    Args:
        flat: float32, in which T rows lie.
        step: from the first entry of a row to that of the next.
        n: entries of a row.
        lanes: float64 [T, T, 64].
    """
    for start in range(0, n, _STRIP):
        size = min(_STRIP, n - start)
        for i in range(lanes.shape[0]):
            x = flat[i * step + start : i * step + start + size]
            for j in range(i + 1):
                _paired(x, flat[j * step + start : j * step + start + size], lanes[i, j])


@compiled()
def _paired(x: Array, y: Array, into: Array) -> None:
    whole = x.size - x.size % SUM_LANES
    for first in range(0, whole, SUM_LANES):
        for lane in range(SUM_LANES):
            into[lane] += np.float64(x[first + lane]) * np.float64(y[first + lane])
    for lane in range(x.size - whole):
        into[lane] += np.float64(x[whole + lane]) * np.float64(y[whole + lane])
