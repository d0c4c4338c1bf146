"""Recipes: a merge written down as YAML, checked whole before anything is read, and turned into plain calls.

A recipe adds no meaning of its own: `merge:` is a pipe of calls of the functions in `calmerge.methods`.
docs/recipes.md describes the file.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from calmerge._errors import UsageError
from calmerge._pipe import Methods, Surroundings, build_pipe
from calmerge._recipe import Out as Out
from calmerge._recipe import Recipe as Recipe
from calmerge._recipe import table
from calmerge._recipe import with_seed as with_seed
from calmerge._recipe_reading import faults_of_out, read_recipe
from calmerge._signature import options_of, raise_together
from calmerge._yaml import from_data, load_documents, only_document

if TYPE_CHECKING:
    from calmerge._merged import Merged
    from calmerge._run import Run
    from calmerge._task_vectors import TaskVectors
    from calmerge._weights import Weights
    from calmerge.tasks.base import Tasks

_MERGEKIT = ("merge_method", "models", "slices", "modules", "gate_mode", "genome")


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
    return read_recipe(only_document(documents, path.name), path.name, path.resolve().parent, table(methods))


def recipe_from_dict(
    data: Mapping[str, Any], *, folder: str | Path = ".", file: str = "recipe", methods: Methods | None = None
) -> Recipe:
    """The recipe of plain data; relative paths start at `folder`, `file` is what messages call it.

    Raises:
        UsageError: mistakes, all of them together, each with its place.
    """
    return read_recipe(from_data(data, file), file, Path(folder).resolve(), table(methods))


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
    known = table(methods)

    def merge(tvs: "TaskVectors", tasks: "Tasks | None" = None, run: "Run | None" = None) -> "Weights | Merged":
        if tasks is None and recipe.needs_tasks(known):
            raise UsageError(f"{recipe.file}: the merge learns from data, but no tasks were handed in.")
        surroundings = Surroundings(tasks, run, recipe.seed, recipe.folder)
        given: Weights | Merged = build_pipe(recipe.merge, known, surroundings)(tvs)
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
    raise_together(faults_of_out(given, {}))
    written = recipe.data.get("out")
    before = written if isinstance(written, dict) else {"path": written} if written else {}
    return replace(recipe, out=replace(recipe.out, **given), data={**recipe.data, "out": {**before, **given}})


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
    known = options_of(table(None).get(last.name, with_last)) if last else {}
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
