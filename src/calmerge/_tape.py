"""Tapes: chains of single steps over the entries of a block, played by the machine.

A *plane* is one value for each entry of a block: the base has one, task vectors have T. A tape loads the planes of its
inputs into registers, works on them step by step, and stores those that come out. A `Recorder` makes it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from calmerge import _machine as machine
from calmerge._watch import Array, Fill, watching

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


@dataclass
class Tape:
    """Steps over planes, ready to be played.

    Args:
        steps: in order; loads name the number of an input, stores the number of a plane that comes out.
        constants: what the first registers hold.
        registers: how many are needed in all.
        inputs: how each is filled, and its stored type.
        outputs: what comes out.
    """

    steps: list[Step]
    constants: Array
    registers: int
    inputs: list[tuple[Fill, torch.dtype]]
    outputs: list[Output]
    _codes: dict[int, tuple[Array, list[int], list[int]]] = field(default_factory=dict)

    def play(self, shape: tuple[int, ...], rows: slice, offset: int) -> list[Tensor] | None:
        """Every output for some rows of a tensor; None where an input was not finite.

        Args:
            shape: that these rows have.
            rows: of the tensor.
            offset: the index of the first entry.
        """
        n = torch.Size(shape).numel()
        code, starts, ends = self._code(n)
        data = _buffer(starts[-1])
        for (fill, dtype), start in zip(self.inputs, starts, strict=False):
            fill(rows, offset, data[start : start + n * LOADS[dtype][1]])
        registers = _registers(self.registers)
        registers[: len(self.constants)] = self.constants[:, None]
        out = np.empty(ends[-1], np.uint8)
        if not machine.play(code, registers, data, out, n):
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

    def _code(self, n: int) -> tuple[Array, list[int], list[int]]:
        """The steps as the machine wants them for blocks of `n` entries, and where inputs and planes begin."""
        if n not in self._codes:
            starts, ends = [0], [0]
            for _, dtype in self.inputs:
                starts.append(starts[-1] + -(-n * LOADS[dtype][1] // _ALIGN) * _ALIGN)
            for output in self.outputs:
                size = _STORES.get(output.dtype, _STORES[torch.float32])[1]
                # planes of one output lie side by side
                ends += [ends[-1] + (i + 1) * n * size for i in range(len(output.values))]
                ends[-1] = -(-ends[-1] // _ALIGN) * _ALIGN
            code = np.array(self.steps, dtype=np.int64).reshape(-1, 5)
            for step in code:
                if step[0] in _LOADING:
                    step[2] = starts[step[2]]
                elif step[0] in _STORING:
                    step[2] = ends[step[2]]
            self._codes[n] = code, starts, ends
        return self._codes[n]


def _buffer(size: int) -> Array:
    """Room for the inputs of a block, one for each thread."""
    if getattr(watching, "buffer", None) is None or len(watching.buffer) < size:
        watching.buffer = np.empty(size, np.uint8)
    buffer: Array = watching.buffer
    return buffer


def _registers(count: int) -> Array:
    if getattr(watching, "registers", None) is None or len(watching.registers) < count:
        watching.registers = np.zeros((count, machine.WIDTH), np.float32)
    registers: Array = watching.registers
    return registers


def assembled(
    steps: Sequence[Step], constants: Mapping[bytes, int], inputs: Sequence[tuple[Fill, torch.dtype]],
    outputs: Sequence[Output],
) -> Tape | None:  # fmt: skip
    """The tape with what nobody uses left out, and with registers used again once their value is done with.

    None where nothing is done to what is loaded: copying is not for a machine of numbers, which knows one NaN only.

    Args:
        steps: in order; a load names the number of its input.
        constants: which value each number is, by its bytes as a float.
        inputs: how each is filled, and its stored type.
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
    if all(step.op in _COPYING for step in needed):
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
    fills: list[tuple[Fill, torch.dtype]] = []
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
            laid.append(Step(step.op, to, len(fills)))
            fills.append(inputs[step.a])
        else:
            laid.append(Step(step.op, to, *reads))
    laid += [Step(op, register[value], i) for op, value, i, *_ in final]
    return Tape(laid, np.frombuffer(b"".join(constants), np.float32), count, fills, list(outputs))


_OPERANDS = {
    machine.ABS: 1, machine.SIGN: 1, machine.SQRT: 1, machine.ROUND_BF16: 1, machine.FINITE: 1, machine.WHERE: 3,
}  # fmt: skip


def _reads(step: Step) -> tuple[int, ...]:
    """The values that a step is made from."""
    if step.op in _LOADING:
        return ()
    return (step.a, step.b, step.d)[: _OPERANDS.get(step.op, 2)]
