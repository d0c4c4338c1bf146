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
from calmerge._operations import FILLED, FLAGS, RESERVED, RULES, VIEWS, Unrecordable
from calmerge._tape import LOADS, Handed, Input, Output, Tape, assembled
from calmerge._watch import Array, Fill, watching
from calmerge._weights import Number, Site

_UNSET = -1  # the value of memory that was reserved and not yet written


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
        unrounded: values that are stored in a type to which they were not yet rounded.
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
        self.unrounded: set[int] = set()
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

    def computed(
        self, fn: Callable[..., Tensor], values: Callable[[], Sequence[Tensor]], site: Site, again: Callable[[], Fill]
    ) -> Tensor:
        """What `fn` makes; where that cannot be taken down, it becomes an input, which checks what it is made of."""
        before = len(self._steps)
        tensors, watched = values(), _Watched(site)
        try:
            made = fn(*tensors, watched)
            self.planes(made, self.suffix(made))
            self.particular |= watched.seen
            return made
        except Unrecordable:  # what was taken down is left out where nobody asks for it, but for this
            self._steps[before:] = [step for step in self._steps[before:] if step.op != machine.FINITE]
        with self.looking_away():
            made = fn(*tensors, site).contiguous()
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

    def _hand(self, number: Tensor, what: Sequence[Handed]) -> None:
        """Note where the elements of a number lie; those that share a place could not be told apart."""
        self.particular |= not number.is_contiguous()
        for i, one in enumerate(what):
            self._handed[number.data_ptr() + i * number.itemsize] = one

    def _told(self, number: Tensor) -> list[Handed] | None:
        """What was handed to computations as this tensor."""
        found = [self._handed.get(number.data_ptr() + i * number.itemsize) for i in range(number.numel())]
        return [one for one in found if one] if number.is_contiguous() and all(found) else None

    @contextmanager
    def looking_away(self) -> Iterator[None]:
        """Take nothing down."""
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
        for value in self.planes(tensor, self.suffix(tensor)).flat:
            self._steps.append(Step(machine.FINITE, _UNSET, int(value)))
        with self.looking_away():
            return bool(np.isfinite(tensor.numpy().sum()))

    def tape(self, results: Sequence[Tensor], name: str) -> Tape | None:
        """The tape that makes `results`, blocks of the tensor `name`; None where it would only copy.

        Raises:
            Unrecordable: they are not planes.
        """
        outputs = []
        for result in results:
            planes = self.planes(result, self.suffix(result))
            if not result.is_floating_point():
                raise Unrecordable(str(result.dtype))
            outputs.append(Output(tuple(planes.flat), planes.shape, result.dtype))
        with self.looking_away():
            return assembled(self._steps, self._constants, self._inputs, outputs, name)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not self._paused:
            self._kept.append(result)
            self._take_down(func, args, kwargs or {}, result)
        return result

    def _take_down(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        name = _name(func)
        if name in VIEWS:
            return
        if name in RESERVED or name in FILLED:
            if isinstance(result, Tensor) and result.numel() and result.numel() % self._n == 0:
                self.reserve(result, FILLED[name](args) if name in FILLED else None)
            return
        tensors = [x for x in _flat(args) if isinstance(x, Tensor)]
        if not any(map(self._known, tensors)):  # of numbers
            if self._handed and any(x.data_ptr() in self._handed for x in tensors):
                self._of_handed(name, tensors, result)
            return
        if isinstance(result, Tensor) and result.device.type != "cpu":
            raise Unrecordable("another device")
        if name not in RULES or not isinstance(result, Tensor):
            raise Unrecordable(str(func))
        try:
            RULES[name](self, args, kwargs, result)
        except (ValueError, TypeError, IndexError) as e:  # operands of a form that a rule does not know
            raise Unrecordable(f"{func}: {e}") from None

    def _of_handed(self, name: str, tensors: Sequence[Tensor], result: Any) -> None:
        """Follow numbers into another type; what else is made of them would be that of this tensor alone."""
        told = self._told(tensors[0])
        if name in ("_to_copy", "clone") and told and isinstance(result, Tensor):
            self._hand(result, told)
        else:
            self.particular = True

    def reserve(self, result: Tensor, value: float | None) -> None:
        """Note memory that holds nothing yet, or one number."""
        for i in range(result.numel() // self._n):
            at = result.data_ptr() + i * self._n * result.itemsize
            self._values[at] = (_UNSET if value is None else self._constant(value)), result.dtype

    def _known(self, x: Tensor) -> bool:
        return x.data_ptr() in self._values and x.numel() >= self._n

    def suffix(self, *operands: Any) -> int:
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

    def planes(self, x: Any, suffix: int) -> Array:
        """The values of an operand, arranged as its dimensions before the block are."""
        if not isinstance(x, Tensor):
            return np.array(self._constant(float(x)))
        if self._known(x):
            if not x.is_contiguous() or torch.Size(x.shape[x.dim() - suffix :]).numel() != self._n:
                raise Unrecordable("not contiguous")
            found = []
            for i in range(x.numel() // self._n):
                value, dtype = self._values.get(x.data_ptr() + i * self._n * x.itemsize, (_UNSET, x.dtype))
                if value == _UNSET or (dtype != x.dtype and not {dtype, x.dtype} <= set(FLAGS)):
                    raise Unrecordable("memory of another kind")
                found.append(value)
            return np.array(found).reshape(x.shape[: x.dim() - suffix])
        inner = x.shape[max(0, x.dim() - suffix) :]
        if torch.Size(inner).numel() != 1 or x.dtype not in (torch.float32, torch.float64, *FLAGS, torch.int64):
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

    def put(self, result: Tensor, planes: Array, *, late: bool = False) -> None:
        """Note that `result` holds these values."""
        if not result.is_contiguous() or result.numel() != planes.size * self._n:
            raise Unrecordable("a result of another shape")
        for i, value in enumerate(planes.flat):
            self._values[result.data_ptr() + i * self._n * result.itemsize] = int(value), result.dtype
            if late:
                self.unrounded.add(int(value))

    def step(self, op: int, result: Tensor, *operands: Any) -> None:
        """Take down one operation between planes, broadcast as torch does."""
        if result.dtype not in (torch.float32, torch.bool):
            raise Unrecordable(f"arithmetic in {result.dtype}")
        self.put(result, self.over(op, self.suffix(*operands), *operands))

    def over(self, op: int, suffix: int, *operands: Any) -> Array:
        """The values that `op` makes of operands, which are tensors, numbers, or values already."""
        arrays = [x if isinstance(x, np.ndarray) else self.planes(x, suffix) for x in operands]
        if self.unrounded and any(int(v) in self.unrounded for a in arrays for v in a.flat):
            raise Unrecordable("arithmetic after rounding")
        shape = max((a.shape for a in arrays), key=lambda s: (len(s), s))
        if any(a.shape != shape and a.size > 1 for a in arrays):
            shape = np.broadcast_shapes(*(a.shape for a in arrays))
            arrays = [np.broadcast_to(a, shape) for a in arrays]
        n = math.prod(shape)
        lists = [a.ravel().tolist() * (n if a.size == 1 else 1) for a in arrays]
        found = [self._new(op, *values) for values in zip(*lists, strict=True)]
        return np.array(found).reshape(shape)


@cache
def _name(func: Any) -> str:
    return str(func._schema.name.removeprefix("aten::").rstrip("_"))


def _flat(args: Iterable[Any]) -> Iterable[Any]:
    for x in args:
        if isinstance(x, (list, tuple)):
            yield from _flat(x)
        else:
            yield x
