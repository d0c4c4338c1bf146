"""Values of parameters in mergekit's files: a number, a gradient over layers, or a list of either by tensor."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from calmerge._yaml import Node

Scalar = bool | int | float | str
Values = Scalar | tuple[Scalar, ...]


@dataclass(frozen=True)
class Entry:
    """A value, and the tensors that it is for.

    Attributes:
        filter: text that a tensor's name must hold; None for all tensors.
        value: a scalar, or a gradient over the layers.
        where: "file:line".
    """

    filter: str | None
    value: Values
    where: str = field(compare=False)


@dataclass(frozen=True)
class Setting:
    """What a file says about one parameter at one place: entries of which the first that fits a tensor counts."""

    entries: tuple[Entry, ...]
    where: str = field(compare=False)

    @property
    def constant(self) -> bool:
        """Whether all tensors get the same."""
        first = self.entries[0]
        return first.filter is None and not isinstance(first.value, tuple)

    def at(self, name: str, t: float) -> Scalar | None:
        """The value for a tensor at depth `t`; None if no entry is for it.

        >>> from calmerge._yaml import parse
        >>> found = read_setting(parse("[{filter: mlp, value: [0, 1]}, {filter: attn, value: 0.5}]", "c.yml"), [])
        >>> found.at("layers.1.mlp.up", 0.25), found.at("layers.1.attn.q", 0.25), found.at("norm", 0)
        (0.25, 0.5, None)
        """
        for entry in self.entries:
            if entry.filter is None or entry.filter in name:
                return at_depth(entry.value, t) if isinstance(entry.value, tuple) else entry.value
        return None

    def scalars(self) -> Iterator[tuple[Scalar, str]]:
        """Every single value, with its place."""
        for entry in self.entries:
            for value in entry.value if isinstance(entry.value, tuple) else (entry.value,):
                yield value, entry.where


def at_depth(values: Sequence[Scalar], t: float) -> Scalar:
    """The value at depth t in [0, 1] of a gradient: numbers are interpolated, of anything else one is picked.

    >>> at_depth([0, 1, 0], 0.25), at_depth([True, False], 0.9)
    (0.5, True)
    """
    place = t * (len(values) - 1)
    low = math.floor(place)
    first, second = values[low], values[min(low + 1, len(values) - 1)]
    if _is_number(first) and _is_number(second):
        share = place - low
        return (1 - share) * first + share * second  # type: ignore[operator]
    return first


def read_setting(node: Node, problems: list[str]) -> Setting | None:
    """The setting that `node` writes; mistakes go to `problems`."""
    if not node.is_list():
        found = _value(node, problems)
        return None if found is None else Setting((Entry(None, found, node.where),), node.where)
    if not any(one.is_mapping() for one in node.value):
        found = _value(node, problems)
        return None if found is None else Setting((Entry(None, found, node.where),), node.where)
    entries = []
    for one in node.value:
        if not one.is_mapping() or "value" not in one.value or set(one.value) - {"filter", "value"}:
            problems.append(
                f"{one.where}: an entry of a list of filters is {{filter: TEXT, value: NUMBER}}, the filter may be "
                f"left out; got {one.plain()!r}."
            )
            continue
        text = one.get("filter")
        if text is not None and not isinstance(text.value, str) and text.value is not None:
            problems.append(f"{text.where}: a filter is text that the tensor's name holds, got {text.plain()!r}.")
            continue
        found = _value(one.value["value"], problems)
        if found is not None:
            wanted = None if text is None or text.value in (None, "*") else text.value
            entries.append(Entry(wanted, found, one.where))
    return Setting(tuple(entries), node.where) if entries else None


def _value(node: Node, problems: list[str]) -> Values | None:
    if isinstance(node.value, (bool, int, float, str)):
        return node.value
    if node.is_list() and node.value and all(isinstance(one.value, (bool, int, float, str)) for one in node.value):
        return tuple(one.value for one in node.value)
    problems.append(
        f"{node.where}: a parameter is a number, a list of numbers (a gradient over the layers), or a list of "
        f"{{filter, value}}; got {node.plain()!r}."
    )
    return None


def _is_number(value: Scalar) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
