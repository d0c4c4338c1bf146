"""What a recipe may merge: a checkpoint, some of its layers, one with an adapter, or what another recipe makes."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Union

from calmerge._signature import check
from calmerge._yaml import Node
from calmerge.suites.suite import located

if TYPE_CHECKING:
    from calmerge.recipe import Recipe

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
        node: a path or hub id; `{model, adapter, layers}`; or a recipe, which has `merge` or `stack`.
        folder: where relative paths start.
        problems: gets one sentence for each mistake.
        what: what messages call the input, such as "expert 'cars'".
        read_recipe: reads a recipe inside the recipe, under a name.
    """
    if isinstance(node.value, str):
        return located(node.value, folder)
    if node.get("merge") is not None or node.get("stack") is not None:
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


def _keys_of_an_input(*, model: Any, adapter: str | None = None, layers: list[int] | None = None) -> None:
    """The keys of an input that is written as a mapping, in a form that `check` can read."""
