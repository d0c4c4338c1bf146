"""mergekit's YAML, read with mergekit's own rules and turned into recipes.

Written from descriptions of the format and of its rules, and from observing what comes out; docs/mergekit.md says what
is accepted.
"""

from typing import Any

__all__ = ["convert_file", "load_mergekit"]


def __getattr__(name: str) -> Any:  # the command line reads its flags without loading torch
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from calmerge.mergekit import convert

    return getattr(convert, name)
