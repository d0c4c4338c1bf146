"""The options of a merge, seen from outside: listed, named in a search space, and set anew.

A merge is a function, a `functools.partial` of one, or a pipe of these; an option is called `method.option`.
"""

import functools
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from calmerge._errors import UsageError, did_you_mean
from calmerge._hints import alternatives, fault_of
from calmerge._run import Run
from calmerge._signature import name_of, options_of, raise_together
from calmerge.fitting.search import Choice, Range, Value
from calmerge.tasks.base import Tasks

_PROVIDED = ("tasks", "run")


def with_options(
    merge: Callable[..., Any], values: Mapping[str, Value], tasks: Tasks | None = None
) -> Callable[..., Any]:
    """The same merge with some options set; a method that stands in it twice gets them twice.

    What learns inside it keeps no state, as that would belong to other options, and learns from `tasks` if given.

    >>> from functools import partial
    >>> from calmerge import ties
    >>> with_options(partial(ties, keep=0.2), {"ties.keep": 0.5}).keywords
    {'keep': 0.5}
    """
    if not isinstance(merge, functools.partial):
        own = _set({}, name_of(merge), values)
        return functools.partial(merge, **own) if own else merge
    args = tuple(_inside(arg, values, tasks) for arg in merge.args)
    keywords = {key: _inside(value, values, tasks) for key, value in merge.keywords.items()}
    keywords = _set(keywords, name_of(merge), values)
    if "run" in keywords:
        keywords["run"] = Run()
    if "tasks" in keywords and tasks is not None:
        keywords["tasks"] = tasks
    return functools.partial(merge.func, *args, **keywords)


def functions_of(merge: Callable[..., Any]) -> Iterator[Callable[..., Any]]:
    """All functions that a merge is made of, outer before inner.

    >>> from functools import partial
    >>> from calmerge import lines, ties
    >>> [f.__name__ for f in functions_of(partial(ties, keep=0.2))]
    ['ties']
    """
    fn = merge.func if isinstance(merge, functools.partial) else merge
    if not fn.__name__.startswith("_"):
        yield fn
    if isinstance(merge, functools.partial):
        for value in [*merge.args, *merge.keywords.values()]:
            for one in _callables(value):
                yield from functions_of(one)


def learns(merge: Callable[..., Any]) -> bool:
    """Whether something in a merge is fitted to data.

    >>> from calmerge import adamerging, ties
    >>> learns(ties), learns(adamerging)
    (False, True)
    """
    return any("tasks" in options_of(fn) for fn in functions_of(merge))


def describe(merge: Any) -> str:
    """A merge in words that are the same in every process.

    >>> from functools import partial
    >>> from calmerge import ties
    >>> describe(partial(ties, keep=0.2))
    'ties(keep=0.2)'
    """
    if isinstance(merge, functools.partial):
        given = [describe(arg) for arg in merge.args]
        given += [f"{key}={describe(value)}" for key, value in merge.keywords.items() if key not in _PROVIDED]
        return f"{name_of(merge)}({', '.join(given)})"
    if isinstance(merge, list | tuple):
        return f"[{', '.join(map(describe, merge))}]"
    return name_of(merge) if callable(merge) else repr(merge)


def read_space(merge: Callable[..., Any], space: Mapping[str, Any]) -> dict[str, Range | Choice]:
    """The ranges and choices that `space` writes for options of `merge`.

    Raises:
        UsageError: an option that no method of the merge has, values that it does not take, or no range; all together.

    >>> from calmerge import ties
    >>> read_space(ties, {"ties.keep": [0.1, 0.9], "ties.combine": {"choices": ["mean", "sum"]}})["ties.keep"]
    Range(low=0.1, high=0.9, log=False, whole=False)
    """
    known = {
        f"{name_of(fn)}.{o}": one.hint for fn in functions_of(merge) for o, one in options_of(fn, _PROVIDED).items()
    }
    problems: list[str] = []
    found: dict[str, Range | Choice] = {}
    for name, written in space.items():
        option, entry = _split(name)
        if option not in known:
            problems.append(f"space: no option '{option}' in {describe(merge)}. {did_you_mean(option, known)}")
            continue
        try:
            one = _read(written, whole=_is_whole(known[option]))
        except UsageError as wrong:
            problems.append(f"space: {name}: {wrong}")
            continue
        for value in one.values if isinstance(one, Choice) else (one.low, one.high):
            fault = fault_of({entry: value} if entry else value, known[option])
            if fault:
                problems.append(f"space: {name} {fault}")
        found[name] = one
    raise_together(problems)
    return found


def _read(written: Any, *, whole: bool) -> Range | Choice:
    if isinstance(written, Range | Choice):
        return written
    numbers = isinstance(written, Sequence) and not isinstance(written, str) and len(written) == 2
    if numbers and all(isinstance(v, int | float) and not isinstance(v, bool) for v in written):
        return Range(written[0], written[1], whole=whole)
    if isinstance(written, Mapping) and set(written) == {"choices"} and isinstance(written["choices"], list | tuple):
        return Choice(tuple(written["choices"]))
    if isinstance(written, Mapping) and {"low", "high"} <= set(written) <= {"low", "high", "log"}:
        return Range(written["low"], written["high"], bool(written.get("log", False)), whole)
    raise UsageError(f"write [low, high], {{low: .., high: .., log: true}} or {{choices: [a, b]}}, got {written!r}.")


def _set(keywords: dict[str, Any], name: str, values: Mapping[str, Value]) -> dict[str, Any]:
    for path, value in values.items():
        (option, entry) = _split(path)
        owner, _, key = option.partition(".")
        if owner == name:
            keywords[key] = {**(keywords.get(key) or {}), entry: value} if entry else value
    return keywords


def _split(path: str) -> tuple[str, str]:
    """ "ties.keep" and the entry of a mapping after it, if there is one."""
    parts = path.split(".", 2)
    return ".".join(parts[:2]), parts[2] if len(parts) == 3 else ""


def _inside(value: Any, values: Mapping[str, Value], tasks: Tasks | None) -> Any:
    if isinstance(value, list | tuple):
        return type(value)(_inside(one, values, tasks) for one in value)
    return with_options(value, values, tasks) if _is_merge(value) else value


def _callables(value: Any) -> Iterator[Callable[..., Any]]:
    if isinstance(value, list | tuple):
        for one in value:
            yield from _callables(one)
    elif _is_merge(value):
        yield value


def _is_merge(value: Any) -> bool:
    return isinstance(value, functools.partial) or hasattr(value, "__code__")


def _is_whole(hint: Any) -> bool:
    return all(
        (typing.get_args(h)[0] if typing.get_origin(h) is typing.Annotated else h) in (int, type(None))
        for h in alternatives(hint)
    )
