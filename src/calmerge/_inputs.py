"""What a recipe may merge: a checkpoint, some of its layers, one with an adapter, or what another recipe makes."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Union

from calmerge._errors import did_you_mean
from calmerge._signature import check
from calmerge._yaml import Node
from calmerge.suites.suite import located

if TYPE_CHECKING:
    from calmerge._recipe import Recipe

Place = Path | str
"""A path, or a hub id."""
Input = Union[Path, str, "Piece", "Recipe"]


@dataclass(frozen=True)
class Piece:
    """A model that is not taken as it lies there.

    Attributes:
        model: a checkpoint, or a merge whose result is taken.
        adapter: a LoRA adapter that is added to it.
        layers: the first of the layers that are taken, and the first that is not; all if None.
    """

    model: "Place | Recipe"
    adapter: Place | None = None
    layers: tuple[int, int] | None = None

    def __str__(self) -> str:
        """The model as messages call it."""
        return key_of(self)


@dataclass(frozen=True)
class Tower:
    """A part of a model that is merged, or stacked, for itself.

    Attributes:
        tensors: shell patterns of what it has in every model; what no other tower has, if there are none.
        source: where it comes from.
    """

    tensors: Sequence[str]
    source: Input


def key_of(source: Input) -> str:
    """What tells one model from another, whichever layers of it are taken: where it lies, and its adapter."""
    if isinstance(source, Piece):
        return key_of(source.model) + (f"+{source.adapter}" if source.adapter else "")
    if isinstance(source, (Path, str)):
        return str(source)
    return source.name


def places_of(source: Input | None) -> Iterator[Place]:
    """Every checkpoint behind an input."""
    if source is None:
        return
    if isinstance(source, (Path, str)):
        yield source
    elif isinstance(source, Piece):
        yield from places_of(source.model)
        yield from places_of(source.adapter)
    else:
        for one in source.inputs():
            yield from places_of(one)


def read_input(
    node: Node, folder: Path, problems: list[str], *, what: str, read_recipe: Callable[[Node, str], "Recipe | None"]
) -> Input | None:
    """The input that `node` writes; mistakes go to `problems`.

    Args:
        node: a path or hub id; `{model, adapter, layers}`; or a recipe, which has `merge`, `stack` or `towers`.
        folder: where relative paths start.
        problems: gets one sentence for each mistake.
        what: what messages call the input, such as "expert 'cars'".
        read_recipe: reads a recipe inside the recipe, under a name.
    """
    if isinstance(node.value, str):
        return located(node.value, folder)
    if any(node.get(key) is not None for key in ("merge", "stack", "towers")):
        return read_recipe(node, what)
    if not node.is_mapping():
        problems.append(
            f"{node.where}: {what} must be text (a path or a hub id), {{model: PATH, layers: [0, 8]}}, or a merge with "
            f"its own 'experts' and 'merge'; got {node.plain()!r}."
        )
        return None
    given: dict[str, Any] = {key: part.plain() for key, part in node.items()}
    model = node.get("model")
    if model is not None:
        given["model"] = read_input(model, folder, problems, what=what, read_recipe=read_recipe)
    faults = check(_keys_of_an_input, given, node.lines(), name=what, noun="key")
    layers = given.get("layers")
    if not faults and layers is not None and not (len(layers) == 2 and 0 <= layers[0] < layers[1]):
        faults.append(
            f"{node.value['layers'].where}: {what}: layers must be [first, end], counted from 0 and without the end, "
            f"as in [0, 8]; got {layers}."
        )
    problems += faults
    if faults or given["model"] is None:
        return None
    adapter = located(given["adapter"], folder) if given.get("adapter") else None
    if adapter is None and layers is None:
        return given["model"]  # type: ignore[no-any-return]
    return Piece(given["model"], adapter, (layers[0], layers[1]) if layers else None)


def read_tower(node: Node, what: str, read: Callable[[Node, str], Input | None], problems: list[str]) -> Tower | None:
    """The tower that `node` writes: an input, and `tensors` beside its keys.

    Args:
        node: a path or hub id, or a mapping.
        what: what messages call it.
        read: reads the input.
        problems: gets one sentence for each mistake.
    """
    for key, part in node.items():
        if key != "tensors" and "mean" in (hint := did_you_mean(key, ["tensors"])):
            problems.append(f"{part.where}: {what} has no key '{key}'. {hint}")
            return None
    stated = node.get("tensors")
    patterns: list[str] = []
    if stated is not None:
        patterns = [one.value for one in stated.value if isinstance(one.value, str)] if stated.is_list() else []
        if not patterns or len(patterns) < len(stated.value):
            problems.append(f"{stated.where}: 'tensors' is a list of shell patterns, as in ['vision.*'].")
            return None
        node = replace(node, value={key: part for key, part in node.items() if key != "tensors"})
    source = read(node, what)
    return Tower(tuple(patterns), source) if source is not None else None


def _keys_of_an_input(*, model: Any, adapter: str | None = None, layers: list[int] | None = None) -> None:
    """The keys of an input that is written as a mapping, in a form that `check` can read."""
