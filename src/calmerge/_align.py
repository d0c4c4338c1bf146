"""Matching an expert's tensor names to the base's where they differ by one leading prefix."""

from collections.abc import Collection, Iterable


def aligned_names(names: Iterable[str], base: Collection[str]) -> dict[str, str]:
    """By name in the base, the expert's own name: as they are, or one leading part (`bert.`) taken off or put before.

    Whichever way fits more of the base's names wins; as they are, if none does better.

    >>> aligned_names(["bert.w", "head"], ["w"]), aligned_names(["w", "head"], ["bert.w"])
    ({'w': 'bert.w', 'head': 'head'}, {'bert.w': 'w', 'head': 'head'})
    """
    names = list(names)
    best = {n: n for n in names}
    shared = sum(n in base for n in names)
    for prefix in dict.fromkeys(n.split(".", 1)[0] + "." for n in names):
        without = {n.removeprefix(prefix): n for n in names}
        if len(without) == len(names) and sum(n in base for n in without) > shared:
            return without
    for prefix in dict.fromkeys(n.split(".", 1)[0] + "." for n in base):
        behind = {prefix + n if prefix + n in base else n: n for n in names}
        if len(behind) == len(names) and sum(n in base for n in behind) > shared:
            return behind
    return best
