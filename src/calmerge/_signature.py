"""Options checked against a function's own signature: the only description of a method's options.

A method states type and range where it is defined, ``keep: Annotated[float, Interval(0, 1, open_low=True)] = 0.2``;
recipes, suites, the one-line Python call and ``calmerge explain`` all read it from there.
"""

import dataclasses
import functools
import inspect
import typing
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from calmerge._errors import CalmergeError, UsageError, did_you_mean
from calmerge._hints import Count as Count
from calmerge._hints import DropRate as DropRate
from calmerge._hints import Fraction as Fraction
from calmerge._hints import Interval as Interval
from calmerge._hints import KeepFraction as KeepFraction
from calmerge._hints import NonNegative as NonNegative
from calmerge._hints import Positive as Positive
from calmerge._hints import Seed as Seed
from calmerge._hints import alternatives, describe, fault_of, intervals, is_merge

R = TypeVar("R")


@dataclasses.dataclass(frozen=True)
class Option:
    """One option of a function, as its signature states it."""

    name: str
    hint: Any
    default: Any
    required: bool

    @property
    def type(self) -> str:
        """The type in words, e.g. ``number`` or ``'mean' | 'sum'``."""
        return describe(self.hint)

    @property
    def range(self) -> str:
        """The range, e.g. ``(0, 1]``; empty if there is none."""
        return " | ".join(str(i) for i in intervals(self.hint) if i != Interval())

    @property
    def takes_merge(self) -> bool:
        """Whether the option takes a merge function, as ``inner`` does."""
        return any(is_merge(h) for h in alternatives(self.hint))

    @property
    def takes_path(self) -> bool:
        """Whether the option takes a path."""
        return Path in alternatives(self.hint)


def options_of(fn: Callable[..., Any], provided: Collection[str] = ()) -> dict[str, Option]:
    """The keyword-only parameters of ``fn`` (of a class, all) in their order, without those in ``provided``.

    >>> def trim(tvs, *, keep: KeepFraction = 0.2): ...
    >>> [(o.name, o.type, o.range, o.default) for o in options_of(trim).values()]
    [('keep', 'number', '(0, 1]', 0.2)]
    """
    hints = hints_of(fn)
    kinds = {
        inspect.Parameter.KEYWORD_ONLY,
        *([inspect.Parameter.POSITIONAL_OR_KEYWORD] if isinstance(fn, type) else []),
    }
    return {
        p.name: Option(p.name, hints.get(p.name, Any), p.default, p.default is p.empty)
        for p in inspect.signature(fn).parameters.values()
        if p.kind in kinds and p.name not in provided
    }


def hints_of(fn: Callable[..., Any]) -> dict[str, Any]:
    """The annotations of ``fn``, resolved; where a name is unknown to its module, as they stand."""
    target: Any = fn.func if isinstance(fn, functools.partial) else fn
    if isinstance(target, type):
        target = inspect.getattr_static(target, "__init__")
    try:
        return typing.get_type_hints(target, include_extras=True)
    except NameError:  # a name inside an alias such as Merge, or one imported for type checkers only
        raw = inspect.get_annotations(target)
        return {name: Any if isinstance(hint, str) else hint for name, hint in raw.items()}


def check(
    fn: Callable[..., Any],
    options: Mapping[str, Any],
    where: str | Mapping[str, str] = "",
    *,
    name: str | None = None,
    provided: Collection[str] = (),
    noun: str = "option",
) -> list[str]:
    """All mistakes in ``options`` for ``fn``, one sentence or two each; none if the list is empty.

    Args:
        where: "file:line" of the call, or a mapping from option to "file:line" (key ``""`` for the call itself).
        name: what to call the function in messages; its own name if not given.
        provided: parameters that the caller fills in (``tasks``, ``run``): neither missing nor allowed.
        noun: what the messages call an option; in a file "key" may read better.

    >>> from typing import Literal
    >>> def ties(tvs, *, keep: KeepFraction = 0.2, combine: Literal["mean", "sum"] = "mean"): ...
    >>> lines = {"": "recipe.yaml:8", "keep": "recipe.yaml:9"}
    >>> print(*check(ties, {"keep": 20, "combin": "sum"}, lines), sep=chr(10))
    recipe.yaml:9: ties.keep must lie in (0, 1], got 20. For 20 % write 0.2.
    recipe.yaml:8: ties has no option 'combin'. Did you mean 'combine'?
    """
    name = name or name_of(fn)
    lines = {"": where} if isinstance(where, str) else where
    known = options_of(fn, provided)
    problems = []
    for key, value in options.items():
        prefix = _prefix(lines.get(key, lines.get("", "")))
        if key in provided:
            problems.append(f"{prefix}{name}.{key} cannot be set here: calmerge fills it in.")
        elif key not in known:
            hint = did_you_mean(key, known) if known else "It takes none."
            problems.append(f"{prefix}{name} has no {noun} '{key}'. {hint}")
        else:
            fault = fault_of(value, known[key].hint)
            if fault:
                problems.append(f"{prefix}{name}.{key} {fault}")
    for option in known.values():
        if option.required and option.name not in options:
            kind = "" if option.hint is Any else f" ({describe(option.hint, ' or ')})"
            problems.append(f"{_prefix(lines.get('', ''))}{name} needs the {noun} '{option.name}'{kind}.")
    return problems


def checked_call(fn: Callable[..., R], /, *args: Any, **options: Any) -> R:
    """``fn(*args, **options)`` after the options passed the check.

    Raises:
        UsageError: an option is unknown, missing, of the wrong type or out of range; all mistakes together.

    >>> def half(tvs, *, keep: KeepFraction = 0.2): return tvs * keep
    >>> checked_call(half, 10.0, keep=0.5)
    5.0
    >>> checked_call(half, 10.0, keep=50)
    Traceback (most recent call last):
    calmerge._errors.UsageError: half.keep must lie in (0, 1], got 50. For 50 % write 0.5.
    """
    raise_together(check(fn, options))
    return fn(*args, **options)


def raise_together(problems: Sequence[str], error: type[CalmergeError] = UsageError) -> None:
    """Raise one ``error`` with all ``problems``, in their order; do nothing if there are none."""
    if len(problems) == 1:
        raise error(problems[0])
    if problems:
        raise error(f"{len(problems)} mistakes:\n" + "\n".join(f"  {p}" for p in problems))


def name_of(fn: Callable[..., Any]) -> str:
    """The name a reader knows the function by."""
    while isinstance(fn, functools.partial):
        fn = fn.func
    return str(getattr(fn, "__name__", type(fn).__name__))


def _prefix(where: str) -> str:
    return f"{where}: " if where else ""
