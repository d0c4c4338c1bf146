"""Whether compiled loops are at hand. Everything they do NumPy or torch does too, to the same bits."""

import importlib.util
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

LARGE = 2**27
"""From how many entries of all experts on it is worth while to load compiled loops, which takes tenths of a second."""

ByStrips = Callable[[tuple[int, ...], Any, Any, int], Any]
"""A compiled loop that plays a tape by itself: handed what `played` needs, the float32 planes [planes, STRIP] that a
strip of what comes out is put into, where each of several blocks ends, and the index of the first entry. It gives None
where an entry is not sound.
"""


def usable(numel: int, experts: int) -> bool:
    """Whether working on so many entries of so many experts is worth loading compiled loops, and numba is there for it.

    >>> usable(100, 8)
    False
    """
    return numel * experts >= LARGE and importlib.util.find_spec("numba") is not None


def kernels() -> ModuleType | None:
    """The compiled loops for sums, ranks and draws, where this process has the machine of tapes already."""
    return _beside_tapes("calmerge._kernels")


def strips() -> ModuleType | None:
    """Those that have tapes played for them, strip after strip; where `kernels` are."""
    return _beside_tapes("calmerge._strips")


def _beside_tapes(name: str) -> ModuleType | None:
    return importlib.import_module(name) if "calmerge._machine" in sys.modules else None
