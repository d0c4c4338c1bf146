"""Blocks of lazy weights: by a tape where there is one, by torch otherwise; the same to the bit."""

import importlib.util
import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from calmerge._weights import ALL, Memo, Node, Weights, row_size, site_of, value_at

if TYPE_CHECKING:
    from calmerge._tape import Tape

LARGE = 2**24
"""From how many entries on it is worth while to load the machine, which takes a few tenths of a second."""
_PROBE = 256  # entries of the rows that a tape is recorded on, at least
_LONG = 2**15  # entries of a tensor from which on a tape pays


class Reader:
    """The blocks of some nodes of one graph, computed together.

    Args:
        nodes: weights of the same names, at least one, and numbers, which must have been found.
        numel: entries of all tensors that will be read.

    >>> from calmerge import StateDict
    >>> weights = StateDict({"w": torch.tensor([1.0, 2.0])})
    >>> Reader([weights.map(lambda w, site: 2 * w), weights], 2).read("w", ALL)
    [tensor([2., 4.]), tensor([1., 2.])]
    """

    def __init__(self, nodes: Sequence[Node], numel: int) -> None:
        self._nodes = nodes
        self._weights = [node for node in nodes if isinstance(node, Weights)]
        self._lead = self._weights[0]
        self._taping = numel >= LARGE and importlib.util.find_spec("numba") is not None
        self._tapes: dict[str, Tape | None] = {}
        self._lock = threading.Lock()

    def read(self, name: str, rows: slice) -> list[Tensor]:
        """What each node is at some rows of a tensor."""
        site = site_of(self._lead, name, rows)
        memo: Memo = {}
        tape = self._tape(name) if self._taping else None
        if tape is not None:
            spec = self._lead.specs[name]
            shape = spec.shape if rows == ALL else (rows.stop - rows.start, *spec.shape[1:])
            found = tape.play(shape, rows, site.offset)
            if found is not None:
                planes = iter(found)
                return [next(planes) if isinstance(n, Weights) else value_at(n, site, rows, memo) for n in self._nodes]
        return [value_at(node, site, rows, memo) for node in self._nodes]

    def _tape(self, name: str) -> "Tape | None":
        with self._lock:
            if name not in self._tapes:
                self._tapes[name] = self._recorded(name)
            return self._tapes[name]

    def _recorded(self, name: str) -> "Tape | None":
        """The tape of one tensor, from a look at some rows in its middle."""
        spec = self._lead.specs[name]
        if spec.numel < _LONG or not spec.shape or any(w.whole(name) for w in self._weights):
            return None
        from calmerge._recorder import Recorder, Unrecordable

        # with two rows no dimension of a block is mistaken for that of tasks
        count = max(2, -(-_PROBE // row_size(spec)))
        if count >= spec.shape[0]:
            return None
        # not its first rows: what is read elsewhere than it should be would not show there
        rows = slice((spec.shape[0] - count) // 2, (spec.shape[0] + count) // 2)
        recorder = Recorder(count * row_size(spec), site_of(self._lead, name, rows).offset)
        memo: Memo = {}
        try:
            with recorder, torch.no_grad():
                return recorder.tape([node.read(name, rows, memo) for node in self._weights])
        except Unrecordable:
            return None
