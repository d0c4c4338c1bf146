"""mergekit's YAML, read with mergekit's own rules and turned into recipes.

Written from descriptions of the format and of its rules, and from observing what comes out; docs/mergekit.md says what
is accepted.
"""

from calmerge.mergekit.convert import convert, convert_file, load_mergekit

__all__ = ["convert", "convert_file", "load_mergekit"]
