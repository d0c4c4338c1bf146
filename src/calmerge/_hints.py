"""Annotations as rules for values: whether a value fits, and a sentence if it does not.

Numbers may carry a range, ``Annotated[float, Interval(0, 1, open_low=True)]``; the common ones have names here.
"""

import collections.abc
import dataclasses
import math
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Union

from calmerge._errors import did_you_mean


@dataclasses.dataclass(frozen=True)
class Interval:
    """The range of a number; infinite ends are open.

    >>> keep = Interval(0, 1, open_low=True)
    >>> print(keep), 0 in keep, 1 in keep
    (0, 1]
    (None, False, True)
    >>> Interval(low=1).phrase()
    'be at least 1'
    """

    low: float = -math.inf
    high: float = math.inf
    open_low: bool = False
    open_high: bool = False

    def __contains__(self, value: float) -> bool:
        above = self.low < value if self.open_low else self.low <= value
        below = value < self.high if self.open_high else value <= self.high
        return above and below and math.isfinite(value)

    def __str__(self) -> str:
        left = "(" if self.open_low or self.low == -math.inf else "["
        right = ")" if self.open_high or self.high == math.inf else "]"
        high = "2^63 - 1" if self.high == 2**63 - 1 else f"{self.high:g}"
        return f"{left}{self.low:g}, {high}{right}"

    def phrase(self) -> str:
        """What a value must do, to follow the word "must"."""
        if self.high == math.inf and self.low > -math.inf:
            return f"be {'greater than' if self.open_low else 'at least'} {self.low:g}"
        if self.low == -math.inf and self.high < math.inf:
            return f"be {'less than' if self.open_high else 'at most'} {self.high:g}"
        return f"lie in {self}" if self.high < math.inf else "be a finite number"


Fraction = Annotated[float, Interval(0, 1)]
KeepFraction = Annotated[float, Interval(0, 1, open_low=True)]
DropRate = Annotated[float, Interval(0, 1, open_high=True)]
Positive = Annotated[float, Interval(0, open_low=True)]
NonNegative = Annotated[float, Interval(0)]
Count = Annotated[int, Interval(1)]
Seed = Annotated[int, Interval(0, 2**63 - 1)]


def fault_of(value: Any, hint: Any) -> str | None:
    """What is wrong with ``value`` as a ``hint``: "must ..., got ..."; None if nothing is.

    >>> fault_of("men", Literal["mean", "sum"])
    "must be 'mean' or 'sum', got 'men'. Did you mean 'mean'?"
    >>> fault_of(1, float), fault_of(True, int)
    (None, 'must be a whole number, got True.')
    """
    members = alternatives(hint)
    faults = [_fault_of_one(value, h) for h in members]
    if None in faults:
        return None
    ranged = [f for h, f in zip(members, faults, strict=True) if f and _right_type(value, h)]
    if ranged:
        return f"must {ranged[0]}"
    if len(members) == 1:
        return f"must {faults[0]}"
    advice = ""
    choices = [c for h in members if typing.get_origin(h) is Literal for c in typing.get_args(h)]
    if isinstance(value, str) and choices:
        advice = " " + did_you_mean(value, [str(c) for c in choices])
    return f"must be {_join([_article(h) for h in members])}, got {_show(value)}.{advice}"


def describe(hint: Any, join: str = " | ") -> str:
    """The hint in words, such as ``number`` or ``list of text``."""
    names = []
    for h in alternatives(hint):
        origin, args = typing.get_origin(h), typing.get_args(h)
        if origin is Annotated:
            names.append(describe(args[0], join))
        elif origin is Literal:
            names += [repr(a) for a in args]
        elif _is_callable_hint(h):
            names.append("method" if is_merge(h) else "function (in Python only)")
        elif _is_sequence_hint(h):
            item = args[0] if args else Any
            names.append("list" if item is Any else f"list of {describe(item, ' or ')}")
        elif _is_mapping_hint(h):
            names.append("mapping")
        else:
            names.append(_PLAIN.get(h, str(getattr(h, "__name__", h))))
    return join.join(names)


def alternatives(hint: Any) -> tuple[Any, ...]:
    """The members of a union, nested ones too; the hint itself otherwise."""
    if isinstance(hint, typing.TypeAliasType if hasattr(typing, "TypeAliasType") else ()):
        return alternatives(hint.__value__)
    if _is_union(hint):
        return tuple(a for h in typing.get_args(hint) for a in alternatives(h))
    return (hint,)


def intervals(hint: Any) -> list[Interval]:
    """The ranges that a hint states."""
    found = []
    for h in alternatives(hint):
        if typing.get_origin(h) is Annotated:
            found += [m for m in typing.get_args(h)[1:] if isinstance(m, Interval)]
            found += intervals(typing.get_args(h)[0])
    return found


def is_merge(hint: Any) -> bool:
    """Whether a hint is a function that gives weights, as `Merge` is."""
    returned = (typing.get_args(hint) or (None,))[-1]
    return _is_callable_hint(hint) and str(getattr(returned, "__name__", returned)).endswith("Weights")


# What the messages are made of ----------------------------------------------------------------------------


def _fault_of_one(value: Any, hint: Any) -> str | None:
    """As ``fault_of`` without the word "must", for a hint that is no union."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        fault = _fault_of_one(value, args[0]) if not _is_union(args[0]) else fault_of(value, args[0])
        if fault:
            return fault.removeprefix("must ")
        for interval in args[1:]:
            if isinstance(interval, Interval) and _is_number(value) and value not in interval:
                return f"{interval.phrase()}, got {_show(value)}.{_percent(value, interval)}"
        return None
    if origin is Literal:
        if any(value == a and type(value) is type(a) for a in args):
            return None
        advice = f" {did_you_mean(value, [str(a) for a in args])}" if isinstance(value, str) else ""
        return f"be {describe(hint, ' or ')}, got {_show(value)}.{advice}"
    if not _right_type(value, hint):
        return f"be {_article(hint)}, got {_show(value)}.{_number_advice(value, hint)}"
    if hint is float and not math.isfinite(value):
        return f"be a finite number, got {_show(value)}."
    if _is_sequence_hint(hint) and args:
        return _fault_in_items(value, args[0])
    if _is_mapping_hint(hint) and len(args) == 2:
        for key, item in value.items():
            fault = fault_of(item, args[1])
            if fault:
                return f"hold for '{key}' a value that {fault}"
    return None


def _fault_in_items(value: Sequence[Any], item: Any) -> str | None:
    for position, element in enumerate(value, 1):
        fault = fault_of(element, item)
        if fault:
            return f"be {_article(list[item])}; entry {position} {fault}"  # type: ignore[valid-type]
    return None


def _right_type(value: Any, hint: Any) -> bool:
    """Whether the outer type fits; contents and ranges are looked at elsewhere."""
    origin = typing.get_origin(hint)
    if origin is Annotated:
        return any(_right_type(value, h) for h in alternatives(typing.get_args(hint)[0]))
    if origin is Literal:
        return any(value == a for a in typing.get_args(hint))
    if hint is float:
        return _is_number(value)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if hint is Path:
        return isinstance(value, (str, Path))
    if hint is None or hint is type(None):
        return value is None
    if _is_callable_hint(hint):
        return callable(value)
    if _is_sequence_hint(hint):
        return isinstance(value, Sequence) and not isinstance(value, (str, bytes))
    if _is_mapping_hint(hint):
        return isinstance(value, Mapping)
    if hint is Any:
        return True
    kind = origin or hint
    if not isinstance(kind, type) or getattr(kind, "_is_protocol", False):
        return True
    return isinstance(value, kind)


def _is_union(hint: Any) -> bool:
    return typing.get_origin(hint) in (Union, types.UnionType)


def _is_callable_hint(hint: Any) -> bool:
    return (typing.get_origin(hint) or hint) is collections.abc.Callable


def _is_sequence_hint(hint: Any) -> bool:
    return (typing.get_origin(hint) or hint) in (
        collections.abc.Sequence,
        list,
        tuple,
        collections.abc.Collection,
    )


def _is_mapping_hint(hint: Any) -> bool:
    return (typing.get_origin(hint) or hint) in (collections.abc.Mapping, dict)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


_PLAIN: dict[Any, str] = {
    float: "number",
    int: "whole number",
    bool: "true or false",
    str: "text",
    Path: "path",
    type(None): "null",
    Any: "anything",
}


def _article(hint: Any) -> str:
    text = describe(hint, " or ")
    bare = text.startswith(("'", "true", "text", "null", "anything"))
    return text if bare else f"{'an' if text[0] in 'aeiou' else 'a'} {text}"


def _join(phrases: Sequence[str]) -> str:
    return " or ".join(dict.fromkeys(phrases))


def _percent(value: float, interval: Interval) -> str:
    if interval.high == 1 and interval.low >= 0 and 1 < value <= 100:
        return f" For {value:g} % write {value / 100:g}."
    return ""


def _number_advice(value: Any, hint: Any) -> str:
    """Advice for a number that was written as text, such as ``20%`` or ``"0.2"``."""
    if not isinstance(value, str) or hint not in (float, int):
        return ""
    text = value.strip()
    try:
        number = float(text.rstrip("%"))
    except ValueError:
        return ""
    return f" For {number:g} % write {number / 100:g}." if text.endswith("%") else " Write it without quotes."


def _show(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
