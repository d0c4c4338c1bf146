"""The files around the weights: read where the weights were opened, or as they are to be written."""

import copy
import json
from collections.abc import Mapping
from typing import Any, TypeVar

from calmerge._errors import CheckpointError
from calmerge._weights import Weights

W = TypeVar("W", bound=Weights)

_TOKENIZER = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "merges.txt", "vocab.txt", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "chat_template.jinja",
    "chat_template.json",
)  # fmt: skip


def side_file(weights: Weights, name: str) -> bytes | None:
    """The content of one side file, or None if there is none of that name.

    >>> from calmerge import StateDict
    >>> weights = with_edits(StateDict({}), {"config.json": b"{}"})
    >>> side_file(weights, "config.json"), side_file(weights, "tokenizer.json")
    (b'{}', None)
    """
    if name in weights.edits:
        return weights.edits[name]
    if weights.folder is None or not (weights.folder / name).is_file():
        return None
    return (weights.folder / name).read_bytes()


def json_file(weights: Weights, name: str) -> dict[str, Any]:
    """A side file that holds a JSON mapping; empty if there is no such file."""
    content = side_file(weights, name)
    if content is None:
        return {}
    try:
        found = json.loads(content)
    except ValueError as e:
        raise CheckpointError(f"{weights.folder}/{name}: not valid JSON ({e}). Download it again.") from None
    return found if isinstance(found, dict) else {}


def config_of(weights: Weights) -> dict[str, Any]:
    """The model's configuration; empty if it has none."""
    return json_file(weights, "config.json")


def with_edits(weights: W, edits: Mapping[str, bytes | None]) -> W:
    """The same weights, with other side files around them."""
    changed = copy.copy(weights)
    changed.edits = {**weights.edits, **edits}
    return changed


def with_config(weights: W, config: Mapping[str, Any]) -> W:
    """The same weights with another configuration; unchanged if they have none."""
    if not config or config == config_of(weights):
        return weights
    return with_edits(weights, {"config.json": as_json(config)})


def beside(weights: W, source: Weights) -> W:
    """The same weights with the side files of `source` around them."""
    changed = copy.copy(weights)
    changed.folder, changed.edits = source.folder, source.edits
    return changed


def tokenizer_files(weights: Weights) -> dict[str, bytes | None]:
    """All files of a tokenizer by name, None for those that are not there."""
    return {name: side_file(weights, name) for name in _TOKENIZER}


def as_json(content: Any) -> bytes:
    """Indented JSON with a line end."""
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()
