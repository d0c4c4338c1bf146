"""Tapes: chains of single steps over the entries of a block, played by the machine.

A *plane* is one value for each entry of a block: the base has one, task vectors have T. A tape loads the planes of its
inputs into registers, works on them step by step, and stores those that come out. A `Recorder` makes it.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from calmerge import _machine as machine
from calmerge._watch import Array, Fill, Stored, watching

LOADS = {
    torch.bfloat16: (machine.LOAD_BF16, 2), torch.float32: (machine.LOAD_F32, 4),
    torch.uint8: (machine.LOAD_U8, 1), torch.bool: (machine.LOAD_U8, 1),
}  # fmt: skip
"""By stored type of an input, the step that loads it and the bytes of an entry."""
_STORES = {torch.bfloat16: (machine.STORE_BF16, 2), torch.float32: (machine.STORE_F32, 4)}
_LOADING, _STORING = {op for op, _ in LOADS.values()}, {op for op, _ in _STORES.values()}
_COPYING = _LOADING | {machine.ROUND_BF16}
_ALIGN = 64


class Output(NamedTuple):
    """Planes that are asked for: their values, how they are arranged, and the type they get."""

    values: tuple[int, ...]
    prefix: tuple[int, ...]
    dtype: torch.dtype


class Step(NamedTuple):
    """One operation: the value it makes, and those it is made from."""

    op: int
    to: int
    a: int = 0
    b: int = 0
    d: int = 0


class Input(NamedTuple):
    """What a tape loads: how it is filled, its stored type, how many planes it has, and whether it was computed."""

    fill: Fill
    dtype: torch.dtype
    planes: int = 1
    made: bool = False

    def size(self, n: int) -> int:
        """Bytes of all planes of `n` entries each."""
        return n * self.planes * LOADS[self.dtype][1]


class _Layout(NamedTuple):
    """The steps as the machine wants them for blocks of one size, and where inputs and planes lie then."""

    code: Array
    starts: list[int]
    ends: list[int]


@dataclass
class Tape:
    """Steps over planes, ready to be played.

    Args:
        steps: in order; loads name the number of an input and of its plane, stores the number of a plane that comes
            out.
        constants: what the first registers hold.
        registers: how many are needed in all.
        inputs: what is loaded.
        outputs: what comes out.
    """

    steps: list[Step]
    constants: Array
    registers: int
    inputs: list[Input]
    outputs: list[Output]
    _layouts: dict[int, _Layout] = field(default_factory=dict)

    @property
    def streams(self) -> bool:
        """Whether nothing that is loaded has to be computed first, so that little is held, whatever the block."""
        return not any(one.made for one in self.inputs)

    @contextmanager
    def opened(self) -> Iterator[list[int]]:
        """The files of its inputs, open."""
        handles: list[int] = []
        try:
            handles += [one.fill.open() for one in self.inputs if isinstance(one.fill, Stored)]
            yield handles
        finally:
            for handle in handles:
                os.close(handle)

    def play(self, shape: tuple[int, ...], rows: slice, offset: int, handles: Sequence[int]) -> list[Tensor] | None:
        """Every output for some rows of a tensor; None where an input was not finite or could not be read.

        Args:
            shape: that these rows have.
            rows: of the tensor.
            offset: the index of the first entry.
            handles: as from `opened`.
        """
        n = torch.Size(shape).numel()
        code, starts, ends = self._layout(n)
        with _lent("buffers", starts[-1], np.uint8) as data:
            files: list[tuple[int, int, int, int]] = []
            for one, start in zip(self.inputs, starts, strict=False):
                if isinstance(one.fill, Stored):
                    files.append((handles[len(files)], one.fill.first(rows), LOADS[one.dtype][1], start))
                else:
                    one.fill(rows, offset, data[start : start + one.size(n)])
            out = np.empty(ends[-1], np.uint8)
            with _lent("registers", self.registers * machine.WIDTH, np.float32) as room:
                registers = room[: self.registers * machine.WIDTH].reshape(self.registers, machine.WIDTH)
                registers[: len(self.constants)] = self.constants[:, None]
                places = np.array(files, np.int64).reshape(-1, 4)
                if machine.play(code, registers, data, out, places, n) != machine.SOUND:
                    return None
        bytes_out = torch.from_numpy(out)
        found, at = [], 0
        for output in self.outputs:
            stored = output.dtype if output.dtype in _STORES else torch.float32
            end = at + len(output.values)
            planes = bytes_out[ends[at] : ends[at] + len(output.values) * n * stored.itemsize]
            found.append(planes.view(stored).view(*output.prefix, *shape).to(output.dtype))
            at = end
        return found

    def _layout(self, n: int) -> _Layout:
        """For blocks of `n` entries; of inputs in files a strip is held."""
        if n not in self._layouts:
            starts, ends = [0], [0]
            for one in self.inputs:
                held = min(n, machine.STRIP) if isinstance(one.fill, Stored) else n
                starts.append(starts[-1] + -(-one.size(held) // _ALIGN) * _ALIGN)
            for output in self.outputs:
                # planes of one output lie side by side
                ends += [ends[-1] + (i + 1) * n * _store(output)[1] for i in range(len(output.values))]
                ends[-1] = -(-ends[-1] // _ALIGN) * _ALIGN
            code = np.array(self.steps, dtype=np.int64).reshape(-1, 5)
            for step in code:
                if step[0] in _LOADING:
                    one = self.inputs[step[2]]
                    step[2] = starts[step[2]] + step[3] * n * LOADS[one.dtype][1]
                    step[3] = isinstance(one.fill, Stored)
                elif step[0] in _STORING:
                    step[2] = ends[step[2]]
            self._layouts[n] = _Layout(code, starts, ends)
        return self._layouts[n]


def _store(output: Output) -> tuple[int, int]:
    return _STORES.get(output.dtype, _STORES[torch.float32])


@contextmanager
def _lent(kind: str, size: int, dtype: type) -> Iterator[Array]:
    """Room for at least `size` numbers that this thread had before, if nobody has it now, as a tape inside a tape."""
    spare: list[Array] = vars(watching).setdefault(kind, [])
    room = spare.pop() if spare else np.zeros(0, dtype)
    if len(room) < size:
        room = np.zeros(size, dtype)
    try:
        yield room
    finally:
        spare.append(room)


def assembled(
    steps: Sequence[Step], constants: Mapping[bytes, int], inputs: Sequence[Input], outputs: Sequence[Output]
) -> Tape | None:  # fmt: skip
    """The tape with what nobody uses left out, and with registers used again once their value is done with.

    None where nothing is done to what is loaded from storage: copying is not for a machine of numbers, which knows one
    NaN only.

    Args:
        steps: in order; a load names the number of its input, and of the plane.
        constants: which value each number is, by its bytes as a float.
        inputs: what may be loaded.
        outputs: what comes out.
    """
    stores = []
    for output in outputs:
        op = _STORES.get(output.dtype, _STORES[torch.float32])[0]
        stores += [(op, value) for value in output.values]
    used = {value for _, value in stores}
    needed: list[Step] = []
    for step in reversed(steps):
        if step.op == machine.FINITE or step.to in used:
            needed.append(step)
            used |= set(_reads(step))
    needed.reverse()
    loaded = list(dict.fromkeys(step.a for step in needed if step.op in _LOADING))
    if all(step.op in _COPYING for step in needed) and not any(inputs[i].made for i in loaded):
        return None
    register = {value: i for i, value in enumerate(constants.values())}
    pinned = set(register)
    final = [Step(op, value, i) for i, (op, value) in enumerate(stores)]
    last: dict[int, int] = {}
    for i, step in enumerate([*needed, *final]):
        for value in (step.to,) if i >= len(needed) else _reads(step):
            last[value] = i
    free: list[int] = []
    count = len(constants)
    laid: list[Step] = []
    for i, step in enumerate(needed):
        reads = [register[value] for value in _reads(step)]
        done = [register[v] for v in set(_reads(step)) if last[v] == i and v not in pinned]
        if step.op == machine.FINITE:
            laid.append(Step(step.op, reads[0]))
            free += done
            continue
        if free:
            to = free.pop()
        else:
            to, count = count, count + 1
        register[step.to] = to
        free += done  # not before: a loop that writes where it reads is not made a vector loop
        if step.op in _LOADING:
            laid.append(Step(step.op, to, loaded.index(step.a), step.b))
        else:
            laid.append(Step(step.op, to, *reads))
    laid += [Step(op, register[value], i) for op, value, i, *_ in final]
    values = np.frombuffer(b"".join(constants), np.float32)
    return Tape(laid, values, count, [inputs[i] for i in loaded], list(outputs))


_OPERANDS = {
    machine.ABS: 1, machine.SIGN: 1, machine.SQRT: 1, machine.ROUND_BF16: 1, machine.FINITE: 1, machine.WHERE: 3,
}  # fmt: skip


def _reads(step: Step) -> tuple[int, ...]:
    """The values that a step is made from."""
    if step.op in _LOADING:
        return ()
    return (step.a, step.b, step.d)[: _OPERANDS.get(step.op, 2)]
