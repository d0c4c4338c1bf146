"""Opening what a recipe names: its models from their headers, laid out as the recipe says, ready to be merged."""

from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from functools import reduce
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from calmerge._checkpoint import open_checkpoint
from calmerge._errors import CheckpointError, UsageError, did_you_mean
from calmerge._inputs import Input, Piece, Place, Tower, key_of
from calmerge._lora import adapted
from calmerge._side_files import beside
from calmerge._signature import raise_together
from calmerge._stack import WHOLE, Part, depth, side_by_side, some_layers, stack_layers
from calmerge._task_vectors import TaskVectors, task_vectors
from calmerge._weights import ALL, Memo, Node, Spec, StateDict, Weights, add, digest

if TYPE_CHECKING:
    from calmerge._recipe import Recipe

Opened = Mapping[str, Weights]
"""Whole models by key, with their vocabularies aligned where the recipe wants that."""


def open_recipe(recipe: "Recipe", opened: Opened | None = None, part: Part = WHOLE) -> TaskVectors:
    """The task vectors of a recipe, from headers alone; of a stack or towers, a base that is finished and no task.

    Args:
        recipe: a checked recipe.
        opened: its models, where they are open already.
        part: which tensors are wanted, and where their layers go, where the recipe is a slice of a stack.

    Raises:
        CheckpointError: a checkpoint cannot be read, or does not fit the others.
        UsageError: a pattern of a tower fits no tensor.
    """
    plain = all(isinstance(source, (str, Path)) for source in recipe.inputs())
    if opened is None and recipe.base is not None and plain and not recipe.without_heads and not recipe.chat_template:
        named: Any = recipe.experts, recipe.base
        return task_vectors(named[1], named[0], exclude=recipe.exclude, heads=recipe.heads, where=recipe.lines)
    opened = _open_models(recipe) if opened is None else opened
    if recipe.stack:
        return _finished(_stacked(recipe.parts(), opened))
    if recipe.towers:
        return _finished(side_by_side([_made(recipe.part(one.source), of) for one, of in _apart(recipe, opened)]))
    experts = {task: _open_input(source, opened, part) for task, source in recipe.experts.items()}
    base = _open_input(recipe.base, opened, part) if recipe.base is not None else origin(experts)
    tvs = task_vectors(base, experts, exclude=recipe.exclude, heads=recipe.heads, where=recipe.lines)
    if recipe.without_heads:
        check_whole(tvs)
    return tvs


def merged(recipe: "Recipe", opened: Opened | None = None, part: Part = WHOLE) -> Weights:
    """The model that a recipe describes, computed when it is read, with its side files."""
    from calmerge.recipe import build

    tvs = open_recipe(recipe, opened, part)
    check_whole(tvs)
    delta = build(recipe)(tvs, None, None)
    assert isinstance(delta, Weights)  # a recipe inside a recipe gives one model, or its check had failed
    dtype = getattr(torch, recipe.out.dtype) if recipe.out.dtype else None
    return beside(add(tvs.base, delta, dtype=dtype), tvs.base)


def origin(experts: Mapping[str, Weights]) -> Weights:
    """A base of zeros: task vectors over it are the experts' own weights.

    Its types are those in which all experts fit; what is no floating tensor, and the side files, are the first one's.

    >>> from calmerge import task_vectors
    >>> experts = {"a": StateDict({"w": torch.ones(2)}), "b": StateDict({"w": torch.zeros(2)})}
    >>> task_vectors(origin(experts), experts)["w"]
    tensor([[1., 1.],
            [0., 0.]])
    """
    first = next(iter(experts.values()))
    return beside(_Origin(list(experts.values())), first)


class _Origin(Weights):
    def __init__(self, experts: Sequence[Weights]) -> None:
        self._first: dict[str, Weights] = {}  # by tensor, the first expert that has it
        specs: dict[str, Spec] = {}
        for name, spec in [item for weights in experts for item in weights.specs.items()]:
            having = [weights for weights in experts if name in weights.specs]
            self._first[name] = having[0]
            types = [weights.specs[name].dtype for weights in having]
            floating = all(dtype.is_floating_point for dtype in types)
            specs.setdefault(name, Spec(spec.shape, reduce(torch.promote_types, types) if floating else spec.dtype))
        self.specs = specs
        self.inputs = tuple(experts)

    @property
    def fingerprint(self) -> str:
        return digest(("zeros", [weights.fingerprint for weights in self.inputs if isinstance(weights, Weights)]))

    def parts(self, name: str) -> Sequence[Node]:
        return () if self.specs[name].dtype.is_floating_point else (self._first[name],)

    def read(self, name: str, rows: slice = ALL, memo: Memo | None = None) -> Tensor:
        spec = self.specs[name]
        if not spec.dtype.is_floating_point:
            return self._first[name].read(name, rows, memo)
        shape = spec.shape if rows == ALL else (rows.stop - (rows.start or 0), *spec.shape[1:])
        return torch.zeros((), dtype=spec.dtype).expand(shape)


def check_whole(tvs: TaskVectors) -> None:
    """All experts have the base's tensors and no others, in the same shapes: nothing would be kept per task.

    Raises:
        CheckpointError: one has a tensor of its own, or of another first dimension; the message names it.
    """
    for task, head in tvs.heads.items():
        for name, spec in head.specs.items():
            theirs = tvs.base.specs.get(name)
            if theirs is None:
                raise CheckpointError(
                    f"expert '{task}' has a tensor '{name}' that the others lack. Remove it from the checkpoint, or "
                    "use a checkpoint of the same architecture."
                )
            advice = (
                "Their vocabularies differ: add 'tokenizer: {source: union}' (or base), which aligns the rows by token."
                if theirs.shape[1:] == spec.shape[1:]
                else "Use a checkpoint of the same architecture."
            )
            raise CheckpointError(
                f"expert '{task}': tensor '{name}' has shape {spec.shape}, base {theirs.shape}. {advice}"
            )
    lost = [n for n, why in tvs.skipped.items() if why == "in no expert"]
    if lost:
        raise CheckpointError(f"the base has a tensor '{lost[0]}' that no expert has. Are they of one architecture?")


def _open_models(recipe: "Recipe") -> dict[str, Weights]:
    """All models that a recipe, or a stack's slices, name: each opened once, and aligned where the recipe says so."""
    wanted = open_models(recipe.models())
    if recipe.tokenizer is not None:
        from calmerge._tokens import aligned

        wanted = aligned(wanted, recipe.tokenizer)
    if recipe.chat_template is not None:
        from calmerge._chat import with_template

        wanted = with_template(wanted, recipe.chat_template)
    return wanted


def open_models(sources: Sequence[Input]) -> dict[str, Weights]:
    """Whole models by key, each opened once; whatever is wrong with any of them, together."""
    opened: dict[str, Weights] = {}
    wanted: list[str] = []
    problems: list[str] = []
    for source in sources:
        try:
            wanted.append(_open_model(source, opened))
        except CheckpointError as e:
            problems.append(str(e))
    raise_together(list(dict.fromkeys(problems)), CheckpointError)
    return {key: opened[key] for key in wanted}


def _open_model(source: Input, opened: dict[str, Weights]) -> str:
    """The key under which a model is now in `opened`."""
    key = key_of(source)
    if isinstance(source, Piece):
        model = _open_model(source.model, opened)
        if source.adapter is not None and key not in opened:
            opened[key] = beside(adapted(opened[model], source.adapter), opened[model])
    elif key in opened:
        return key
    else:
        opened[key] = _open_one(source)
    return key


def _open_one(source: "Place | Recipe") -> Weights:
    return open_checkpoint(source) if isinstance(source, (str, Path)) else merged(source)


def _open_input(source: Input, opened: Opened, part: Part) -> Weights:
    layers = source.layers if isinstance(source, Piece) else None
    return some_layers(opened[key_of(source)], layers, part, label=key_of(source))


def _stacked(slices: Sequence[Input], opened: Opened) -> Weights:
    parts: list[Weights] = []
    start = 0
    for position, source in enumerate(slices):
        part = Part(start, first=position == 0, last=position == len(slices) - 1)
        start += _length(source, opened)
        parts.append(_made(source, opened, part))
    return stack_layers(parts)


def _made(source: Input, opened: Opened, part: Part = WHOLE) -> Weights:
    """A model, some layers of one, or what a recipe makes of several."""
    if isinstance(source, (str, Path, Piece)):
        return _open_input(source, opened, part)
    return merged(source, opened, part)


def _apart(recipe: "Recipe", opened: Opened) -> Iterator[tuple[Tower, Opened]]:
    """The towers, each with what its patterns leave it of every model."""
    left = {key: list(weights) for key, weights in opened.items()}
    for tower in recipe.towers:
        for pattern in tower.tensors:
            if not any(fnmatchcase(name, pattern) for weights in opened.values() for name in weights):
                every = dict.fromkeys(name for weights in opened.values() for name in weights)
                raise UsageError(f"{recipe.file}: towers: '{pattern}' fits no tensor. {did_you_mean(pattern, every)}")
        own = {key: [n for n in names if _fits(n, tower)] for key, names in left.items()}
        left = {key: [n for n in names if not _fits(n, tower)] for key, names in left.items()}
        yield tower, {key: opened[key].only_names(names) for key, names in own.items()}
    for key, names in left.items():
        if names:
            raise CheckpointError(
                f"{key}: the tensor '{names[0]}' fits no tower. Add one without 'tensors', which takes what is left."
            )


def _fits(name: str, tower: Tower) -> bool:
    return not tower.tensors or any(fnmatchcase(name, pattern) for pattern in tower.tensors)


def _length(source: Input, opened: Opened) -> int:
    """How many layers a slice brings; its models must agree."""
    lengths: dict[str, int] = {}
    for one in [source] if isinstance(source, (str, Path, Piece)) else source.models():
        layers = one.layers if isinstance(one, Piece) else None
        lengths[key_of(one)] = layers[1] - layers[0] if layers else depth(opened[key_of(one)])[1]
    if len(set(lengths.values())) > 1:
        told = ", ".join(f"{key} {n}" for key, n in lengths.items())
        raise CheckpointError(f"the models of one slice must bring the same number of layers; here: {told}.")
    return next(iter(lengths.values()))


def _finished(whole: Weights) -> TaskVectors:
    """A model that needs no further merging, as task vectors of no task."""
    return TaskVectors(StateDict({}), (), whole, experts={})
