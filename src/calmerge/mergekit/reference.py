"""How mergekit's files name a model."""

import re
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path

from calmerge._yaml import Node


@dataclass(frozen=True)
class Reference:
    """A model, and a LoRA adapter on it.

    Attributes:
        model: a path, a hub id as `id@revision`, or the name of an earlier document.
        adapter: likewise; None if there is none.
        where: "file:line".
    """

    model: str
    adapter: str | None = None
    where: str = field(default="", compare=False)

    def __str__(self) -> str:
        """As a file writes it."""
        return self.model + (f"+{self.adapter}" if self.adapter else "")


def read_reference(node: Node, problems: list[str], *, names: Collection[str] = ()) -> Reference | None:
    """The model that `node` names: text as `path[@revision][+adapter[@revision]]`, or a mapping; None after a mistake.

    Text that is a path as it stands is not taken apart, so that a folder's name may hold `+` or `@`.

    >>> from calmerge._yaml import parse
    >>> read_reference(parse("org/a@main+org/b", "c.yml"), [])
    Reference(model='org/a@main', adapter='org/b', where='c.yml:1')
    >>> read_reference(parse("{model: {path: ./a}, lora: {path: ./b}}", "c.yml"), [])
    Reference(model='./a', adapter='./b', where='c.yml:1')
    """
    if isinstance(node.value, str):
        return parse_reference(node.value, node.where, names)
    if not node.is_mapping():
        problems.append(
            f"{node.where}: a model is a path or hub id, or {{model: {{path: ...}}}}; got {node.plain()!r}."
        )
        return None
    for key, part in node.items():
        if key not in ("model", "lora", "override_architecture"):
            problems.append(f"{part.where}: a model has the keys model, lora and override_architecture, not '{key}'.")
            return None
    lora = node.get("lora")
    if lora is not None and lora.is_list():
        problems.append(f"{lora.where}: 'lora' is one adapter, as in lora: {{path: ./adapter}}; a list is not read.")
        return None
    model = _place(node.get("model"), node.where, "model", problems)
    adapter = _place(lora, node.where, "lora", problems) if lora is not None and lora.value is not None else None
    return None if model is None else Reference(model, adapter, node.where)


def parse_reference(text: str, where: str, names: Collection[str] = ()) -> Reference:
    """The model that a text names; see `read_reference`."""
    if text in names or Path(text).expanduser().exists():
        return Reference(text, None, where)
    model, plus, adapter = text.partition("+")
    return Reference(model, adapter if plus else None, where)


def _place(node: Node | None, where: str, key: str, problems: list[str]) -> str | None:
    """A path or hub id with its revision, out of `{path, revision}` or text."""
    if node is not None and isinstance(node.value, str):
        return node.value
    path = None if node is None else node.get("path")
    if node is None or path is None or not isinstance(path.value, str) or set(node.value) - {"path", "revision"}:
        problems.append(f"{node.where if node else where}: '{key}' of a model is {{path: ..., revision: ...}}.")
        return None
    revision = node.get("revision")
    text: str = path.value
    return f"{text}@{revision.value}" if revision is not None and revision.value and _is_hub(text) else text


def _is_hub(text: str) -> bool:
    return bool(re.fullmatch(r"[\w.-]+/[\w.-]+", text)) and not Path(text).exists()
