"""The exceptions of calmerge.

::

    CalmergeError(Exception)
    ├── UsageError        the call or recipe is wrong: unknown name, value out of range, missing option
    ├── CheckpointError   a checkpoint cannot be read, or does not fit the others
    ├── DataError         task data cannot be read, or are too few, or carry impossible labels
    ├── FitError          an optimisation went wrong: a loss or gradient that is not finite
    ├── OutputError       the result cannot be written where it should go
    └── MissingExtra      an optional package is not installed
"""

import difflib
from collections.abc import Iterable


class CalmergeError(Exception):
    """Every error that calmerge raises on purpose: what was expected, what was found, where, what to do next."""


class UsageError(CalmergeError, ValueError):
    """The call or the recipe is wrong: unknown name, value out of range, missing option."""


class CheckpointError(CalmergeError, ValueError):
    """A checkpoint cannot be read, or does not fit the others."""


class DataError(CalmergeError, ValueError):
    """Task data cannot be read, are too few, or carry impossible labels."""


class FitError(CalmergeError, ArithmeticError):
    """An optimisation met a loss or gradient that is not finite."""


class OutputError(CalmergeError, OSError):
    """The result cannot be written where it should go."""


class MissingExtra(CalmergeError, ImportError):
    """An optional package is not installed; the message names the extra that brings it."""

    def __init__(self, package: str, extra: str) -> None:
        super().__init__(f"{package} is not installed: pip install 'calmerge[{extra}]' brings it.")


_NAMED = 10  # of more than a hundred known names, those that a message tells


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """A sentence with the closest known names.

    >>> did_you_mean("tise", ["ties", "dare", "calm"])
    "Did you mean 'ties'?"
    >>> did_you_mean("zzz", ["ties", "dare"])
    'Known: dare, ties.'
    """
    known = sorted(set(known))
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.6)
    if close:
        return "Did you mean " + " or ".join(f"'{c}'" for c in close) + "?"
    more = f" and {len(known) - _NAMED} more" if len(known) > 100 else ""
    return "Known: " + ", ".join(known[:_NAMED] if more else known) + more + "."
