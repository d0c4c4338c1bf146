"""Recipes: a merge written down as YAML, checked whole before anything is read, and turned into plain calls.

A recipe adds no meaning of its own: `merge:` is a pipe of calls of the functions in `calmerge.methods`.
docs/recipes.md describes the file.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal

from calmerge._adapter_config import adapter_options
from calmerge._errors import UsageError, did_you_mean
from calmerge._inputs import Input, Piece, Tower, key_of, read_input, read_tower
from calmerge._pipe import Methods, Step, Surroundings, build_pipe, check_pipe, needs_tasks, read_pipe, walk
from calmerge._signature import Seed, check, options_of, raise_together
from calmerge._size import bytes_of
from calmerge._yaml import Data, Node, dump, from_data, load_documents, only_document
from calmerge.suites.suite import Suite, check_splits, lines_of, load_suite, located, read_model, read_tasks

if TYPE_CHECKING:
    from calmerge._merged import Merged
    from calmerge._run import Run
    from calmerge._task_vectors import TaskVectors
    from calmerge._tokens import TokenizerPlan
    from calmerge._weights import Weights
    from calmerge.tasks.base import Tasks

_MERGEKIT = ("merge_method", "models", "slices", "modules", "gate_mode", "genome")
DType = Literal["float32", "float16", "bfloat16"]


@dataclass(frozen=True, kw_only=True)
class Out:
    """Where the result goes.

    Args:
        path: a folder that does not exist yet; None if the command line says.
        dtype: of the floating tensors; the base's own if None.
        shard: largest size of one file, such as "5GB".
        max_memory: private memory that the process may take, such as "2GB"; None for no limit.
        adapter: write a LoRA adapter instead of full weights: "exact", or `rank`, `energy` and `full` as `save_adapter`
            has them.
    """

    path: Path | None = None
    dtype: DType | None = None
    shard: str | int | None = None
    max_memory: str | int | None = None
    adapter: Mapping[str, Any] | Literal["exact"] | None = None


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A checked recipe.

    Args:
        base: path (absolute) or hub id of what the experts were fine-tuned from, or another input (see `_inputs`); None
            for merges of the weights themselves.
        experts: path, hub id or other input by task.
        merge: the steps of the pipe.
        stack: inputs whose layers are put on top of each other, in place of base, experts and merge.
        towers: inputs of which each brings some of the tensors, in place of these as well.
        tokenizer: how the vocabularies are aligned; None leaves them.
        chat_template: of the result; None leaves the base's.
        exclude: shell patterns of tensors that are not merged.
        heads: shell patterns of tensors that are kept per task although all have them in one shape.
        tasks: the model's kind and the tasks' data, as a suite; None if the recipe has none.
        seed: given to every step that has a seed and names none; None leaves their defaults.
        out: where the result goes.
        data: the recipe as it was written.
        file: "recipe.yaml", for messages.
        folder: where relative paths start.
        lines: where base and experts are named, `{"base": "recipe.yaml:1", "experts.cars": "recipe.yaml:3"}`.
        name: what messages call the recipe where it is an input of another one.
    """

    base: Input | None
    experts: Mapping[str, Input]
    merge: Sequence[Step]
    stack: Sequence[Input] = ()
    towers: Sequence[Tower] = ()
    tokenizer: "TokenizerPlan | None" = None
    chat_template: str | None = None
    exclude: Sequence[str] = ()
    heads: Sequence[str] = ()
    tasks: Suite | None = None
    seed: int | None = None
    out: Out = field(default_factory=Out)
    data: Mapping[str, Data] = field(repr=False)
    file: str = "recipe"
    folder: Path = Path()
    lines: Mapping[str, str] = field(default_factory=dict, repr=False)
    name: str = "recipe"

    @property
    def without_heads(self) -> bool:
        """Whether all tensors have to be merged, none kept per task: merges of weights, and of aligned vocabularies."""
        return self.base is None or self.tokenizer is not None

    def inputs(self) -> list[Input]:
        """Base and experts, or the slices of the stack, or the towers."""
        named = [*([self.base] if self.base is not None else []), *self.experts.values()]
        return [*map(self.seeded, named), *self.parts()]

    def parts(self) -> list[Input]:
        """The slices of the stack, or the towers."""
        return [self.seeded(one) for one in [*self.stack, *(tower.source for tower in self.towers)]]

    @property
    def outline(self) -> str:
        """What a recipe without steps does: "a stack of 2 slices"."""
        what = f"a stack of {len(self.stack)} slice" if self.stack else f"{len(self.towers)} tower"
        return what + ("s" if len(self.parts()) > 1 else "")

    def seeded(self, source: Input) -> Input:
        """An input of this recipe; one that is a recipe without a seed has the seed of this one."""
        if isinstance(source, Piece) and isinstance(source.model, Recipe) and source.model.seed is None:
            return replace(source, model=with_seed(source.model, self.seed))
        return with_seed(source, self.seed) if isinstance(source, Recipe) and source.seed is None else source

    def models(self) -> list[Input]:
        """The inputs, those of a slice or a tower in its place where it is a recipe."""
        if not self.parts():
            return self.inputs()
        return [one for part in self.parts() for one in (part.models() if isinstance(part, Recipe) else [part])]

    def to_dict(self) -> dict[str, Data]:
        """The recipe as plain data, as it was written; `recipe_from_dict` reads it back."""
        return dict(self.data)

    def to_yaml(self) -> str:
        """The recipe as YAML."""
        return dump(self.to_dict())

    def needs_tasks(self, methods: Methods | None = None) -> bool:
        """Whether a step, or a merge inside one, learns from data."""
        table = _table(methods)
        return any(needs_tasks(table[step.name]) for step in walk(self.merge, table))


def load_recipe(path: str | Path, *, methods: Methods | None = None) -> Recipe:
    """The recipe of a YAML file; relative paths in it start at its folder.

    A file of mergekit's is told by its keys and becomes the recipe that says the same; its paths start where you are.

    Args:
        path: the file.
        methods: functions by name; `calmerge.methods.METHODS` if not given.

    Raises:
        UsageError: the file is missing or no YAML, or the recipe has mistakes: all together, each with its line.
    """
    path = Path(path).expanduser()
    documents = load_documents(path)
    if any(document.get(key) is not None for document in documents for key in _MERGEKIT):
        from calmerge.mergekit.convert import load_mergekit

        return load_mergekit(path)
    return _read(only_document(documents, path.name), path.name, path.resolve().parent, _table(methods))


def recipe_from_dict(
    data: Mapping[str, Any], *, folder: str | Path = ".", file: str = "recipe", methods: Methods | None = None
) -> Recipe:
    """The recipe of plain data; relative paths start at `folder`, `file` is what messages call it.

    Raises:
        UsageError: mistakes, all of them together, each with its place.
    """
    return _read(from_data(data, file), file, Path(folder).resolve(), _table(methods))


def build(
    recipe: Recipe, *, methods: Methods | None = None
) -> "Callable[[TaskVectors, Tasks | None, Run | None], Weights | Merged]":
    """The function that a recipe describes: from task vectors, data and surroundings to what its last step gives.

    >>> import torch; from calmerge import task_vectors
    >>> data = {"base": "./base", "experts": {"a": "./a"}, "merge": [{"task_arithmetic": {"scale": 0.5}}]}
    >>> tvs = task_vectors({"w": torch.zeros(1)}, {"a": {"w": torch.ones(1)}})
    >>> build(recipe_from_dict(data))(tvs, None, None)["w"]
    tensor([0.5000])
    """
    table = _table(methods)

    def merge(tvs: "TaskVectors", tasks: "Tasks | None" = None, run: "Run | None" = None) -> "Weights | Merged":
        if tasks is None and recipe.needs_tasks(table):
            raise UsageError(f"{recipe.file}: the merge learns from data, but no tasks were handed in.")
        surroundings = Surroundings(tasks, run, recipe.seed, recipe.folder)
        given: Weights | Merged = build_pipe(recipe.merge, table, surroundings)(tvs)
        return given

    return merge


def with_out(recipe: Recipe, **options: Any) -> Recipe:
    """The recipe with some keys of its `out` given anew, as a command line does; those that are None stay.

    Raises:
        UsageError: an option that cannot be.

    >>> data = {"base": "./base", "experts": {"a": "./a"}, "merge": "average", "out": "merged"}
    >>> with_out(recipe_from_dict(data), shard="1GB", dtype=None).to_dict()["out"]
    {'path': 'merged', 'shard': '1GB'}
    """
    given = {key: value for key, value in options.items() if value is not None}
    if not given:
        return recipe
    raise_together(_faults_of_out(given, {}))
    written = recipe.data.get("out")
    before = written if isinstance(written, dict) else {"path": written} if written else {}
    return replace(recipe, out=replace(recipe.out, **given), data={**recipe.data, "out": {**before, **given}})


def with_seed(recipe: Recipe, seed: int | None) -> Recipe:
    """The recipe with another seed; the same if it is None."""
    return recipe if seed is None else replace(recipe, seed=seed, data={**recipe.data, "seed": seed})


def with_last(recipe: Recipe, **options: Any) -> Recipe:
    """The recipe with other options of its last step, such as `preference` and `front` of `map_front`; None is none.

    Raises:
        UsageError: the last step has no such option, or does not take this value.

    >>> data = {"base": "./base", "experts": {"a": "./a"}, "merge": "average"}
    >>> with_last(recipe_from_dict(data), preference={"a": 1.0})
    Traceback (most recent call last):
    calmerge._errors.UsageError: average takes no preference; the last step must be one that does, such as map_front.
    """
    given = {name: value for name, value in options.items() if value is not None}
    if not given:
        return recipe
    last = recipe.merge[-1] if recipe.merge else None
    known = options_of(_table(None).get(last.name, with_last)) if last else {}
    for name in given:
        if last is None or name not in known:
            raise UsageError(
                f"{last.name if last else 'a stack'} takes no {name}; the last step must be one that does, such as "
                "map_front."
            )
    assert last is not None
    changed = {key: node.plain() for key, node in last.options.items()} | given
    steps = [*(step.to_data() for step in recipe.merge[:-1]), {last.name: changed}]
    return recipe_from_dict({**recipe.data, "merge": steps}, folder=recipe.folder, file=recipe.file)


# Reading -------------------------------------------------------------------------------------------------------


def _keys_of_a_recipe(
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


def _read(node: Node, file: str, folder: Path, methods: Methods, name: str = "recipe") -> Recipe:
    if not node.is_mapping():
        raise UsageError(f"{node.where}: a recipe is a mapping with the keys base, experts and merge.")
    problems: list[str] = []
    parts: dict[str, Any] = {key: part.plain() for key, part in node.items()}
    _check_keys(node, parts, methods, problems)
    parts |= {key: () for key in ("exclude", "heads") if not isinstance(parts.get(key, []), list)}  # a mistake by now

    def inner(node: Node, what: str) -> Recipe | None:
        return _read_inner(node, file, folder, methods, f"{what} ({node.where})", problems)

    def source(node: Node, what: str) -> Input | None:
        return read_input(node, folder, problems, what=what, read_recipe=inner)

    given = node.get("experts")
    found = {task: source(at, f"expert '{task}'") for task, at in (given.items() if given is not None else ())}
    experts = {task: at for task, at in found.items() if at is not None}
    stated = node.get("base")
    base = source(stated, "the base") if stated is not None and stated.value is not None else None
    stack = _read_stack(node, source, problems)
    towers = _read_towers(node, source, problems)
    plain = {task: at for task, at in experts.items() if isinstance(at, (Path, str))}
    suite = _read_tasks(node, file, folder, base if isinstance(base, (Path, str)) else None, plain, methods, problems)
    if suite is not None and "suite" in suite.data:  # a suite brings what the recipe leaves out
        base = base or suite.base
        experts = experts or dict(suite.experts)
        plain = plain or dict(suite.experts)
        parts = {"exclude": suite.exclude, "heads": suite.heads, **parts}
    if "stack" not in parts and "towers" not in parts:
        _check_inputs(node, base, experts, suite, problems)
    exclude, heads = (tuple(parts.get(key) or ()) for key in ("exclude", "heads"))
    if suite is not None:
        tasks = {n: replace(suite.tasks[n], expert=at) for n, at in plain.items() if n in suite.tasks}
        own = base if isinstance(base, (Path, str)) else suite.base
        suite = replace(suite, base=own, tasks=tasks, exclude=exclude, heads=heads)
    steps: tuple[Step, ...] = ()
    if node.get("merge") is not None:
        steps = read_pipe(node.value["merge"], problems)
        problems += check_pipe(steps, methods, has_tasks=node.get("tasks") is not None, inner=name != "recipe")
    out = _read_out(node.get("out"), folder, problems)
    tokenizer = _read_tokenizer(node, folder, base, experts, [*stack, *(one.source for one in towers)], problems)
    raise_together(problems)
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
        tasks=suite,
        seed=parts.get("seed"),
        out=out,
        data=node.plain(),  # type: ignore[arg-type]
        file=file,
        folder=folder,
        lines=_lines(node),
        name=name,
    )


def _lines(node: Node) -> dict[str, str]:
    base, named = node.get("base"), node.get("experts")
    lines = {f"experts.{name}": at.where for name, at in (named.items() if named else ())}
    return {**({"base": base.where} if base else {}), **lines}


def _read_inner(node: Node, file: str, folder: Path, methods: Methods, name: str, problems: list[str]) -> Recipe | None:
    """A recipe that is an input of another one: it has no data and no place of its own."""
    for key in ("tasks", "model", "transductive", "heads"):
        if node.get(key) is not None:
            problems.append(f"{node.value[key].where}: a merge inside a recipe cannot have '{key}'.")
            return None
    try:
        return _read(node, file, folder, methods, name)
    except UsageError as e:
        problems += [line.strip() for line in str(e).splitlines() if not line.endswith("mistakes:")]
        return None


def _read_stack(node: Node, source: Callable[[Node, str], Input | None], problems: list[str]) -> tuple[Input, ...]:
    stack = node.get("stack")
    if stack is None:
        return ()
    if not stack.is_list() or not stack.value:
        problems.append(f"{stack.where}: 'stack' is a list of slices, as in [{{model: ./a, layers: [0, 8]}}, ...].")
        return ()
    _check_apart(node, "stack", ("base", "experts", "merge"), "a slice", problems)
    slices = []
    for position, one in enumerate(stack.value, 1):
        _check_part(one, ("stack", "towers", "tokenizer", "chat_template", "out"), "a slice of a stack", problems)
        slices.append(source(one, f"slice {position}"))
    return tuple(one for one in slices if one is not None)


def _read_towers(node: Node, source: Callable[[Node, str], Input | None], problems: list[str]) -> tuple[Tower, ...]:
    towers = node.get("towers")
    if towers is None:
        return ()
    if not towers.is_list() or not towers.value:
        problems.append(
            f"{towers.where}: 'towers' is a list of inputs, as in [{{tensors: ['vision.*'], model: ./a}}, ...]."
        )
        return ()
    _check_apart(node, "towers", ("base", "experts", "merge", "stack"), "a tower", problems)
    found = []
    for position, one in enumerate(towers.value, 1):
        _check_part(one, ("towers", "tokenizer", "chat_template", "out"), "a tower", problems)
        if one.get("tensors") is None and position < len(towers.value):
            problems.append(
                f"{one.where}: a tower without 'tensors' takes all that are left, so that none comes behind it."
            )
        found.append(read_tower(one, f"tower {position}", source, problems))
    return tuple(one for one in found if one is not None)


def _check_apart(node: Node, what: str, keys: Sequence[str], place: str, problems: list[str]) -> None:
    for key in keys:
        if node.get(key) is not None:
            problems.append(f"{node.value[key].where}: a recipe has '{what}' or '{key}'; put '{key}' into {place}.")


def _check_part(node: Node, keys: Sequence[str], what: str, problems: list[str]) -> None:
    for key in keys:
        if node.get(key) is not None:
            problems.append(f"{node.value[key].where}: {what} cannot have '{key}' of its own.")


def _read_tokenizer(
    node: Node,
    folder: Path,
    base: Input | None,
    experts: Mapping[str, Input],
    parts: Sequence[Input],
    problems: list[str],
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
    return read_tokenizer(section, lambda text: names.get(text, str(located(text, folder))), problems)


def _check_keys(node: Node, parts: Mapping[str, Any], methods: Methods, problems: list[str]) -> None:
    known = options_of(_keys_of_a_recipe)
    misplaced = set()
    for key, part in node.items():
        owners = [] if key in known else [name for name, fn in methods.items() if key in options_of(fn)]
        if owners:
            misplaced.add(key)
            problems.append(
                f"{part.where}: '{key}' is an option of {' and '.join(owners[:2])}; write it there, as in "
                f"merge: [{{{owners[0]}: {{{key}: {part.plain()}}}}}]."
            )
    parts = {key: value for key, value in parts.items() if key not in misplaced}
    problems += check(_keys_of_a_recipe, parts, node.lines(), name="recipe", noun="key")


def _check_inputs(
    node: Node,
    base: Input | None,
    experts: Mapping[str, Input],
    suite: Suite | None,
    problems: list[str],
) -> None:
    if "merge" not in node.value:
        problems.append(f"{node.where}: recipe needs the key 'merge'.")
    if base is None and "base" not in node.value:
        problems.append(f"{node.where}: recipe needs the key 'base': what the experts were fine-tuned from.")
    if not experts:
        given = node.get("experts")
        if given is None:
            problems.append(f"{node.where}: recipe needs the key 'experts', as in {{cars: ./cars, dtd: ./dtd}}.")
        elif given.value is None or given.value == {}:
            problems.append(f"{given.where}: 'experts' is empty; a merge needs at least one.")
    if suite is not None and experts:
        section = node.value["tasks"]
        for name in experts:
            if name not in suite.tasks:
                problems.append(
                    f"{section.where}: expert '{name}' has no task of that name. {did_you_mean(name, suite.tasks)}"
                )
        for name in suite.tasks:
            if name not in experts and "suite" not in suite.data:
                where = section.value[name].where
                problems.append(f"{where}: task '{name}' has no expert. {did_you_mean(name, experts)}")


def _read_tasks(
    node: Node,
    file: str,
    folder: Path,
    base: Path | str | None,
    experts: Mapping[str, Path | str],
    methods: Methods,
    problems: list[str],
) -> Suite | None:
    """The suite that `tasks:` names, or one made of the tasks written there."""
    section = node.get("tasks")
    if section is None:
        return None
    name = section.get("suite")
    if name is not None and isinstance(name.value, str):
        for key, part in section.items():
            if key != "suite":
                problems.append(f"{part.where}: a suite brings its own tasks; remove '{key}', or the suite.")
        try:
            beside = folder / name.value
            return load_suite(beside if beside.is_file() else name.value, methods=methods)
        except UsageError as e:
            problems.append(f"{name.where}: {e}")
            return None
    before = len(problems)
    tasks = read_tasks(section, folder, problems, experts=experts)
    given = node.get("model")
    model = read_model(given, problems) if given is not None else None
    stated = node.get("transductive")
    transductive = stated is not None and stated.value is True
    lines = dict(lines_of(section, "tasks."))
    for task in tasks.values():
        check_splits(task, lines, transductive, problems)
    if given is None:
        problems.append(
            f"{section.where}: data need to know the model: add 'model: {{kind: sequence-classifier}}' to the recipe "
            "(or image-classifier, or sentence-encoder)."
        )
    if len(problems) > before or model is None:
        return None
    return Suite(
        name=Path(file).stem,
        version=1,
        title=file,
        model=model,
        base=base or "",
        tasks=tasks,
        transductive=transductive,
        file=folder / file,
        folder=folder,
        data={},
        lines=lines,
    )


def _read_out(node: Node | None, folder: Path, problems: list[str]) -> Out:
    if node is None:
        return Out()
    plain = node.plain()
    options = plain if isinstance(plain, dict) else {"path": plain}
    lines = node.lines() if node.is_mapping() else {"": node.where}
    adapter = node.get("adapter") if node.is_mapping() else None
    if adapter is not None and adapter.is_mapping():
        lines |= {f"adapter.{key}": part.where for key, part in adapter.items()}
    faults = _faults_of_out(options, lines)
    problems += faults
    if faults:
        return Out()
    path = options.get("path")
    return Out(**{**options, "path": folder / Path(str(path)).expanduser() if path else None})  # type: ignore[arg-type]


def _faults_of_out(options: Mapping[str, Any], lines: Mapping[str, str]) -> list[str]:
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


def _table(methods: Methods | None) -> Methods:
    if methods is not None:
        return methods
    from calmerge.methods import METHODS

    table: Methods = METHODS
    return table
