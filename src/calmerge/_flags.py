"""Booleans that follow from the place of an entry: draws at random, choices among equals."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from calmerge._watch import Array, leaf, unwatched
from calmerge._weights import ALL, Memo, Node, Spec, Weights, site_of

Writer = Callable[[str, int, int, Array], None]
"""Puts the flags of some entries of a tensor into a uint8 array: its name, the task, the index of the first."""


class Flags(Weights):
    """Booleans of the shapes of other weights, [T, ...] beside task vectors; nothing is read for them.

    Args:
        beside: the weights.
        write: makes them.
        numbers: what `write` asks for, which must have been found before.

    >>> from calmerge import StateDict
    >>> def even(name, task, offset, into):
    ...     into[:] = np.arange(offset, offset + len(into)) % 2 == 0
    >>> Flags(StateDict({"w": torch.zeros(3)}), even)["w"]
    tensor([ True, False,  True])
    """

    def __init__(self, beside: Weights, write: Writer, *numbers: Node) -> None:
        self.row_dim = getattr(beside, "row_dim", 0)
        self._tasks = len(getattr(beside, "tasks", ())) if self.row_dim else 1
        self._write, self.inputs = write, (beside, *numbers)
        self.specs = {name: Spec(spec.shape, torch.bool) for name, spec in beside.specs.items()}

    def parts(self, name: str) -> Sequence[Node]:
        """None."""
        return ()

    def read(self, name: str, rows: slice = ALL, memo: Memo | None = None) -> Tensor:
        """The flags of one tensor, or of some of its rows."""
        shape, offset = self.specs[name].shape, site_of(self, name, rows).offset
        if rows != ALL:
            shape = (rows.stop - (rows.start or 0), *shape[1:])
        if self.row_dim:
            shape = (self._tasks, *shape)
        flags = np.empty(torch.Size(shape).numel(), np.uint8)
        with unwatched():
            self.fill(name, offset, flags)
        return leaf(torch.from_numpy(flags).view(torch.bool).view(shape), offset, _Filled(self, name))

    def fill(self, name: str, offset: int, into: Array) -> None:
        """Those of all tasks from an entry on, one task after the other."""
        for task, row in enumerate(into.reshape(self._tasks, -1)):
            self._write(name, task, offset, row)


class _Filled(NamedTuple):
    """How a tape is handed them."""

    flags: Flags
    name: str

    def __call__(self, rows: slice, offset: int, into: Array) -> Array:
        self.flags.fill(self.name, offset, into)
        return into

    def of(self, name: str) -> "_Filled":
        return _Filled(self.flags, name)
