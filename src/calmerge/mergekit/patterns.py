"""Shell patterns for groups of tensors, so that a recipe can be read."""

import re
from collections.abc import Hashable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import TypeVar

from calmerge._layers import layers

K = TypeVar("K", bound=Hashable)


def cases(groups: Mapping[K, Sequence[str]], hints: Sequence[str] = ()) -> list[tuple[K, list[str]]]:
    """The groups in an order, each with patterns, such that the first one with a pattern for a name is the name's own.

    The largest comes last, without patterns: it takes what is left.

    Args:
        groups: names by key.
        hints: parts of names that are likely to tell groups apart.

    >>> cases({1: ["h.0.a", "h.0.b"], 2: ["h.1.a", "h.1.b"], 3: ["norm", "x", "y"]})
    [(1, ['h.0.*']), (2, ['h.1.*']), (3, [])]
    """
    order = sorted(groups, key=lambda key: len(groups[key]))
    left = {name for names in groups.values() for name in names}
    found: list[tuple[K, list[str]]] = []
    for key in order[:-1]:
        own = set(groups[key])
        found.append((key, _cover(own, left - own, hints)))
        left -= own
    return [*found, (order[-1], [])] if order else []


def _cover(own: set[str], others: set[str], hints: Sequence[str]) -> list[str]:
    """Patterns that together fit all of `own` and none of `others`; wide ones first, names where none is."""
    chosen: list[str] = []
    missing = set(own)
    for tier in (_by_layer_or_hint, _by_part):
        fits: dict[str, set[str]] = {}
        for pattern in dict.fromkeys(p for name in sorted(missing) for p in tier(name, hints)):
            if not any(fnmatchcase(name, pattern) for name in others):
                fits[pattern] = {name for name in own if fnmatchcase(name, pattern)}
        while missing and fits:
            best = max(fits, key=lambda p: (len(fits[p] & missing), -len(p)))
            if not fits[best] & missing:
                break
            chosen.append(best)
            missing -= fits[best]
    return [*chosen, *sorted(missing)]


def _by_layer_or_hint(name: str, hints: Sequence[str]) -> Iterator[str]:
    layer = re.match(r"(.*?\.\d+\.)", name)
    for hint in hints:
        if hint in name:
            yield f"*{hint}*"
            if layer:
                yield f"{layer[1]}*{hint}*"
    if layer:
        yield f"{layer[1]}*"


def _by_part(name: str, hints: Sequence[str]) -> Iterator[str]:
    layer = re.match(r"(.*?)\.\d+(\..*)", name)
    if layer:
        yield f"{layer[1]}.*{layer[2]}"
    for part in name.split(".")[1:-1]:
        if not part.isdecimal():
            yield f"*.{part}.*"


def depths(names: Sequence[str]) -> dict[str, float]:
    """By tensor, how deep it is: i / (L - 1) in layer i of L, 1 in the only one, 0 outside the layers.

    >>> depths(["h.0.ln.w", "h.1.ln.w", "h.2.ln.w", "norm.w"])
    {'h.0.ln.w': 0.0, 'h.1.ln.w': 0.5, 'h.2.ln.w': 1.0, 'norm.w': 0.0}
    """
    found = layers(names)
    return {name: depth(found[name].index, found[name].count) if name in found else 0.0 for name in names}


def depth(index: int, count: int) -> float:
    """How deep layer `index` of `count` is."""
    return index / (count - 1) if count > 1 else 1.0
