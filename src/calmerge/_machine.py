"""The machine that plays tapes: chains of single steps over blocks, a thousand entries at a time.

Between two steps the entries stay in the first-level cache, what is read from files in the second, and Python is not
asked again until a block is done, so that threads do not wait for each other. Every step is one operation of IEEE
single precision, as torch makes it: what comes out is the same to the bit.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import numba
import numpy as np
from numba.core.types import ExternalFunction, int32, int64, intp, voidptr

from calmerge._watch import Array

F = TypeVar("F", bound=Callable[..., Any])

WIDTH = 2048
"""How many entries a register holds."""
STRIP = 2**15
"""How many entries are read from files at a time."""
SOUND, NOT_FINITE, UNREADABLE = 0, 1, 2

(
    LOAD_BF16, LOAD_F32, LOAD_U8, STORE_BF16, STORE_F32, FINITE, ADD, SUB, MUL, DIV, LEAST, MOST, ABS, SIGN, SQRT,
    SHRINK, GREATER, AT_LEAST, EQUAL, WHERE, ROUND_BF16,
) = range(21)  # fmt: skip


def compiled(*signature: str) -> Callable[[F], F]:
    """A decorator that compiles to machine code which lets other threads run.

    It is kept on disk, where a place for it is found, and compiled or loaded at once where the `signature` is given,
    else when it is first called.
    """
    options = {"nogil": True, "error_model": "numpy", "boundscheck": False}

    def compile(fn: F) -> F:
        try:
            return numba.njit(*signature, cache=True, **options)(fn)  # type: ignore[no-any-return]
        except RuntimeError:  # no folder can be written to
            return numba.njit(*signature, **options)(fn)  # type: ignore[no-any-return]

    return compile


_pread: Any = ExternalFunction("pread", intp(int32, voidptr, intp, int64))


@compiled()
def _read(file: int, into: Array, at: int) -> bool:
    """Fill `into` with the bytes of an open file from `at` on; whether there are as many."""
    while into.size:
        got = _pread(file, into.ctypes.data, into.size, at)
        if got <= 0:
            return False
        into, at = into[got:], at + got
    return True


@compiled()
def _play(code: Array, registers: Array, data: Array, out: Array, begin: int, at: int, w: int) -> bool:
    """Run all steps over the `w` entries from number `at` on, in the strip that begins at `begin`."""
    bits = registers.view(np.uint32)
    sound = True
    for k in range(code.shape[0]):
        op, c, a, b, d = code[k, 0], code[k, 1], code[k, 2], code[k, 3], code[k, 4]
        if op == LOAD_BF16:
            a += 2 * (at - b * begin)
            _widen(data[a : a + 2 * w].view(np.uint16), bits[c], w)
        elif op == LOAD_F32:
            a += 4 * (at - b * begin)
            _copy(data[a : a + 4 * w].view(np.float32), registers[c], w)
        elif op == LOAD_U8:
            a += at - b * begin
            _copy(data[a : a + w], registers[c], w)
        elif op == STORE_BF16:
            _narrow(bits[c], out[a + 2 * at : a + 2 * (at + w)].view(np.uint16), w)
        elif op == STORE_F32:
            _copy(registers[c], out[a + 4 * at : a + 4 * (at + w)].view(np.float32), w)
        elif op == FINITE:
            sound &= _finite(bits[c], w)
        elif op == ADD:
            _add(registers[a], registers[b], registers[c], w)
        elif op == SUB:
            _sub(registers[a], registers[b], registers[c], w)
        elif op == MUL:
            _mul(registers[a], registers[b], registers[c], w)
        elif op == DIV:
            _div(registers[a], registers[b], registers[c], w)
        elif op == LEAST:
            _least(registers[a], registers[b], registers[c], w)
        elif op == MOST:
            _most(registers[a], registers[b], registers[c], w)
        elif op == ABS:
            _abs(registers[a], registers[c], w)
        elif op == SIGN:
            _sign(registers[a], registers[c], w)
        elif op == SQRT:
            _sqrt(registers[a], registers[c], w)
        elif op == SHRINK:
            _shrink(registers[a], registers[b], registers[c], w)
        elif op == GREATER:
            _greater(registers[a], registers[b], registers[c], w)
        elif op == AT_LEAST:
            _at_least(registers[a], registers[b], registers[c], w)
        elif op == EQUAL:
            _equal(registers[a], registers[b], registers[c], w)
        elif op == WHERE:
            _where(registers[a], registers[b], registers[d], registers[c], w)
        elif op == ROUND_BF16:
            _round(bits[a], bits[c], w)
    return sound


# Steps: x and y to z, `w` entries. They are functions of their own so that each becomes a vector loop ----------------


@compiled()
def _widen(x: Array, z: Array, w: int) -> None:
    for i in range(w):
        z[i] = np.uint32(x[i]) * np.uint32(65536)


@compiled()
def _narrow(x: Array, z: Array, w: int) -> None:
    """To the nearest bfloat16, of two the even one; NaN stays NaN."""
    for i in range(w):
        u = x[i]
        rounded = np.uint32(np.uint32(u + np.uint32(0x7FFF)) + np.uint32((u >> np.uint32(16)) & np.uint32(1)))
        nan = np.uint32(u & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000)
        z[i] = np.uint16(0x7FC0) if nan else np.uint16(rounded >> np.uint32(16))


@compiled()
def _round(x: Array, z: Array, w: int) -> None:
    for i in range(w):
        u = x[i]
        rounded = np.uint32(np.uint32(u + np.uint32(0x7FFF)) + np.uint32((u >> np.uint32(16)) & np.uint32(1)))
        nan = np.uint32(u & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000)
        z[i] = np.uint32(0x7FC00000) if nan else np.uint32(rounded & np.uint32(0xFFFF0000))


@compiled()
def _copy(x: Array, z: Array, w: int) -> None:
    for i in range(w):
        z[i] = x[i]


@compiled()
def _finite(x: Array, w: int) -> bool:
    most = np.uint32(0)
    for i in range(w):
        most = max(most, np.uint32(x[i] & np.uint32(0x7FFFFFFF)))
    return most < np.uint32(0x7F800000)  # type: ignore[return-value, no-any-return]


@compiled()
def _add(x: Array, y: Array, z: Array, w: int) -> None:
    for i in range(w):
        z[i] = x[i] + y[i]


@compiled()
def _sub(x: Array, y: Array, z: Array, w: int) -> None:
    for i in range(w):
        z[i] = x[i] - y[i]


@compiled()
def _mul(x: Array, y: Array, z: Array, w: int) -> None:
    for i in range(w):
        z[i] = x[i] * y[i]


@compiled()
def _div(x: Array, y: Array, z: Array, w: int) -> None:
    for i in range(w):
        z[i] = x[i] / y[i]


@compiled()
def _least(x: Array, y: Array, z: Array, w: int) -> None:
    for i in range(w):
        z[i] = x[i] if x[i] < y[i] or x[i] != x[i] else y[i]


@compiled()
def _most(x: Array, y: Array, z: Array, w: int) -> None:
    for i in range(w):
        z[i] = x[i] if x[i] > y[i] or x[i] != x[i] else y[i]


@compiled()
def _abs(x: Array, z: Array, w: int) -> None:
    for i in range(w):
        z[i] = abs(x[i])


@compiled()
def _sign(x: Array, z: Array, w: int) -> None:
    for i in range(w):
        z[i] = np.float32(x[i] > 0) - np.float32(x[i] < 0)


@compiled()
def _sqrt(x: Array, z: Array, w: int) -> None:
    for i in range(w):
        z[i] = np.sqrt(x[i])


@compiled()
def _shrink(x: Array, y: Array, z: Array, w: int) -> None:
    for i in range(w):
        z[i] = np.float32(0) if x[i] >= -y[i] and x[i] <= y[i] else x[i]


@compiled()
def _greater(x: Array, y: Array, z: Array, w: int) -> None:
    for i in range(w):
        z[i] = np.float32(x[i] > y[i])


@compiled()
def _at_least(x: Array, y: Array, z: Array, w: int) -> None:
    for i in range(w):
        z[i] = np.float32(x[i] >= y[i])


@compiled()
def _equal(x: Array, y: Array, z: Array, w: int) -> None:
    for i in range(w):
        z[i] = np.float32(x[i] == y[i])


@compiled()
def _where(x: Array, y: Array, y2: Array, z: Array, w: int) -> None:
    for i in range(w):
        z[i] = y[i] if x[i] != 0 else y2[i]


# All of them ---------------------------------------------------------------------------------------------------------


@compiled("int64(int64[:, ::1], float32[:, ::1], uint8[::1], uint8[::1], int64[:, ::1], int64)")
def play(code: Array, registers: Array, data: Array, out: Array, files: Array, n: int) -> int:
    """Run the steps of `code` over `n` entries.

    Args:
        code: int64 [steps, 5]: the operation, the register it writes, and the registers that it reads. Of loads and
            stores these are the first byte in `data` or `out`, and (loads) whether that begins anew with each strip.
        registers: float32 [count, WIDTH]; those that no step writes hold constants.
        data: bytes of all inputs; of those in files, of one strip.
        out: bytes of all outputs.
        files: int64 [count, 4]: an open file, the first byte in it, the bytes of an entry, and where in `data` a strip
            of it goes.
        n: entries of a plane.

    Returns:
        SOUND, or what was found of: an entry that was asked to be finite and is not, a file that ends too early.
    """
    sound = True
    for begin in range(0, n, STRIP):
        end = min(begin + STRIP, n)
        for i in range(files.shape[0]):
            file, start, size, a = files[i, 0], files[i, 1], files[i, 2], files[i, 3]
            if not _read(file, data[a : a + size * (end - begin)], start + size * begin):
                return UNREADABLE
        for at in range(begin, end, WIDTH):
            sound &= _play(code, registers, data, out, begin, at, min(WIDTH, end - at))
    return SOUND if sound else NOT_FINITE
