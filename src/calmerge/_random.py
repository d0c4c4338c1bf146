"""Randomness as a function of a key and an index: the same for any chunk, thread, order or device."""

import hashlib

import numpy as np
import torch
from torch import Tensor

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
    n = torch.Size(shape).numel()
    bits = _mix(_stream(key), offset, n) >> np.uint64(40)
    return torch.from_numpy(bits.astype(np.float32) * np.float32(2.0**-24)).reshape(shape)


def permutation(n: int, *key: object) -> Tensor:
    """The numbers 0..n-1 in an order that only `key` decides.

    >>> sorted(permutation(5, 0, "pool").tolist())
    [0, 1, 2, 3, 4]
    """
    return torch.from_numpy(np.argsort(_mix(_stream(key), 0, n), kind="stable"))


def _stream(key: tuple[object, ...]) -> int:
    return int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=8).digest(), "little")


def _mix(stream: int, offset: int, n: int) -> np.ndarray:
    with np.errstate(over="ignore"):
        z = np.arange(offset, offset + n, dtype=np.uint64) * _GOLDEN + np.uint64(stream)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))
