"""Where a recorder of tapes is told what it cannot see: what the inputs are, and what must be finite."""

import math
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from torch import Tensor

if TYPE_CHECKING:
    from calmerge._weights import Number, Site

Array = np.ndarray[Any, np.dtype[Any]]
watching = threading.local()
"""Of each thread: the recorder that watches it, and the buffers of its machine."""


class Fill(Protocol):
    """Hands the machine an input's entries of a block."""

    def __call__(self, rows: slice, offset: int, into: Array, /) -> Array:
        """The `rows` of a tensor, the first entry of which is number `offset`, as bytes: put into `into`, or elsewhere.

        `into` has no room for what is computed.
        """

    def of(self, name: str, /) -> "Fill":
        """What does the same for another tensor that is treated alike."""


class Stored(ABC):
    """A `Fill` from a file, which the machine may read by itself."""

    @abstractmethod
    def __call__(self, rows: slice, offset: int, into: Array, /) -> Array:
        """As any `Fill`."""

    @abstractmethod
    def of(self, name: str, /) -> "Stored":
        """As any `Fill`."""

    @abstractmethod
    def open(self) -> int:
        """The file, opened for reading."""

    @abstractmethod
    def first(self, rows: slice, /) -> int:
        """The first byte in it of some rows of the tensor."""


def recording() -> bool:
    """Whether a recorder is watching, so that a chain of single steps is better than one quick call."""
    return getattr(watching, "recorder", None) is not None


def unwatched() -> AbstractContextManager[None]:
    """In it a recorder takes nothing down: for what makes an input."""
    recorder = getattr(watching, "recorder", None)
    return recorder.looking_away() if recorder is not None else nullcontext()


def leaf(tensor: Tensor, offset: int, fill: Fill) -> Tensor:
    """`tensor`, noted as an input where a recorder is watching.

    Args:
        tensor: some rows of an input.
        offset: the index of their first entry.
        fill: gets the same of other rows.
    """
    recorder = getattr(watching, "recorder", None)
    if recorder is not None:
        recorder.leaf(tensor, offset, fill)
    return tensor


def handed(node: "Number", number: Tensor) -> Tensor:
    """`number`, noted as that of a node where a recorder is watching, which then takes any other in its place."""
    recorder = getattr(watching, "recorder", None)
    if recorder is not None:
        recorder.hand(node, number)
    return number


def computed(
    fn: Callable[..., Tensor], values: Callable[[], Sequence[Tensor]], site: "Site", again: Callable[[], Fill]
) -> Tensor:
    """What `fn` makes of a block; a recorder that cannot take down how notes it as an input.

    Args:
        fn: a computation, called as `fn(*values, site)`.
        values: reads what it is handed.
        site: where the block is.
        again: gives what does the same to other rows.
    """
    recorder = getattr(watching, "recorder", None)
    if recorder is None:
        return fn(*values(), site)
    made: Tensor = recorder.computed(fn, values, site, again)
    return made


def other_rows() -> None:
    """Said by weights whose rows are not those of their inputs, before they read them: no tape can follow that."""
    recorder = getattr(watching, "recorder", None)
    if recorder is not None:
        recorder.refuse()


def finite(tensor: Tensor) -> bool:
    """Whether no entry is NaN or infinite, nor the sum of all; asked of every block that a tape is played over."""
    recorder = getattr(watching, "recorder", None)
    if recorder is not None:
        return bool(recorder.finite(tensor))
    return math.isfinite(tensor.sum().item())
