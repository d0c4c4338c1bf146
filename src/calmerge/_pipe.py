"""The `merge:` of a recipe: a pipe of calls, read with lines, checked against the functions, and turned into one call.

A step is `name` or `{name: {options}}`; a pipe is a step or a list of steps. An option that takes a merge, as `inner`
does, holds a pipe again. Every step is a call of the function of that name with those options, and nothing more.
"""

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from calmerge._errors import did_you_mean
from calmerge._signature import check, hints_of, options_of
from calmerge._yaml import Data, Node

Methods = Mapping[str, Callable[..., Any]]
DataUse = Literal["none", "unlabelled pool", "validation labels"]
PROVIDED = ("tasks", "run")
WHERE = "where"
"""The one step whose value is a list: cases of patterns and pipes."""


@dataclass(frozen=True)
class Step:
    """One call of a pipe.

    Attributes:
        name: of the function, in the table of methods.
        options: as written, with places.
        where: "file:line".
    """

    name: str
    options: Mapping[str, Node]
    where: str = field(compare=False)

    def to_data(self) -> Data:
        """The step as a recipe writes it: a bare name where there are no options."""
        if not self.options:
            return self.name
        if self.name == WHERE:
            return {WHERE: self.options["cases"].plain()}
        return {self.name: {key: node.plain() for key, node in self.options.items()}}

    def __str__(self) -> str:
        """The step as a call: "ties(keep=0.2)"."""
        return f"{self.name}({', '.join(f'{key}={node.plain()}' for key, node in self.options.items())})"


@dataclass(frozen=True)
class Surroundings:
    """What a pipe gets from outside: data, the run, the seed of steps that name none, and where paths start."""

    tasks: Any = None
    run: Any = None
    seed: int | None = None
    folder: Path = Path()


def read_pipe(node: Node, problems: list[str]) -> tuple[Step, ...]:
    """The steps that `node` writes; what is no step goes to `problems`.

    >>> from calmerge._yaml import parse
    >>> [s.to_data() for s in read_pipe(parse("[trim, {ties: {keep: 0.1}}]", "r.yaml"), [])]
    ['trim', {'ties': {'keep': 0.1}}]
    """
    nodes = node.value if node.is_list() else [node]
    if not nodes:
        problems.append(f"{node.where}: no method is given. Write a name, such as 'average'.")
    steps = []
    for one in nodes:
        if isinstance(one.value, str):
            steps.append(Step(one.value, {}, one.where))
        elif one.is_mapping() and len(one.value) == 1:
            ((name, options),) = one.items()
            if name == WHERE and options.is_list() and options.value:
                steps.append(Step(name, {"cases": options}, options.where))
            elif options.value is None or options.is_mapping():
                steps.append(Step(name, dict(options.items()), options.where))
            else:
                problems.append(
                    f"{options.where}: the options of {name} must be a mapping, as in "
                    f"{{{name}: {{option: value}}}}, got {options.plain()!r}."
                )
        elif one.is_mapping() and one.value:
            names = ", ".join(one.value)
            problems.append(
                f"{one.where}: a step is one method, but this entry has {len(one.value)} keys ({names}). "
                "Give each method its own '- ', and its options one level deeper."
            )
        else:
            problems.append(f"{one.where}: a method's name was expected, got {one.plain()!r}.")
    return tuple(steps)


def check_pipe(steps: Sequence[Step], methods: Methods, *, has_tasks: bool = True, inner: bool = False) -> list[str]:
    """All mistakes in a pipe: names, options, the order of steps, and data that are needed but not there.

    An `inner` pipe must end in one merge.
    """
    problems: list[str] = []
    for step in steps:
        if step.name == WHERE:
            problems += _check_cases(step, methods, has_tasks=has_tasks)
            continue
        if step.name not in methods:
            problems.append(f"{step.where}: no method is called '{step.name}'. {did_you_mean(step.name, methods)}")
            continue
        fn = methods[step.name]
        known = options_of(fn)
        lines = {"": step.where, **{key: node.where for key, node in step.options.items()}}
        options: dict[str, Any] = {}
        for key, node in step.options.items():
            options[key] = node.plain()
            if key in known and known[key].takes_merge and isinstance(node.value, (str, list, dict)):
                nested = read_pipe(node, problems)
                problems += check_pipe(nested, methods, has_tasks=has_tasks, inner=True)
                options[key] = _stand_in
        problems += check(fn, options, lines, name=step.name, provided=PROVIDED)
        if not has_tasks and needs_tasks(fn):
            problems.append(
                f"{step.where}: {step.name} learns from unlabelled data; add 'tasks:' to the recipe, "
                "or use a method that needs none, such as ties."
            )
    if all(step.name in methods or step.name == WHERE for step in steps):
        problems += _check_flow(steps, methods, inner=inner)
    return problems


def build_pipe(
    steps: Sequence[Step], methods: Methods, surroundings: Surroundings | None = None
) -> Callable[[Any], Any]:
    """The merge that checked `steps` describe: from task vectors to a delta.

    >>> from calmerge._yaml import parse
    >>> def double(tvs: "TaskVectors") -> "TaskVectors": return [2 * t for t in tvs]
    >>> def total(tvs: "TaskVectors", *, scale: float = 1.0) -> "Weights": return scale * sum(tvs)
    >>> steps = read_pipe(parse("[double, {total: {scale: 0.5}}]", "r.yaml"), [])
    >>> build_pipe(steps, {"double": double, "total": total})([1.0, 2.0])
    3.0
    """
    surroundings = surroundings or Surroundings()
    calls = [_call(step, methods, surroundings) for step in steps]
    if len(calls) == 1 and not takes_merged(_function(steps[0], methods)):
        return calls[0]
    posts = [takes_merged(_function(step, methods)) for step in steps]
    return functools.partial(_apply, tuple(zip(calls, posts, strict=True)))


def walk(steps: Sequence[Step], methods: Methods) -> Iterator[Step]:
    """All calls of a pipe and of the pipes inside them, outer before inner; unknown names are passed over."""
    for step in steps:
        if step.name == WHERE:
            for case in step.options["cases"].value if "cases" in step.options else ():
                if case.get("merge") is not None:
                    yield from walk(read_pipe(case.value["merge"], []), methods)
            continue
        yield step
        if step.name in methods:
            known = options_of(methods[step.name])
            for key, node in step.options.items():
                if key in known and known[key].takes_merge:
                    yield from walk(read_pipe(node, []), methods)


def needs_tasks(fn: Callable[..., Any]) -> bool:
    """Whether a method cannot do without data."""
    option = options_of(fn).get("tasks")
    return option is not None and option.required


def data_used(steps: Sequence[Step], methods: Methods) -> DataUse:
    """What of the tasks' data a pipe looks at: labels where a call in it is judged by the validation splits."""
    learning = [step for step in walk(steps, methods) if step.name in methods and needs_tasks(methods[step.name])]
    for step in learning:
        score = options_of(methods[step.name]).get("score")
        if score and (step.options["score"].plain() if "score" in step.options else score.default) == "validation":
            return "validation labels"
    return "unlabelled pool" if learning else "none"


def takes_merged(fn: Callable[..., Any]) -> bool:
    """Whether a function works on a merge: its first parameter is `Weights`, its second the task vectors."""
    return _first_hint(fn) == "Weights"


def gives_task_vectors(fn: Callable[..., Any]) -> bool:
    """Whether a function keeps the tasks apart, so that another method has to follow."""
    return _type_name(hints_of(fn).get("return"), fn, "return") == "TaskVectors"


def gives_patches(fn: Callable[..., Any]) -> bool:
    """Whether a function gives a model for each task (`Merged`), so that nothing can follow."""
    return _type_name(hints_of(fn).get("return"), fn, "return") == "Merged"


def _check_flow(steps: Sequence[Step], methods: Methods, *, inner: bool = False) -> list[str]:
    problems, merged, patched = [], "", ""
    for step in steps:
        fn = _function(step, methods)
        if patched:
            problems.append(
                f"{step.where}: {patched} before it gives a model for each task, and {step.name} takes one merge. "
                f"Put {step.name} into the 'inner' of {patched}, or leave one out."
            )
            continue
        if gives_patches(fn):
            patched = step.name
            if inner:
                problems.append(f"{step.where}: {step.name} gives a model for each task; here one merge is needed.")
        if takes_merged(fn) and not merged:
            problems.append(
                f"{step.where}: {step.name} works on a finished merge; put a method that merges, such as ties, "
                "before it."
            )
            merged = step.name
        elif not takes_merged(fn) and merged:
            problems.append(
                f"{step.where}: {step.name} takes task vectors, but {merged} before it has already merged them. "
                f"Put {step.name} before {merged}, or leave one out."
            )
        elif not gives_task_vectors(fn):
            merged = step.name
    if steps and not merged:
        problems.append(
            f"{steps[-1].where}: {steps[-1].name} gives one vector for each task and nothing merges them. "
            "Add a method that does, such as 'task_arithmetic' or 'average', as the last step."
        )
    return problems


def _call(step: Step, methods: Methods, surroundings: Surroundings) -> Callable[..., Any]:
    fn = _function(step, methods)
    if step.name == WHERE:
        return functools.partial(fn, cases=[_case(case, methods, surroundings) for case in step.options["cases"].value])
    known = options_of(fn)
    options: dict[str, Any] = {}
    for key, node in step.options.items():
        value = node.plain()
        if known[key].takes_merge and isinstance(value, (str, list, dict)):
            options[key] = build_pipe(read_pipe(node, []), methods, surroundings)
        elif known[key].takes_path and isinstance(value, str):
            options[key] = surroundings.folder / Path(value).expanduser()
        else:
            options[key] = value
    if "seed" in known and "seed" not in options and surroundings.seed is not None:
        options["seed"] = surroundings.seed
    for name in PROVIDED:
        value = getattr(surroundings, name)
        if name in known and value is not None:
            options[name] = value
    return functools.partial(fn, **options) if options else fn


def _function(step: Step, methods: Methods) -> Callable[..., Any]:
    if step.name != WHERE:
        return methods[step.name]
    from calmerge.pieces.where import where

    return where


def _check_cases(step: Step, methods: Methods, *, has_tasks: bool) -> list[str]:
    """All mistakes in the cases of a `where`."""
    problems: list[str] = []
    if "cases" not in step.options:
        return [f"{step.where}: where needs cases: [{{tensors: ['*.mlp.*'], merge: ties}}, {{merge: average}}]."]
    cases = step.options["cases"].value
    for position, case in enumerate(cases, 1):
        if not case.is_mapping():
            problems.append(f"{case.where}: a case of where is {{tensors: [patterns], merge: method}}.")
            continue
        given = {key: node.plain() for key, node in case.items()}
        merge = case.get("merge")
        if merge is not None and isinstance(merge.value, (str, list, dict)):
            inner = read_pipe(merge, problems)
            problems += check_pipe(inner, methods, has_tasks=has_tasks, inner=True)
            given["merge"] = _stand_in
        problems += check(_keys_of_a_case, given, case.lines(), name="where", noun="key")
        if "tensors" not in given and position < len(cases):
            problems.append(f"{case.where}: a case without 'tensors' takes all that are left; put it last.")
    return problems


def _keys_of_a_case(*, merge: Any, tensors: Sequence[str] = ("*",)) -> None:
    """One case of a `where`, in a form that `check` can read."""


def _case(node: Node, methods: Methods, surroundings: Surroundings) -> tuple[list[str], Callable[..., Any]]:
    tensors = node.get("tensors")
    patterns: Any = tensors.plain() if tensors is not None else ["*"]
    return patterns, build_pipe(read_pipe(node.value["merge"], []), methods, surroundings)


def _apply(calls: Sequence[tuple[Callable[..., Any], bool]], tvs: Any) -> Any:
    value = tvs
    for call, works_on_merge in calls:
        value = call(value, tvs) if works_on_merge else call(value)
    return value


def _first_hint(fn: Callable[..., Any]) -> str:
    first = next(iter(inspect.signature(fn).parameters), "")
    return _type_name(hints_of(fn).get(first), fn, first)


def _type_name(hint: Any, fn: Callable[..., Any], name: str) -> str:
    """The bare name of an annotation, resolved or still text."""
    if hint in (None, Any):
        hint = getattr(fn, "__annotations__", {}).get(name, "")
    text = hint if isinstance(hint, str) else getattr(hint, "__name__", "")
    return str(text).rsplit(".", 1)[-1]


def _stand_in(tvs: Any) -> Any:
    """Stands for a nested pipe while the options around it are checked."""
