"""Randomness as a function of a key and an index: the same for any chunk, thread, order or device."""

import hashlib

import numpy as np
import torch
from torch import Tensor

from calmerge._compiled import kernels
from calmerge._watch import Array

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def uniform(shape: tuple[int, ...], *key: object, offset: int = 0) -> Tensor:
    """Numbers in [0, 1), float32, entry i a function of `key` and `offset + i` alone.

    u_i = top 24 bits of mix(hash(key) + (offset + i) * golden) / 2^24, with the finaliser of SplitMix64.

    Args:
        shape: shape of the result; entries are counted in row-major order.
        key: anything whose `repr` names the stream, such as seed, tensor name and task.
        offset: index of the first entry.

    >>> whole = uniform((6,), 0, "w", "cars")
    >>> torch.equal(whole[2:], uniform((4,), 0, "w", "cars", offset=2))
    True
    """
    bits = _mix64(_stream(key), offset, torch.Size(shape).numel())
    bits >>= np.uint64(40)
    return torch.from_numpy(bits.view(np.int64)).float().mul_(2.0**-24).reshape(shape)


def bernoulli(shape: tuple[int, ...], share: float | Tensor, *key: object, offset: int = 0) -> Tensor:
    """Booleans of which a `share` is true, entry i a function of `key` and `offset + i` alone.

    Entry i is u_i < share, in float32, with u_i of 32 bits. Its upper 16 are half of a 32-bit mix of hash(key) and
    (offset + i) / 2, so that one mix serves two entries; the lower 16 are asked for only where the upper leave it open.
    That takes a fraction of the time of `uniform(...) < share`, and a drop at random is mostly this.

    Args:
        shape: shape of the result.
        share: in [0, 1]; of `shape` if it differs from entry to entry.
        key: as for `uniform`.
        offset: index of the first entry.

    >>> bernoulli((100_000,), 0.25, "seed").float().mean()
    tensor(0.2503)
    """
    n = torch.Size(shape).numel()
    limits = share.cpu().reshape(-1).numpy() if isinstance(share, Tensor) else share
    return torch.from_numpy(_below(n, limits, key, offset)).reshape(shape)


class Limits:
    """Shares as the machine words that draws are compared with: 16 bits, and what is left of each where those meet.

    Args:
        share: in [0, 1].
    """

    def __init__(self, share: float | Array) -> None:
        limits = np.multiply(share, 65536, dtype=np.float32).reshape(-1)
        self.upper = np.minimum(limits, 65535).astype(np.uint16)
        self._rest = (limits - self.upper) * np.float32(65536)

    def decide(self, i: int, index: int, key: tuple[object, ...]) -> bool:
        """Whether the draw of the entry `index` is less than share number `i`, where its upper bits equal the limit's.

        >>> Limits(1.0).decide(0, 7, ("seed",))
        True
        """
        return bool((_stream((*key, index)) >> 48) < self._rest[i])


def draws(n: int, key: tuple[object, ...], offset: int) -> Array:
    """The upper 16 bits of `n` draws, from the entry `offset` on.

    >>> bool(draws(2, ("seed",), 1)[0] == draws(3, ("seed",), 0)[1])
    True
    """
    first, stream = offset // 2, _stream(key)
    pairs, loops = (offset + n + 1) // 2 - first, kernels()
    if loops is not None and offset + n <= 1 << 32:
        mixed = np.empty(pairs, np.uint32)
        loops.mixed(mixed, (first + stream) & 0xFFFFFFFF, stream >> 32)
    else:
        mixed = _mix32(stream, first, pairs)
    return mixed.view(np.uint16)[offset % 2 :][:n]


def _below(n: int, share: float | Array, key: tuple[object, ...], offset: int) -> Array:
    limits, drawn, loops = Limits(share), draws(n, key, offset), kernels()
    one, equal = len(limits.upper) == 1, np.empty(n // 4096 + 64, np.int64)
    if loops is not None:
        true: Array = np.empty(n, bool)
        met = loops.less(drawn, limits.upper, true.view(np.uint8), equal)
    else:
        true, met = drawn < limits.upper, len(equal) + 1
    for i in equal[:met] if met <= len(equal) else np.flatnonzero(drawn == limits.upper):
        true[i] = limits.decide(0 if one else int(i), offset + int(i), key)
    return true


def permutation(n: int, *key: object) -> Tensor:
    """The numbers 0..n-1 in an order that only `key` decides.

    >>> sorted(permutation(5, 0, "pool").tolist())
    [0, 1, 2, 3, 4]
    """
    return torch.from_numpy(np.argsort(_mix64(_stream(key), 0, n), kind="stable"))


def _stream(key: tuple[object, ...]) -> int:
    return int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=8).digest(), "little")


def _mix64(stream: int, offset: int, n: int) -> Array:
    z = np.arange(offset, offset + n, dtype=np.uint64)
    shifted = np.empty_like(z)
    with np.errstate(over="ignore"):
        z *= _GOLDEN
        z += np.uint64(stream)
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
            z ^= np.right_shift(z, np.uint64(shift), out=shifted)
            z *= np.uint64(factor)
        z ^= np.right_shift(z, np.uint64(31), out=shifted)
    return z


def _mix32(stream: int, offset: int, n: int) -> Array:
    """Two rounds of xor-shift and multiply. Half of the stream comes in before and half between, so that no two streams
    are shifted copies of each other; what an index has above 32 bits goes into the second half."""
    low, high = stream & 0xFFFFFFFF, stream >> 32
    x = np.arange(n, dtype=np.uint32)
    shifted = np.empty_like(x)
    with np.errstate(over="ignore"):
        x += np.uint32((offset + low) & 0xFFFFFFFF)
        x ^= np.right_shift(x, np.uint32(16), out=shifted)
        x *= np.uint32(0x21F0AAAD)
        x ^= np.right_shift(x, np.uint32(15), out=shifted)
        x ^= np.uint32(high)
        if offset + n > 1 << 32:
            x += (np.arange(offset, offset + n, dtype=np.uint64) >> np.uint64(32)).astype(np.uint32)
        x *= np.uint32(0x735A2D97)
        x ^= np.right_shift(x, np.uint32(15), out=shifted)
    return x
