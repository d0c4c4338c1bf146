"""Taking down on a tape what a chain of torch operations does to every entry of a block.

Pieces are written in torch. A `Recorder` watches one of them work on a few rows of a tensor and takes down each single
step; the tape is then played over all blocks of that tensor, where steps follow each other in the processor's cache.
What cannot be taken down, because an entry's result depends on other entries or an operation is not known here, is left
to torch; the results are the same to the bit, so that this only decides how long it takes.

Planes are told by where they lie in memory, so that views and operations in place need no care.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from calmerge import _machine as machine
from calmerge._machine import Step
from calmerge._tape import LOADS, Handed, Input, Output, Tape, assembled
from calmerge._watch import Array, Fill, watching
from calmerge._weights import Number, Site

_UNSET = -1  # the value of memory that was reserved and not yet written
_FLAGS = (torch.bool, torch.uint8)


class Unrecordable(Exception):
    """Something that a tape cannot say."""


class _Watched(Site):
    """A site that knows whether it was looked at."""

    seen: bool

    def __new__(cls, site: Site) -> "_Watched":
        made = super().__new__(cls, *site)
        made.seen = False
        return made

    def __getattribute__(self, name: str) -> Any:
        if name not in ("seen", "__class__"):
            object.__setattr__(self, "seen", True)
        return object.__getattribute__(self, name)

    def __iter__(self) -> Iterator[Any]:
        self.seen = True
        return super().__iter__()

    def __getitem__(self, index: Any) -> Any:
        self.seen = True
        return super().__getitem__(index)

    def __eq__(self, other: object) -> bool:
        self.seen = True
        return super().__eq__(other)

    def __hash__(self) -> int:
        self.seen = True
        return super().__hash__()


class Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Takes down what is done to the planes of a block while it is entered.

    Args:
        n: entries of the rows that are looked at; large enough that nothing else has as many.
        offset: the index of the first entry of these rows, which tells whether inputs are read at the same place.

    Attributes:
        particular: whether something looked at which tensor this is, or where in it, so that no other is like it.
    """

    def __init__(self, n: int, offset: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._n, self._offset = n, offset
        self._values: dict[int, tuple[int, torch.dtype]] = {}  # by address: the value that lies there, and its type
        self._steps: list[Step] = []
        self._constants: dict[bytes | Handed, int] = {}
        self._handed: dict[int, Handed] = {}  # by address
        self._inputs: list[Input] = []
        self._read: set[int] = set()  # values that are inputs
        self._unrounded: set[int] = set()
        self._count = 0
        self._kept: list[object] = []  # so that no address is used twice
        self._paused = False
        self.particular = False

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Nothing is compiled under a recorder; torch would import its compiler to see to that, for a second."""
        return False

    def __enter__(self) -> "Recorder":
        watching.recorder = self
        return super().__enter__()  # type: ignore[no-any-return, no-untyped-call]

    def __exit__(self, *exception: Any) -> None:
        watching.recorder = None
        super().__exit__(*exception)  # type: ignore[no-untyped-call]

    def leaf(self, tensor: Tensor, offset: int, fill: Fill) -> None:
        """Note an input."""
        self._load(tensor, offset, fill)

    def computed(self, fn: Callable[[Site], Tensor], site: Site, again: Callable[[], Fill]) -> Tensor:
        """What `fn` makes; where that cannot be taken down, it becomes an input."""
        before, watched = len(self._steps), _Watched(site)
        try:
            made = fn(watched)
            self._planes(made, self._suffix(made))
            self.particular |= watched.seen
            return made
        except Unrecordable:  # what was taken down is left out where nobody asks for it, but for this
            self._steps[before:] = [step for step in self._steps[before:] if step.op != machine.FINITE]
        with self._looking_away():
            made = fn(site).contiguous()
        if not self._load(made, site.offset, again(), made=True):
            raise Unrecordable("a computation that does not give planes")
        return made

    def _load(self, tensor: Tensor, offset: int, fill: Fill, *, made: bool = False) -> bool:
        """Note the planes of an input, if that is what they are."""
        self._kept.append(tensor)
        if self._values.get(tensor.data_ptr(), (_UNSET, None))[0] in self._read:
            return True
        count = tensor.numel() // self._n
        if offset != self._offset or tensor.numel() != count * self._n or not count or tensor.dtype not in LOADS:
            return False
        if not tensor.is_contiguous():
            return False
        for i in range(count):
            value = self._new(LOADS[tensor.dtype][0], len(self._inputs), i)
            self._read.add(value)
            self._values[tensor.data_ptr() + i * self._n * tensor.itemsize] = value, tensor.dtype
        self._inputs.append(Input(fill, tensor.dtype, count, made))
        return True

    def hand(self, node: Number, number: Tensor) -> None:
        """Note a number that may have any value."""
        self._kept.append(number)
        self._hand(number, [Handed(node, i) for i in range(number.numel())])

    def _hand(self, number: Tensor, what: Sequence["Handed"]) -> None:
        if number.is_contiguous():
            for i, one in enumerate(what):
                self._handed[number.data_ptr() + i * number.itemsize] = one

    def _told(self, number: Tensor) -> "list[Handed] | None":
        """What was handed to computations as this tensor."""
        found = [self._handed.get(number.data_ptr() + i * number.itemsize) for i in range(number.numel())]
        return [one for one in found if one] if number.is_contiguous() and all(found) else None

    @contextmanager
    def _looking_away(self) -> Iterator[None]:
        self._paused, watching.recorder = True, None
        try:
            yield
        finally:
            self._paused, watching.recorder = False, self

    def refuse(self) -> None:
        """Make no tape."""
        raise Unrecordable("other rows")

    def finite(self, tensor: Tensor) -> bool:
        """Have it checked that all entries are finite; whether those at hand are."""
        for value in self._planes(tensor, self._suffix(tensor)).flat:
            self._steps.append(Step(machine.FINITE, _UNSET, int(value)))
        with self._looking_away():
            return bool(np.isfinite(tensor.numpy().sum()))

    def tape(self, results: Sequence[Tensor], name: str) -> Tape | None:
        """The tape that makes `results`, blocks of the tensor `name`; None where it would only copy.

        Raises:
            Unrecordable: they are not planes.
        """
        outputs = []
        for result in results:
            planes = self._planes(result, self._suffix(result))
            if not result.is_floating_point():
                raise Unrecordable(str(result.dtype))
            outputs.append(Output(tuple(planes.flat), planes.shape, result.dtype))
        with self._looking_away():
            return assembled(self._steps, self._constants, self._inputs, outputs, name)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not self._paused:
            self._kept.append(result)
            self._take_down(func, args, kwargs or {}, result)
        return result

    def _take_down(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        name = _name(func)
        if name in _VIEWS:
            return
        if name in _RESERVED or name in _FILLED:
            if isinstance(result, Tensor) and result.numel() and result.numel() % self._n == 0:
                self._reserve(result, _FILLED[name](args) if name in _FILLED else None)
            return
        tensors = [x for x in _flat(args) if isinstance(x, Tensor)]
        if not any(map(self._known, tensors)):  # of numbers
            if self._handed and any(x.data_ptr() in self._handed for x in tensors):
                self._of_handed(name, tensors, result)
            return
        if isinstance(result, Tensor) and result.device.type != "cpu":
            raise Unrecordable("another device")
        if name not in _RULES or not isinstance(result, Tensor):
            raise Unrecordable(str(func))
        try:
            _RULES[name](self, args, kwargs, result)
        except (ValueError, TypeError, IndexError) as e:  # operands of a form that a rule does not know
            raise Unrecordable(f"{func}: {e}") from None

    def _of_handed(self, name: str, tensors: Sequence[Tensor], result: Any) -> None:
        """Follow numbers into another type; what else is made of them would be that of this tensor alone."""
        told = self._told(tensors[0])
        if name in ("_to_copy", "clone") and told and isinstance(result, Tensor):
            self._hand(result, told)
        else:
            self.particular = True

    def _reserve(self, result: Tensor, value: float | None) -> None:
        for i in range(result.numel() // self._n):
            at = result.data_ptr() + i * self._n * result.itemsize
            self._values[at] = (_UNSET if value is None else self._constant(value)), result.dtype

    def _known(self, x: Tensor) -> bool:
        return x.data_ptr() in self._values and x.numel() >= self._n

    def _suffix(self, *operands: Any) -> int:
        """How many of the last dimensions make up a block."""
        for x in operands:
            if isinstance(x, Tensor) and self._known(x):
                size, dims = 1, 0
                while size < self._n and dims < x.dim():
                    dims += 1
                    size *= x.shape[-dims]
                if size == self._n:
                    return dims
        raise Unrecordable("planes of another size")

    def _planes(self, x: Any, suffix: int) -> Array:
        """The values of an operand, arranged as its dimensions before the block are."""
        if not isinstance(x, Tensor):
            return np.array(self._constant(float(x)))
        if self._known(x):
            if not x.is_contiguous() or torch.Size(x.shape[x.dim() - suffix :]).numel() != self._n:
                raise Unrecordable("not contiguous")
            found = []
            for i in range(x.numel() // self._n):
                value, dtype = self._values.get(x.data_ptr() + i * self._n * x.itemsize, (_UNSET, x.dtype))
                if value == _UNSET or (dtype != x.dtype and not {dtype, x.dtype} <= set(_FLAGS)):
                    raise Unrecordable("memory of another kind")
                found.append(value)
            return np.array(found).reshape(x.shape[: x.dim() - suffix])
        inner = x.shape[max(0, x.dim() - suffix) :]
        if torch.Size(inner).numel() != 1 or x.dtype not in (torch.float32, torch.float64, *_FLAGS, torch.int64):
            raise Unrecordable("an unknown tensor")
        told = self._told(x) if self._handed else None
        if told:
            return np.array([self._named(one) for one in told]).reshape(x.shape[: max(0, x.dim() - suffix)])
        with torch.no_grad():
            numbers = x.detach().reshape(-1).tolist()
        return np.array([self._constant(float(v)) for v in numbers]).reshape(x.shape[: max(0, x.dim() - suffix)])

    def _constant(self, number: float) -> int:
        return self._named(np.float32(number).tobytes())

    def _named(self, constant: bytes | Handed) -> int:
        if constant not in self._constants:
            self._constants[constant] = self._count
            self._count += 1
        return self._constants[constant]

    def _new(self, op: int, a: int, b: int = 0, d: int = 0) -> int:
        self._steps.append(Step(op, self._count, a, b, d))
        self._count += 1
        return self._count - 1

    def _put(self, result: Tensor, planes: Array, *, late: bool = False) -> None:
        """Note that `result` holds these values."""
        if not result.is_contiguous() or result.numel() != planes.size * self._n:
            raise Unrecordable("a result of another shape")
        for i, value in enumerate(planes.flat):
            self._values[result.data_ptr() + i * self._n * result.itemsize] = int(value), result.dtype
            if late:
                self._unrounded.add(int(value))

    def step(self, op: int, result: Tensor, *operands: Any) -> None:
        """Take down one operation between planes, broadcast as torch does."""
        if result.dtype not in (torch.float32, torch.bool):
            raise Unrecordable(f"arithmetic in {result.dtype}")
        self._put(result, self.over(op, self._suffix(*operands), *operands))

    def over(self, op: int, suffix: int, *operands: Any) -> Array:
        """The values that `op` makes of operands, which are tensors, numbers, or values already."""
        arrays = [x if isinstance(x, np.ndarray) else self._planes(x, suffix) for x in operands]
        if self._unrounded and any(int(v) in self._unrounded for a in arrays for v in a.flat):
            raise Unrecordable("arithmetic after rounding")
        shape = max((a.shape for a in arrays), key=lambda s: (len(s), s))
        if any(a.shape != shape and a.size > 1 for a in arrays):
            shape = np.broadcast_shapes(*(a.shape for a in arrays))
            arrays = [np.broadcast_to(a, shape) for a in arrays]
        n = math.prod(shape)
        lists = [a.ravel().tolist() * (n if a.size == 1 else 1) for a in arrays]
        found = [self._new(op, *values) for values in zip(*lists, strict=True)]
        return np.array(found).reshape(shape)


# What torch's operations are to a tape ------------------------------------------------------------------------------

Rule = Callable[[Recorder, tuple[Any, ...], dict[str, Any], Tensor], None]
_RESERVED = {"empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided"}
_FILLED: dict[str, Callable[[tuple[Any, ...]], float]] = {
    "zeros": lambda args: 0.0, "zeros_like": lambda args: 0.0, "new_zeros": lambda args: 0.0,
    "ones": lambda args: 1.0, "ones_like": lambda args: 1.0, "new_ones": lambda args: 1.0,
    "full": lambda args: float(args[1]), "full_like": lambda args: float(args[1]),
}  # fmt: skip
_VIEWS = {
    "view", "select", "slice", "unsqueeze", "squeeze", "detach", "alias", "_unsafe_view", "expand", "split", "unbind",
    "flatten", "reshape",
}  # fmt: skip


def _binary(op: int, *, swapped: bool = False) -> Rule:
    def rule(recorder: Recorder, args: tuple[Any, ...], kwargs: dict[str, Any], result: Tensor) -> None:
        if kwargs.get("alpha", 1) != 1 or len(args) > 2 or kwargs.get("rounding_mode") is not None:
            raise Unrecordable("a scaled sum")
        x, y = args[:2]
        recorder.step(op, result, *((y, x) if swapped else (x, y)))

    return rule


def _unary(op: int) -> Rule:
    return lambda recorder, args, kwargs, result: recorder.step(op, result, args[0])


def _not(op: int) -> Rule:
    """1 less what `op` makes."""

    def rule(recorder: Recorder, args: tuple[Any, ...], kwargs: dict[str, Any], result: Tensor) -> None:
        suffix = recorder._suffix(*args)
        recorder._put(result, recorder.over(machine.SUB, suffix, 1.0, recorder.over(op, suffix, *args[:2])))

    return rule


def _flags(op: int) -> Rule:
    """An operation of logic, between booleans."""

    def rule(recorder: Recorder, args: tuple[Any, ...], kwargs: dict[str, Any], result: Tensor) -> None:
        if any(isinstance(x, Tensor) and x.dtype != torch.bool for x in args):
            raise Unrecordable("logic of numbers")
        recorder.step(op, result, *args)

    return rule


def _opposite(recorder: Recorder, args: tuple[Any, ...], kwargs: dict[str, Any], result: Tensor) -> None:
    if args[0].dtype != torch.bool:
        raise Unrecordable("logic of numbers")
    recorder.step(machine.SUB, result, 1.0, args[0])


def _clamp(recorder: Recorder, args: tuple[Any, ...], kwargs: dict[str, Any], result: Tensor) -> None:
    low = args[1] if len(args) > 1 else kwargs.get("min")
    high = args[2] if len(args) > 2 else kwargs.get("max")
    suffix = recorder._suffix(args[0], low, high)
    found = recorder._planes(args[0], suffix)
    if low is not None:
        found = recorder.over(machine.MOST, suffix, low, found)
    if high is not None:
        found = recorder.over(machine.LEAST, suffix, high, found)
    recorder._put(result, found)


def _power(recorder: Recorder, args: tuple[Any, ...], kwargs: dict[str, Any], result: Tensor) -> None:
    if len(args) > 1 and args[1] != 2:
        raise Unrecordable("a power other than 2")
    recorder.step(machine.MUL, result, args[0], args[0])


def _where(recorder: Recorder, args: tuple[Any, ...], kwargs: dict[str, Any], result: Tensor) -> None:
    recorder.step(machine.WHERE, result, *args)


def _masked_fill(recorder: Recorder, args: tuple[Any, ...], kwargs: dict[str, Any], result: Tensor) -> None:
    recorder.step(machine.WHERE, result, args[1], args[2], args[0])


def _copied(recorder: Recorder, args: tuple[Any, ...], kwargs: dict[str, Any], result: Tensor) -> None:
    """Values in another place, and perhaps of another type."""
    source = args[1] if len(args) > 1 and isinstance(args[1], Tensor) else args[0]
    suffix = recorder._suffix(source)
    planes = recorder._planes(source, suffix)
    before, after = source.dtype, result.dtype
    exact = before == after or (before in (torch.bfloat16, *_FLAGS) and after == torch.float32)
    if before == torch.float32 and after == torch.bfloat16:
        planes = recorder.over(machine.ROUND_BF16, suffix, planes)
    elif before == torch.float32 and after in (torch.float16, torch.float64):
        recorder._put(result, planes, late=True)
        return
    elif not exact and (before, after) != (torch.bool, torch.uint8):
        raise Unrecordable(f"{before} to {after}")
    if any(int(v) in recorder._unrounded for v in planes.flat):
        raise Unrecordable("arithmetic after rounding")
    wanted = result.shape[: result.dim() - suffix]
    recorder._put(result, np.broadcast_to(planes, wanted) if planes.shape != wanted else planes)


def _joined(recorder: Recorder, args: tuple[Any, ...], kwargs: dict[str, Any], result: Tensor) -> None:
    """`stack` and `cat` along the first dimension."""
    dim = args[1] if len(args) > 1 else kwargs.get("dim", 0)
    if dim != 0:
        raise Unrecordable("joined along another dimension")
    suffix = recorder._suffix(*args[0])
    recorder._put(result, np.concatenate([recorder._planes(x, suffix).reshape(-1) for x in args[0]]))


def _extreme(op: int) -> Rule:
    """The largest or smallest over the first dimension, that of tasks."""

    def rule(recorder: Recorder, args: tuple[Any, ...], kwargs: dict[str, Any], result: Tensor) -> None:
        x, dims = args[0], list(args[1]) if len(args) > 1 else []
        planes = recorder._planes(x, recorder._suffix(x))
        if dims not in ([0], [-x.dim()]) or len(args) > 2 or planes.ndim != 1:
            raise Unrecordable("an extreme over entries")
        found = planes[:1]
        for i in range(1, len(planes)):
            found = recorder.over(op, 0, found, planes[i : i + 1])
        recorder._put(result, found)

    return rule


def _filled(recorder: Recorder, args: tuple[Any, ...], kwargs: dict[str, Any], result: Tensor) -> None:
    recorder._reserve(result, float(args[1]) if len(args) > 1 else 0.0)


_RULES: dict[str, Rule] = {
    "add": _binary(machine.ADD), "sub": _binary(machine.SUB), "rsub": _binary(machine.SUB, swapped=True),
    "mul": _binary(machine.MUL), "div": _binary(machine.DIV),
    "maximum": _binary(machine.MOST), "minimum": _binary(machine.LEAST),
    "gt": _binary(machine.GREATER), "lt": _binary(machine.GREATER, swapped=True),
    "ge": _binary(machine.AT_LEAST), "le": _binary(machine.AT_LEAST, swapped=True),
    "bitwise_and": _flags(machine.MUL), "bitwise_or": _flags(machine.MOST),
    "logical_and": _flags(machine.MUL), "logical_or": _flags(machine.MOST),
    "bitwise_not": _opposite, "logical_not": _opposite,
    "eq": _binary(machine.EQUAL), "ne": _not(machine.EQUAL),
    "abs": _unary(machine.ABS), "sign": _unary(machine.SIGN), "sqrt": _unary(machine.SQRT),
    "neg": lambda recorder, args, kwargs, result: recorder.step(machine.MUL, result, args[0], -1.0),
    "reciprocal": lambda recorder, args, kwargs, result: recorder.step(machine.DIV, result, 1.0, args[0]),
    "square": _power, "pow": _power,
    "hardshrink": lambda recorder, args, kwargs, result: recorder.step(
        machine.SHRINK, result, args[0], args[1] if len(args) > 1 else 0.5
    ),
    "clamp": _clamp, "clamp_min": _clamp,
    "where": _where, "masked_fill": _masked_fill,
    "copy": _copied, "_to_copy": _copied, "clone": _copied,
    "stack": _joined, "cat": _joined, "amax": _extreme(machine.MOST), "amin": _extreme(machine.LEAST),
    "fill": _filled, "zero": _filled,
}  # fmt: skip


@cache
def _name(func: Any) -> str:
    return str(func._schema.name.removeprefix("aten::").rstrip("_"))


def _flat(args: Iterable[Any]) -> Iterable[Any]:
    for x in args:
        if isinstance(x, (list, tuple)):
            yield from _flat(x)
        else:
            yield x
