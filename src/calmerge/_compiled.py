"""Whether compiled loops are at hand. Everything they do NumPy or torch does too, to the same bits."""

import importlib.util
import sys
from types import ModuleType

LARGE = 2**27
"""From how many entries of all experts on it is worth while to load compiled loops, which takes tenths of a second."""


def usable(numel: int, experts: int) -> bool:
    """Whether working on so many entries of so many experts is worth loading compiled loops, and numba is there for it.

    >>> usable(100, 8)
    False
    """
    return numel * experts >= LARGE and importlib.util.find_spec("numba") is not None


def kernels() -> ModuleType | None:
    """The compiled loops for sums, ranks and draws, where this process has the machine of tapes already."""
    return importlib.import_module("calmerge._kernels") if "calmerge._machine" in sys.modules else None
