"""Tapes: chains of single steps over the entries of a block, played by the machine.

A *plane* is one value for each entry of a block: the base has one, task vectors have T. A tape loads the planes of its
inputs, works on them step by step, and stores those that come out. A `Recorder` makes it.
"""

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from calmerge import _machine as machine
from calmerge._compiled import ByStrips
from calmerge._machine import Step
from calmerge._watch import Array, Fill, Stored, watching
from calmerge._weights import Number, Site

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


class Input(NamedTuple):
    """What a tape loads: how it is filled, its stored type, how many planes it has, and whether it was computed."""

    fill: Fill
    dtype: torch.dtype
    planes: int = 1
    made: bool = False

    def size(self, n: int) -> int:
        """Bytes of all planes of `n` entries each."""
        return n * self.planes * LOADS[self.dtype][1]


class Handed(NamedTuple):
    """A constant that is an element of a node's number."""

    node: Number
    element: int


class _Layout(NamedTuple):
    """Where inputs and outputs lie for blocks of one size: first bytes, with the end of all as the last one.

    And for each plane that is loaded the number of its input, and the bytes of the planes before it.
    """

    starts: list[int]
    planes: list[tuple[int, int]]
    ends: list[int]


@dataclass
class Tape:
    """Steps over planes, ready to be played.

    Args:
        play_all: the steps, compiled.
        constants: that they work with, float32.
        handed: where among them numbers of nodes stand, which differ from tensor to tensor.
        inputs: what is loaded.
        loads: number of the input and of its plane, for each value that is loaded.
        outputs: what comes out.
    """

    play_all: machine.Player
    constants: Array
    handed: Mapping[int, Handed]
    inputs: list[Input]
    loads: list[tuple[int, int]]
    outputs: list[Output]
    _layouts: dict[int, _Layout] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._numbers_at = self.constants.ctypes.data

    @property
    def streams(self) -> bool:
        """Whether nothing that is loaded has to be computed first, so that little is held, whatever the block."""
        return not any(one.made for one in self.inputs)

    def of(self, name: str) -> "Tape":
        """The tape of another tensor that is treated alike."""
        inputs = [one._replace(fill=one.fill.of(name)) for one in self.inputs]
        return replace(self, inputs=inputs, constants=_numbers(self.constants, self.handed, name))

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
        n = math.prod(shape)
        ends, out = self._layout(n).ends, np.empty(self._layout(n).ends[-1], np.uint8)
        to = out.ctypes.data
        with self._filled(n, rows, offset, handles, [to + end for end in ends[:-1]]) as tables:
            sound = self.play_all(*tables[:3], 0, n, *tables[3:]) == machine.SOUND
        return self._planes(out, shape, ends) if sound else None

    @property
    def stored(self) -> bool:
        """Whether all that is loaded lies in files."""
        return all(isinstance(one.fill, Stored) for one in self.inputs)

    @property
    def wide(self) -> bool:
        """Whether all that comes out is float32."""
        return all(output.dtype == torch.float32 for output in self.outputs)

    def by_strips(self, fn: ByStrips, ends: Array, rows: slice, offset: int, handles: Sequence[int]) -> Any:
        """What a compiled loop makes of some rows, which it has come strip after strip, in cache.

        Only where all that comes out is float32. Arguments as for `play`, but for the ends of the blocks in these rows.
        """
        count = sum(len(output.values) for output in self.outputs)
        with _lent(4 * count * machine.STRIP) as (room, to):
            planes = room[: 4 * count * machine.STRIP].view(np.float32).reshape(count, machine.STRIP)
            places = [to + 4 * i * machine.STRIP for i in range(count)]
            with self._filled(int(ends[-1]), rows, offset, handles, places) as tables:
                return fn((self.play_all.address, *tables), planes, ends, offset)

    @contextmanager
    def _filled(
        self, n: int, rows: slice, offset: int, handles: Sequence[int], to: Sequence[int]
    ) -> Iterator[tuple[int, int, int, int, int]]:
        """What a player is called with, but for where it begins and ends: every input is there, or a file for it.

        Args:
            n: entries.
            rows: of the tensor.
            offset: the index of the first entry.
            handles: as from `opened`.
            to: addresses of what comes out.
        """
        layout = self._layout(n)
        with _lent(layout.starts[-1]) as (room, address):
            places, firsts, made = [address + start for start in layout.starts], [], []
            for i, (one, start) in enumerate(zip(self.inputs, layout.starts, strict=False)):
                if isinstance(one.fill, Stored):
                    firsts.append(one.fill.first(rows))
                else:
                    made.append(one.fill(rows, offset, room[start : start + (0 if one.made else one.size(n))]))
                    places[i] = made[-1].ctypes.data
            read = [places[i] + before for i, before in layout.planes]
            table = np.array([*read, *to, *handles, *firsts], np.int64)
            inputs = table.ctypes.data
            outputs = inputs + 8 * len(read)
            files = outputs + 8 * len(to)
            yield inputs, outputs, self._numbers_at, files, files + 8 * len(handles)

    def _planes(self, out: Array, shape: tuple[int, ...], ends: Sequence[int]) -> list[Tensor]:
        """The bytes that came out as tensors; by NumPy, since every call of torch lets go of Python's lock."""
        n, found, at = math.prod(shape), [], 0
        for output in self.outputs:
            size = _store(output)[1]
            planes = out[ends[at] : ends[at] + len(output.values) * n * size]
            arranged = planes.view(np.float32 if size == 4 else np.int16).reshape(*output.prefix, *shape)
            made = torch.from_numpy(arranged)
            if made.dtype != output.dtype:
                made = made.view(output.dtype) if size == output.dtype.itemsize else made.to(output.dtype)
            found.append(made)
            at += len(output.values)
        return found

    def _layout(self, n: int) -> _Layout:
        """For blocks of `n` entries; of inputs in files a strip is held, planes of one output lie side by side."""
        if n not in self._layouts:
            starts, ends = [0], [0]
            for one in self.inputs:
                held = 0 if one.made else min(n, machine.STRIP) if isinstance(one.fill, Stored) else n
                starts.append(starts[-1] + -(-one.size(held) // _ALIGN) * _ALIGN)
            for output in self.outputs:
                ends += [ends[-1] + (i + 1) * n * _store(output)[1] for i in range(len(output.values))]
                ends[-1] = -(-ends[-1] // _ALIGN) * _ALIGN
            planes = [(i, plane * n * LOADS[self.inputs[i].dtype][1]) for i, plane in self.loads]
            self._layouts[n] = _Layout(starts, planes, ends)
        return self._layouts[n]


def _store(output: Output) -> tuple[int, int]:
    return _STORES.get(output.dtype, _STORES[torch.float32])


@contextmanager
def _lent(size: int) -> Iterator[tuple[Array, int]]:
    """At least so many bytes that this thread had before, if nobody has them now, as a tape inside of a tape would.

    With their address.
    """
    spare: list[tuple[Array, int]] = vars(watching).setdefault("buffers", [])
    lent = spare.pop() if spare else None
    if lent is None or len(lent[0]) < size:
        room = np.zeros(size, np.uint8)
        lent = room, room.ctypes.data
    try:
        yield lent
    finally:
        spare.append(lent)


def _numbers(constants: Array, handed: Mapping[int, Handed], name: str) -> Array:
    """Constants with the numbers of a tensor in their places."""
    own = constants.copy() if handed else constants
    for i, (node, element) in handed.items():
        own[i] = node.at(Site(name, 0)).detach().reshape(-1)[element].item()
    return own


def assembled(
    steps: Sequence[Step], constants: Mapping[bytes | Handed, int], inputs: Sequence[Input], outputs: Sequence[Output],
    name: str,
) -> Tape | None:  # fmt: skip
    """The tape with what nobody uses left out.

    None where nothing is done to what is loaded from storage: copying is not for a machine of numbers, which knows one
    NaN only.

    Args:
        steps: in order; a load names the number of its input, and of the plane.
        constants: which value each number is, by its bytes as a float, or the node that it comes from.
        inputs: what may be loaded.
        outputs: what comes out.
        name: of the tensor.
    """
    stores = []
    rounds = {step.to: step.a for step in steps if step.op == machine.ROUND_BF16}
    for output in outputs:
        op = _STORES.get(output.dtype, _STORES[torch.float32])[0]
        once = rounds if op == machine.STORE_BF16 else {}  # to store rounds
        stores += [(op, once.get(value, value)) for value in output.values]
    used = {value for _, value in stores}
    needed: list[Step] = []
    for step in reversed(steps):
        if step.op == machine.FINITE or step.to in used:
            needed.append(step)
            used |= set(_reads(step))
    needed.reverse()
    loading = [step for step in needed if step.op in _LOADING]
    used_inputs = list(dict.fromkeys(step.a for step in loading))
    if all(step.op in _COPYING for step in needed) and not any(inputs[i].made for i in used_inputs):
        return None
    # numbered anew, so that tensors which are treated alike have one program: loads, constants, what steps make
    rest = [step for step in needed if step.op not in _LOADING]
    made = [step.to for step in rest if step.op != machine.FINITE]
    known = [value for value in constants.values() if value in used]
    number = {value: i for i, value in enumerate([*(step.to for step in loading), *known, *made])}
    renamed = [
        Step(step.op, number.get(step.to, 0), *(number[value] for value in _reads(step))) for step in rest
    ]  # fmt: skip
    loads = [
        machine.Load(step.op, LOADS[inputs[step.a].dtype][1] if isinstance(inputs[step.a].fill, Stored) else 0)
        for step in loading
    ]
    values = {value: constant for constant, value in constants.items()}
    numbers = [values[value] for value in known]
    finite = tuple(isinstance(one, bytes) and bool(np.isfinite(np.frombuffer(one, np.float32)[0])) for one in numbers)
    stored = tuple((op, number[value]) for op, value in stores)
    program = machine.player(tuple(loads), finite, tuple(renamed), stored)
    fixed = b"".join(b"\0\0\0\0" if isinstance(one, Handed) else one for one in numbers)
    handed = {i: one for i, one in enumerate(numbers) if isinstance(one, Handed)}
    return Tape(
        program,
        _numbers(np.frombuffer(fixed, np.float32), handed, name),
        handed,
        [inputs[i] for i in used_inputs],
        [(used_inputs.index(step.a), step.b) for step in loading],
        list(outputs),
    )


_OPERANDS = {
    machine.ABS: 1, machine.SIGN: 1, machine.SQRT: 1, machine.ROUND_BF16: 1, machine.FINITE: 1, machine.WHERE: 3,
}  # fmt: skip


def _reads(step: Step) -> tuple[int, ...]:
    """The values that a step is made from."""
    if step.op in _LOADING:
        return ()
    return (step.a, step.b, step.d)[: _OPERANDS.get(step.op, 2)]
