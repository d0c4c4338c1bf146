"""Every parameter of a recipe with the value it comes to, and for which tensors: what `explain --recipe` prints."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from fnmatch import fnmatchcase
from typing import Any

from calmerge._pipe import PROVIDED, Methods, Step, read_pipe
from calmerge._recipe import Recipe
from calmerge._signature import name_of, options_of
from calmerge._yaml import Node

_CASES = "where"  # the step whose cases hold a pipe each, for some of the tensors


@dataclass(frozen=True)
class Setting:
    """One option of one step.

    Attributes:
        step: where it stands, as in "1 dare > inner 1 trim".
        option: its name.
        value: what it comes to.
        origin: `recipe`, `default`, or `seed` where the recipe's own seed fills it in.
        tensors: patterns of the tensors that it holds for; none if it holds for all.
        names: the tensors that these patterns leave for it, if the model's are known.
    """

    step: str
    option: str
    value: Any
    origin: str
    tensors: tuple[str, ...] = ()
    names: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)


def settings(recipe: Recipe, names: Sequence[str] = (), methods: Methods | None = None) -> list[Setting]:
    """All options of all steps, nested ones included; a step without options has one row without an option.

    Args:
        recipe: a checked recipe.
        names: the tensors that are merged, to say which of them a case takes.
        methods: functions by name; `calmerge.methods.METHODS` if not given.

    >>> from calmerge.recipe import recipe_from_dict
    >>> recipe = recipe_from_dict({"base": "b", "experts": {"a": "a"}, "merge": {"dare": {"rate": 0.5}}, "seed": 3})
    >>> [(s.option, s.value, s.origin) for s in settings(recipe)]
    [('rate', 0.5, 'recipe'), ..., ('seed', 3, 'seed')]
    """
    if methods is None:
        from calmerge.methods import METHODS

        methods = METHODS
    found = list(_of_pipe(recipe.merge, recipe.seed, methods, tuple(names), ""))
    for number, part in enumerate(recipe.parts(), 1):
        if isinstance(part, Recipe):
            label = f"{'slice' if recipe.stack else 'tower'} {number} > "
            found += [replace(one, step=label + one.step) for one in settings(part, (), methods)]
    return found


def _of_pipe(
    steps: Sequence[Step], seed: int | None, methods: Methods, names: tuple[str, ...], above: str
) -> Iterator[Setting]:
    for number, step in enumerate(steps, 1):
        label = f"{above}{number} {step.name}"
        if step.name == _CASES:
            yield from _of_cases(step.options["cases"].value, seed, methods, names, label)
        else:
            yield from _of_step(step, seed, methods, names, label)


def _of_step(step: Step, seed: int | None, methods: Methods, names: tuple[str, ...], label: str) -> Iterator[Setting]:
    known = options_of(methods[step.name], PROVIDED)
    if not known:
        yield Setting(label, "", None, "")
    for option in known.values():
        given = step.options.get(option.name)
        if given is not None and option.takes_merge and isinstance(given.value, str | list | dict):
            yield from _of_pipe(read_pipe(given, []), seed, methods, names, f"{label} > {option.name} ")
        elif given is not None:
            yield Setting(label, option.name, given.plain(), "recipe")
        elif option.name == "seed" and seed is not None:
            yield Setting(label, option.name, seed, "seed")
        else:
            value = name_of(option.default) if callable(option.default) else option.default
            yield Setting(label, option.name, value, "default")


def _of_cases(
    cases: Sequence[Node], seed: int | None, methods: Methods, names: tuple[str, ...], label: str
) -> Iterator[Setting]:
    """The settings of every case, each for the tensors that no case before it takes."""
    left = names
    for case in cases:
        given: Mapping[str, Node] = dict(case.items())
        patterns = tuple(str(one.plain()) for one in given["tensors"].value) if "tensors" in given else ("*",)
        taken = tuple(name for name in left if any(fnmatchcase(name, p) for p in patterns))
        gone = set(taken)
        left = tuple(name for name in left if name not in gone)
        for one in _of_pipe(read_pipe(given["merge"], []), seed, methods, taken, f"{label} > "):
            yield replace(one, tensors=one.tensors or patterns, names=one.names or taken)
