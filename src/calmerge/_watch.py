"""Where a recorder of tapes is told what it cannot see: what the inputs are, and what must be finite."""

import threading
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

Array = np.ndarray[Any, np.dtype[Any]]
watching = threading.local()
"""Of each thread: the recorder that watches it, and the buffers of its machine."""


class Fill(Protocol):
    """Puts an input's entries of a block where the machine reads them."""

    def __call__(self, rows: slice, offset: int, into: Array, /) -> None:
        """The `rows` of a tensor, the first entry of which is number `offset`, as bytes."""


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
    return bool(torch.isfinite(tensor.sum()))
