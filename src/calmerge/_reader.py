"""Blocks of lazy weights: by a tape where there is one, by torch otherwise; the same to the bit."""

import threading
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from calmerge._compiled import ByStrips, strips, usable
from calmerge._watch import Array
from calmerge._weights import (
    ALL,
    Memo,
    Node,
    Number,
    Site,
    Weights,
    entries,
    experts_in,
    joined,
    row_size,
    site_of,
    value_at,
)

if TYPE_CHECKING:
    from calmerge._tape import Tape

Tapes = dict[Hashable, "tuple[Tape | None, Sequence[Node]]"]
"""By the way a tensor comes about, its tape; and nodes that must live on for as long as others are told by them."""

_PROBE = 256  # entries of the rows that a tape is recorded on, at least
HELD = 4
"""Blocks of a tape whose inputs are computed that come as one at most: more take more memory, and hardly less time."""
_LONG = 2**15  # entries of a tensor from which on a tape pays


class Reader:
    """The blocks of some nodes of one graph, computed together.

    Args:
        nodes: weights of the same names, at least one, and numbers, which must have been found.
        taping: whether tapes are made; if enough entries will be read when None.
        kept: tapes of other readers of this graph, which are used again where tensors are treated alike.

    >>> from calmerge import StateDict
    >>> weights = StateDict({"w": torch.tensor([1.0, 2.0])})
    >>> Reader([weights.map(lambda w, site: 2 * w), weights]).read("w", ALL)
    [tensor([2., 4.]), tensor([1., 2.])]
    """

    def __init__(self, nodes: Sequence[Node], *, taping: bool | None = None, kept: "Tapes | None" = None) -> None:
        self._nodes = nodes
        self._kept: Tapes = {} if kept is None else kept
        self._weights = [node for node in nodes if isinstance(node, Weights)]
        self._lead = self._weights[0]
        self._taping = usable(self._lead.numel, max(map(experts_in, self._weights))) if taping is None else taping
        self._tapes: dict[str, Tape | None] = {}
        self._lock = threading.Lock()

    def read(self, name: str, rows: slice) -> list[Tensor]:
        """What each node is at some rows of a tensor."""
        return next(self.each(name, [rows]))[1]

    def each(self, name: str, blocks: Sequence[slice], *, together: int = 1) -> Iterator[tuple[slice, list[Tensor]]]:
        """What each node is at several blocks of a tensor, one after the other, with the rows.

        Args:
            name: of the tensor.
            blocks: rows that follow each other.
            together: how many may come as one where that is quicker; of a tape that computes inputs first, four.
        """
        tape = self._tape(name)
        if tape is None:
            for rows in blocks:
                yield rows, self._by_torch(name, rows)
            return
        together = together if tape.streams else min(together, HELD)
        with tape.opened() as handles:
            for i in range(0, len(blocks), together):
                rows = joined(blocks[i : i + together])
                site = site_of(self._lead, name, rows)
                found = tape.play(self._shape(name, rows), rows, site.offset, handles)
                if found is None:
                    yield rows, self._by_torch(name, rows)
                else:
                    planes = iter(found)
                    yield rows, [next(planes) if isinstance(n, Weights) else _number(n, site) for n in self._nodes]

    def by_strips(
        self, name: str, blocks: Sequence[slice], fn: ByStrips, *, together: int = 1
    ) -> Iterator[tuple[Sequence[slice], Any]] | None:
        """What a compiled loop makes of several blocks, some at a time, with these; None where no tape is to be had.

        Args:
            name: of the tensor.
            blocks: rows that follow each other.
            fn: the loop, over the planes of all weights among the nodes.
            together: how many blocks come at a time.
        """
        tape = self._tape(name)
        return self._by_strips(name, blocks, tape, fn, together) if tape and tape.streams and tape.wide else None

    def _by_strips(
        self, name: str, blocks: Sequence[slice], tape: "Tape", fn: ByStrips, together: int
    ) -> Iterator[tuple[Sequence[slice], Any]]:
        with tape.opened() as handles:
            for i in range(0, len(blocks), together):
                some = blocks[i : i + together]
                ends, rows = np.cumsum([entries(self._lead, name, one) for one in some]), joined(some)
                yield some, tape.by_strips(fn, ends, rows, site_of(self._lead, name, rows).offset, handles)

    def windows(self, name: str, rows: Sequence[slice], most: Sequence[int]) -> list[Tensor] | None:
        """The first entries of some blocks of the only weights, [planes, n], by one call; None where that is not to be.

        Args:
            name: of the tensor.
            rows: of each block.
            most: how many entries of each.
        """
        tape, loops = self._tape(name), strips()
        if tape is None or loops is None or not tape.wide or not tape.stored or max(most) > loops.STRIP:
            return None
        spec = self._lead.specs[name]
        begins = np.array([row_size(spec) * (some.start or 0) for some in rows])

        def found(played: tuple[int, ...], planes: Array, *_: object) -> Array | None:
            some = np.empty((len(planes), sum(most)), np.float32)
            return some if loops.windows(played, planes, begins, np.cumsum(most), some) else None

        with tape.opened() as handles:
            some = tape.by_strips(found, np.array([spec.numel]), ALL, 0, handles)
        return None if some is None else [torch.from_numpy(one) for one in np.split(some, np.cumsum(most)[:-1], 1)]

    def cut(
        self, read: Iterable[tuple[slice, list[Tensor]]], blocks: Sequence[slice]
    ) -> Iterator[tuple[slice, list[Tensor]]]:
        """Every block alone, as views, of what `each` read of several together."""
        dims = [getattr(node, "row_dim", 0) if isinstance(node, Weights) else None for node in self._nodes]
        left = deque(blocks)
        for rows, tensors in read:
            if rows == left[0]:
                yield left.popleft(), tensors
                continue
            while left and left[0].start < rows.stop:
                block = left.popleft()
                some, pairs = slice(block.start - rows.start, block.stop - rows.start), zip(tensors, dims, strict=True)
                yield block, [x if dim is None else x[(slice(None),) * dim + (some,)] for x, dim in pairs]

    def _by_torch(self, name: str, rows: slice) -> list[Tensor]:
        site, memo = site_of(self._lead, name, rows), Memo()
        return [value_at(node, site, rows, memo) for node in self._nodes]

    def _shape(self, name: str, rows: slice) -> tuple[int, ...]:
        spec = self._lead.specs[name]
        return spec.shape if rows == ALL else (rows.stop - rows.start, *spec.shape[1:])

    def _tape(self, name: str) -> "Tape | None":
        if not self._taping or name in self._tapes:
            return self._tapes.get(name)
        with self._lock:  # not for those that are there: to take one down takes longer than to play it
            if name not in self._tapes:
                self._tapes[name] = self._tape_of(name)
            return self._tapes[name]

    def _tape_of(self, name: str) -> "Tape | None":
        spec = self._lead.specs[name]
        if spec.numel < _LONG or not spec.shape or any(w.whole(name) for w in self._weights):
            return None
        way = self._way(name)
        if way in self._kept:
            tape, _ = self._kept[way]
            return None if tape is None else tape.of(name)
        tape, particular = self._recorded(name)
        if way is not None and not particular:
            self._kept[way] = tape, self._nodes
        return tape

    def _way(self, name: str) -> Hashable:
        """How a tensor comes about: the nodes that it is made from, what it is in each, and the numbers it is handed.

        None where nodes do not tell. Tensors of one way have one tape, as long as nothing looks at their names.
        """
        found: list[Hashable] = []
        seen: set[int] = set()
        site = Site(name, 0)

        def visit(node: Node) -> bool:
            if isinstance(node, Number):
                number = node.at(site)
                told = id(node) if node.factor else _bytes(number.cpu()).tobytes()
                found.append((number.dtype, number.shape, told))
                return True
            assert isinstance(node, Weights)
            found.append(id(node.uncut))
            if id(node) in seen:
                return True
            seen.add(id(node))
            parts = node.parts(name)
            found.append((node.specs[name], None if parts is None else len(parts)))
            return parts is not None and all(map(visit, parts))

        return tuple(found) if all(map(visit, self._weights)) else None

    def _recorded(self, name: str) -> "tuple[Tape | None, bool]":
        """The tape of one tensor, from a look at some rows in its middle, of which it must give the same bits.

        Also whether it is of this tensor alone.
        """
        from calmerge._operations import Unrecordable
        from calmerge._recorder import Recorder

        spec = self._lead.specs[name]
        # with two rows no dimension of a block is mistaken for that of tasks
        count = max(2, -(-_PROBE // row_size(spec)))
        if count >= spec.shape[0]:
            return None, False
        # not its first rows: what is read elsewhere than it should be would not show there
        rows = slice((spec.shape[0] - count) // 2, (spec.shape[0] + count) // 2)
        offset = site_of(self._lead, name, rows).offset
        recorder, memo, tape, seen = Recorder(count * row_size(spec), offset), Memo(), None, []
        with suppress(Unrecordable), recorder, torch.no_grad():
            seen = [node.read(name, rows, memo) for node in self._weights]
            tape = recorder.tape(seen, name)
        if tape is not None:
            with tape.opened() as handles:
                played = tape.play(self._shape(name, rows), rows, offset, handles)
            tape = tape if played and all(map(_same, played, seen)) else None
        return tape, recorder.particular


class Remade:
    """Fills an input of a tape with what a computation makes that no tape can say, of inputs which one may say.

    Args:
        fn: the computation.
        inputs: of it.
        name: of the tensor it works on.
        kept: as for a `Reader`.
    """

    def __init__(
        self, fn: Callable[..., Tensor], inputs: Sequence[Node], name: str, kept: "Tapes | None" = None
    ) -> None:
        self._fn, self._inputs, self._name = fn, inputs, name
        self._kept: Tapes = {} if kept is None else kept
        self._reader = Reader(inputs, taping=True, kept=self._kept)

    def of(self, name: str) -> "Remade":
        """What does so for another tensor."""
        return Remade(self._fn, self._inputs, name, self._kept)

    def __call__(self, rows: slice, offset: int, into: Array) -> Array:
        """Compute some rows."""
        return _bytes(self._fn(*self._reader.read(self._name, rows), Site(self._name, offset)))


def _number(node: Node, site: Site) -> Tensor:
    assert isinstance(node, Number)
    return node.at(site)


def _same(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and np.array_equal(_bytes(a), _bytes(b))


def _bytes(tensor: Tensor) -> Array:
    return tensor.detach().contiguous().view(-1).view(torch.uint8).numpy()
