"""Reading recipes: from YAML with its lines to a recipe, every mistake told with its place, all of them together."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from calmerge._adapter_config import adapter_options
from calmerge._errors import UsageError, did_you_mean
from calmerge._inputs import Input, Tower, key_of, read_input, read_tower
from calmerge._pipe import Methods, Step, check_pipe, read_pipe
from calmerge._recipe import Out, Recipe
from calmerge._signature import Seed, check, options_of, raise_together
from calmerge._size import bytes_of
from calmerge._yaml import Node
from calmerge.suites.suite import Suite, check_splits, lines_of, load_suite, located, read_model, read_tasks

if TYPE_CHECKING:
    from calmerge._tokens import TokenizerPlan


def keys_of_a_recipe(
    *,
    merge: Any = None,
    base: Any = None,
    experts: Mapping[str, Any] = MappingProxyType({}),
    stack: Any = None,
    towers: Any = None,
    tokenizer: Any = None,
    chat_template: str | None = None,
    exclude: Sequence[str] = (),
    heads: Sequence[str] = (),
    model: Any = None,
    tasks: Any = None,
    transductive: bool = False,
    seed: Seed = 0,
    out: Any = None,
) -> None:
    """The top level of the file, in a form that `check` can read."""


def read_recipe(node: Node, file: str, folder: Path, methods: Methods) -> Recipe:
    """The recipe that a document writes.

    Args:
        node: the document.
        file: its name, for messages.
        folder: where relative paths start.
        methods: functions by name.

    Raises:
        UsageError: all mistakes together, each with its line.
    """
    reading = _Reading(file, folder, methods)
    found = reading.recipe(node)
    raise_together(reading.problems)
    assert found is not None  # or there is a problem
    return found


class _Reading:
    """One pass over a document, collecting mistakes."""

    def __init__(self, file: str, folder: Path, methods: Methods) -> None:
        self.file, self.folder, self.methods = file, folder, methods
        self.problems: list[str] = []

    def recipe(self, node: Node, name: str = "recipe") -> Recipe | None:
        """What a document writes, or a recipe inside of it, under its name; None if there is a mistake in it."""
        before = len(self.problems)
        if not node.is_mapping():
            self.problems.append(f"{node.where}: a recipe is a mapping with the keys base, experts and merge.")
            return None
        parts: dict[str, Any] = {key: part.plain() for key, part in node.items()}
        self._check_keys(node, parts)
        base, experts = self._models(node)
        stack, towers = self._stack(node), self._towers(node)
        suite = self._suite(node, base, experts)
        if suite is not None and "suite" in suite.data:  # it brings what the recipe leaves out
            base, experts = base or suite.base, experts or dict(suite.experts)
            parts = {"exclude": suite.exclude, "heads": suite.heads, **parts}
        if node.get("stack") is None and node.get("towers") is None:
            self._check_inputs(node, base, experts, suite)
        steps: tuple[Step, ...] = ()
        if node.get("merge") is not None:
            steps = read_pipe(node.value["merge"], self.problems)
            has_tasks = node.get("tasks") is not None
            self.problems += check_pipe(steps, self.methods, has_tasks=has_tasks, inner=name != "recipe")
        out = self._out(node.get("out"))
        tokenizer = self._tokenizer(node, base, experts, [*stack, *(one.source for one in towers)])
        if len(self.problems) > before:
            return None
        exclude, heads = (tuple(parts.get(key) or ()) for key in ("exclude", "heads"))
        return Recipe(
            base=base,
            experts=experts,
            merge=steps,
            stack=stack,
            towers=towers,
            tokenizer=tokenizer,
            chat_template=parts.get("chat_template"),
            exclude=exclude,
            heads=heads,
            tasks=suite and _with_models(suite, base, experts, exclude, heads),
            seed=parts.get("seed"),
            out=out,
            data=node.plain(),  # type: ignore[arg-type]
            file=self.file,
            folder=self.folder,
            lines=_lines(node),
            name=name,
        )

    # Models -------------------------------------------------------------------------------------------------

    def _models(self, node: Node) -> tuple[Input | None, dict[str, Input]]:
        """Base and experts; those that are mistakes are left out."""
        given, stated = node.get("experts"), node.get("base")
        found = {task: self._input(at, f"expert '{task}'") for task, at in (given.items() if given else ())}
        base = self._input(stated, "the base") if stated is not None and stated.value is not None else None
        return base, {task: at for task, at in found.items() if at is not None}

    def _input(self, node: Node, what: str) -> Input | None:
        return read_input(node, self.folder, self.problems, what=what, read_recipe=self._inner)

    def _inner(self, node: Node, what: str) -> Recipe | None:
        """A recipe that is an input of another one: it has no data and no place of its own."""
        for key in ("tasks", "model", "transductive", "heads"):
            if node.get(key) is not None:
                self.problems.append(f"{node.value[key].where}: a merge inside a recipe cannot have '{key}'.")
                return None
        return self.recipe(node, f"{what} ({node.where})")

    def _stack(self, node: Node) -> tuple[Input, ...]:
        like = "slices, as in [{model: ./a, layers: [0, 8]}, ...]"
        found = []
        for position, one in enumerate(self._parts(node, "stack", "a slice of a stack", like), 1):
            found.append(self._input(one, f"slice {position}"))
        return tuple(one for one in found if one is not None)

    def _towers(self, node: Node) -> tuple[Tower, ...]:
        like = "inputs, as in [{tensors: ['vision.*'], model: ./a}, ...]"
        found, parts = [], self._parts(node, "towers", "a tower", like)
        for position, one in enumerate(parts, 1):
            if one.get("tensors") is None and position < len(parts):
                self.problems.append(
                    f"{one.where}: a tower without 'tensors' takes all that are left, so that none comes behind it."
                )
            found.append(read_tower(one, f"tower {position}", self._input, self.problems))
        return tuple(one for one in found if one is not None)

    def _parts(self, node: Node, key: str, what: str, like: str) -> list[Node]:
        """The entries of a list that stands in place of base, experts and merge; none if there is no such list."""
        listed = node.get(key)
        if listed is None:
            return []
        if not listed.is_list() or not listed.value:
            self.problems.append(f"{listed.where}: '{key}' is a list of {like}.")
            return []
        for other in ("base", "experts", "merge", *(["stack"] if key == "towers" else [])):
            if node.get(other) is not None:
                self.problems.append(
                    f"{node.value[other].where}: a recipe has '{key}' or '{other}'; put '{other}' into {what}."
                )
        parts: list[Node] = listed.value
        for one in parts:
            for inner in ("towers", "tokenizer", "chat_template", "out", *(["stack"] if key == "stack" else [])):
                if one.get(inner) is not None:
                    self.problems.append(f"{one.value[inner].where}: {what} cannot have '{inner}' of its own.")
        return parts

    def _tokenizer(
        self, node: Node, base: Input | None, experts: Mapping[str, Input], parts: Sequence[Input]
    ) -> "TokenizerPlan | None":
        section = node.get("tokenizer")
        if section is None:
            return None
        from calmerge._tokens import read_tokenizer

        names = {**{task: key_of(at) for task, at in experts.items()}, **({"base": key_of(base)} if base else {})}
        for part in parts:
            inner = [one for one in [part, *part.stack] if isinstance(one, Recipe)] if isinstance(part, Recipe) else []
            for one in inner:
                named: dict[str, Input | None] = {**one.experts, "base": one.base}
                names |= {task: key_of(at) for task, at in named.items() if at is not None}

        def model_of(text: str) -> str:
            return names.get(text, str(located(text, self.folder)))

        return read_tokenizer(section, model_of, names.get("base"), self.problems)

    # Mistakes -----------------------------------------------------------------------------------------------

    def _check_keys(self, node: Node, parts: Mapping[str, Any]) -> None:
        known = options_of(keys_of_a_recipe)
        misplaced = set()
        for key, part in node.items():
            owners = [] if key in known else [name for name, fn in self.methods.items() if key in options_of(fn)]
            if owners:
                misplaced.add(key)
                self.problems.append(
                    f"{part.where}: '{key}' is an option of {' and '.join(owners[:2])}; write it there, as in "
                    f"merge: [{{{owners[0]}: {{{key}: {part.plain()}}}}}]."
                )
        parts = {key: value for key, value in parts.items() if key not in misplaced}
        self.problems += check(keys_of_a_recipe, parts, node.lines(), name="recipe", noun="key")

    def _check_inputs(self, node: Node, base: Input | None, experts: Mapping[str, Input], suite: Suite | None) -> None:
        if "merge" not in node.value:
            self.problems.append(f"{node.where}: recipe needs the key 'merge'.")
        if base is None and "base" not in node.value:
            self.problems.append(f"{node.where}: recipe needs the key 'base': what the experts were fine-tuned from.")
        if not experts:
            given = node.get("experts")
            if given is None:
                self.problems.append(
                    f"{node.where}: recipe needs the key 'experts', as in {{cars: ./cars, dtd: ./dtd}}."
                )
            elif given.value is None or given.value == {}:
                self.problems.append(f"{given.where}: 'experts' is empty; a merge needs at least one.")
        if suite is not None and experts:
            self._check_tasks(node.value["tasks"], experts, suite)

    def _check_tasks(self, section: Node, experts: Mapping[str, Input], suite: Suite) -> None:
        for name in experts:
            if name not in suite.tasks:
                self.problems.append(
                    f"{section.where}: expert '{name}' has no task of that name. {did_you_mean(name, suite.tasks)}"
                )
        for name in suite.tasks:
            if name not in experts and "suite" not in suite.data:
                where = section.value[name].where
                self.problems.append(f"{where}: task '{name}' has no expert. {did_you_mean(name, experts)}")

    # Data and result ----------------------------------------------------------------------------------------

    def _suite(self, node: Node, base: Input | None, experts: Mapping[str, Input]) -> Suite | None:
        """The suite that `tasks:` names, or one made of the tasks written there."""
        section = node.get("tasks")
        if section is None:
            return None
        name = section.get("suite")
        if name is not None and isinstance(name.value, str):
            return self._named_suite(section, name)
        before = len(self.problems)
        tasks = read_tasks(section, self.folder, self.problems, experts=_places(experts))
        given = node.get("model")
        model = read_model(given, self.problems) if given is not None else None
        stated = node.get("transductive")
        transductive = stated is not None and stated.value is True
        lines = dict(lines_of(section, "tasks."))
        for task in tasks.values():
            check_splits(task, lines, transductive, self.problems)
        if given is None:
            self.problems.append(
                f"{section.where}: data need to know the model: add 'model: {{kind: sequence-classifier}}' to the "
                "recipe (or image-classifier, or sentence-encoder)."
            )
        if len(self.problems) > before or model is None:
            return None
        return Suite(
            name=Path(self.file).stem,
            version=1,
            title=self.file,
            model=model,
            base=base if isinstance(base, (Path, str)) else "",
            tasks=tasks,
            transductive=transductive,
            file=self.folder / self.file,
            folder=self.folder,
            data={},
            lines=lines,
        )

    def _named_suite(self, section: Node, name: Node) -> Suite | None:
        for key, part in section.items():
            if key != "suite":
                self.problems.append(f"{part.where}: a suite brings its own tasks; remove '{key}', or the suite.")
        try:
            beside = self.folder / name.value
            return load_suite(beside if beside.is_file() else name.value, methods=self.methods)
        except UsageError as e:
            self.problems.append(f"{name.where}: {e}")
            return None

    def _out(self, node: Node | None) -> Out:
        if node is None:
            return Out()
        plain = node.plain()
        options = plain if isinstance(plain, dict) else {"path": plain}
        lines = node.lines() if node.is_mapping() else {"": node.where}
        adapter = node.get("adapter") if node.is_mapping() else None
        if adapter is not None and adapter.is_mapping():
            lines |= {f"adapter.{key}": part.where for key, part in adapter.items()}
        faults = faults_of_out(options, lines)
        self.problems += faults
        if faults:
            return Out()
        path = options.get("path")
        found = {**options, "path": self.folder / Path(str(path)).expanduser() if path else None}
        return Out(**found)  # type: ignore[arg-type]


def _lines(node: Node) -> dict[str, str]:
    base, named = node.get("base"), node.get("experts")
    lines = {f"experts.{name}": at.where for name, at in (named.items() if named else ())}
    return {**({"base": base.where} if base else {}), **lines}


def _places(experts: Mapping[str, Input]) -> dict[str, Path | str]:
    """The experts that are checkpoints."""
    return {task: at for task, at in experts.items() if isinstance(at, (Path, str))}


def _with_models(
    suite: Suite, base: Input | None, experts: Mapping[str, Input], exclude: tuple[str, ...], heads: tuple[str, ...]
) -> Suite:
    """A suite with the base and the experts of a recipe."""
    tasks = {n: replace(suite.tasks[n], expert=at) for n, at in _places(experts).items() if n in suite.tasks}
    own = base if isinstance(base, (Path, str)) else suite.base
    return replace(suite, base=own, tasks=tasks, exclude=exclude, heads=heads)


def faults_of_out(options: Mapping[str, Any], lines: Mapping[str, str]) -> list[str]:
    """What is wrong with the options of `out`, with their places by key."""
    faults = check(Out, options, lines, name="out", noun="key")
    adapter = options.get("adapter")
    if adapter is not None and not faults:
        for key in {"shard", "max_memory"} & options.keys():
            faults.append(f"{lines.get(key, '')}: out.{key} is for full weights; an adapter is one small file.")
        if isinstance(adapter, Mapping):
            inner = {key.removeprefix("adapter."): where for key, where in lines.items() if key.startswith("adapter.")}
            where = {"": lines.get("adapter", "")} | inner
            faults += check(adapter_options, adapter, where, name="out.adapter", noun="key")
    for key in ("shard", "max_memory"):
        try:
            if options.get(key) is not None and not faults:
                bytes_of(options[key], f"out.{key}")
        except UsageError as e:
            faults.append(f"{lines[key]}: {e}" if key in lines else str(e))
    return faults
