"""Tensors that a model holds under two names, as input and output embeddings often are: counted and written once."""

import json
from collections.abc import Hashable
from typing import Any

import torch

from calmerge._checkpoint import Checkpoint
from calmerge._weights import StateDict, Weights

_INPUTS = ("shared", "embed_tokens", "word_embeddings", "wte", "embed_in", "tok_embeddings")
_OUTPUTS = (
    "lm_head", "embed_out", "lm_head.decoder", "cls.predictions.decoder", "predictions.decoder", "vocab_projector",
    "encoder.embed_tokens", "decoder.embed_tokens",
)  # fmt: skip


def tied_names(weights: Weights) -> dict[str, str]:
    """By name of a tensor that is another one's double, the name of the one that is kept.

    Tensors in memory, and those of files that `torch.save` wrote, are tied where they share storage: the first name is
    kept. Others in files are where `config.json` says `tie_word_embeddings` and both embeddings are stored: the
    input's is kept, as `save_pretrained` does.

    >>> embedding = torch.ones(2, 3)
    >>> tied_names(StateDict({"embed.weight": embedding, "lm_head.weight": embedding, "w": torch.ones(2, 3)}))
    {'lm_head.weight': 'embed.weight'}
    """
    found = _sharing(weights)
    if found:
        return found
    return _by_config(weights) if isinstance(weights, StateDict | Checkpoint) else {}


def without_doubles(weights: Weights, base: Weights | None = None) -> Weights:
    """The weights without the doubles of tied tensors; an expert's also without those that its base has.

    An expert that has untied them, so that its double is another tensor, keeps it: as a head of its own.

    Args:
        weights: as they were opened.
        base: of an expert, the base as it was opened.
    """
    doubles = tied_names(weights)
    for double, kept in (tied_names(base) if base is not None else {}).items():
        if double in weights.specs and kept in weights.specs and not _differ(weights, double, kept):
            doubles[double] = kept
    return weights.only_names([name for name in weights.specs if name not in doubles]) if doubles else weights


def _sharing(weights: Weights) -> dict[str, str]:
    first: dict[Hashable, str] = {}
    doubles = {}
    for name in weights.specs:
        place = _place(weights, name)
        if place is not None and first.setdefault(place, name) != name:
            doubles[name] = first[place]
    return doubles


def _place(weights: Weights, name: str) -> Hashable | None:
    """What two tensors with the same entries in the same place have in common; None where that is not known."""
    if not weights.specs[name].numel:
        return None
    if isinstance(weights, Checkpoint):
        return weights.entries[name]
    if not isinstance(weights, StateDict):
        return None
    tensor = weights.read(name)
    return None if tensor.is_meta else (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())


def _by_config(weights: Weights) -> dict[str, str]:
    if _config(weights).get("tie_word_embeddings") is not True:
        return {}
    inputs = [name for end in _INPUTS for name in weights.specs if _ends(name, end)]
    doubles = {}
    for double in (name for end in _OUTPUTS for name in weights.specs if _ends(name, end)):
        kept = next((name for name in inputs if weights.specs[name] == weights.specs[double]), double)
        if kept != double and kept not in doubles:
            doubles[double] = kept
    return doubles


def _ends(name: str, end: str) -> bool:
    return f".{name}".endswith(f".{end}.weight")


def _differ(weights: Weights, double: str, kept: str) -> bool:
    """Whether an expert has two tensors where its base has one."""
    if weights.specs[double] != weights.specs[kept]:
        return True
    if _place(weights, double) is not None and _place(weights, double) == _place(weights, kept):
        return False
    said = None if isinstance(weights, StateDict) else _config(weights).get("tie_word_embeddings")
    return not torch.equal(weights.read(double), weights.read(kept)) if said is None else said is False


def _config(weights: Weights) -> dict[str, Any]:
    """The configuration beside the weights, with that of its language part on top."""
    if weights.folder is None:
        return {}
    try:
        found = json.loads((weights.folder / "config.json").read_text())
        return {**found, **found.get("text_config", {})}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}
