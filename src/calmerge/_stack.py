"""Stacks of layers: some layers of a model under new numbers, models put on top of each other, towers side by side."""

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from calmerge._errors import CheckpointError
from calmerge._layers import layers as layers_of
from calmerge._side_files import beside, config_of, with_config
from calmerge._weights import Gathered, Weights

_COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
_OF_DECODERS = ("decoder_layers", "num_decoder_layers")
_LISTS = ("layer_", "layers_", "no_rope")
_BEFORE = re.compile(r"embed(?!_out|ding_out)|\bw[tp]e\b|\bemb\b")


@dataclass(frozen=True)
class Part:
    """What one slice of a stack takes of a model.

    Attributes:
        start: the number that its first layer gets.
        first: whether it brings what stands before the layers: the embeddings.
        last: whether it brings what stands behind them: the final norm, the head.
    """

    start: int = 0
    first: bool = True
    last: bool = True


WHOLE = Part()


def depth(weights: Weights) -> tuple[str, int]:
    """What stands before the number of a layer, and how many layers there are; of several towers, those of the largest.

    >>> from calmerge import StateDict
    >>> depth(StateDict({f"model.layers.{i}.mlp.weight": torch.zeros(1) for i in range(3)}))
    ('model.layers', 3)
    """
    found = layers_of(weights.specs)
    tensors = Counter(layer.stack for layer in found.values())
    counts = {layer.stack: layer.count for layer in found.values()}
    config = config_of(weights)
    told = {part[key] for part in (config, _section(config, "text_config")) for key in _COUNTS if key in part}
    if not tensors:
        return "", 0
    stack = max(tensors, key=lambda s: (counts[s] in told, tensors[s]))
    return stack, counts[stack]


def stands_before(name: str) -> bool:
    """Whether a tensor outside the layers stands before them, as embeddings do, rather than behind.

    >>> stands_before("model.embed_tokens.weight"), stands_before("lm_head.weight"), stands_before("embed_out.weight")
    (True, False, False)
    """
    return bool(_BEFORE.search(name))


def some_layers(weights: Weights, layers: tuple[int, int] | None, part: Part = WHOLE, *, label: str = "") -> Weights:
    """The layers from the first number up to the second, without it, numbered from `part.start`.

    Args:
        weights: a model.
        layers: the range; all if None.
        part: the new numbers, and whether tensors outside the layers come along.
        label: what messages call the model.

    Raises:
        CheckpointError: the model has fewer layers, or none.

    >>> from calmerge import StateDict
    >>> model = StateDict({"embed": torch.zeros(1), "h.0.ln.w": torch.zeros(1), "h.1.ln.w": torch.zeros(1)})
    >>> list(some_layers(model, (1, 2)))
    ['embed', 'h.0.ln.w']
    """
    if layers is None and part == WHOLE:
        return weights
    stack, count = depth(weights)
    first, end = layers or (0, count)
    if end > count:
        raise CheckpointError(
            f"{label or 'the model'}: layers {first} to {end} are asked for (the last not included), "
            f"but it has {count} layers."
        )
    found = layers_of(weights.specs)
    names: dict[str, str] = {}
    for name in weights:
        layer = found.get(name)
        if layer is None or layer.stack != stack:
            if part.first if stands_before(name) else part.last:
                names[name] = name
        elif first <= layer.index < end:
            inside = name.removeprefix(f"{stack}.{layer.index}.")
            names[f"{stack}.{layer.index - first + part.start}.{inside}"] = name
    chosen = beside(Gathered({new: (weights, old) for new, old in names.items()}), weights)
    config = config_of(weights)
    told: dict[_Place, Any] = {}
    for place in _places(config, stack, count):
        value = _section(config, place[0])[place[1]]
        told[place] = value[first:end] if isinstance(value, list) else end - first
    return with_config(chosen, _changed(config, told))


def stack_layers(parts: Sequence[Weights]) -> Weights:
    """Parts with different names as one model, with the side files of the first and the layers of all.

    Args:
        parts: as `some_layers` gives them, in order.
    """
    names: dict[str, tuple[Weights, str]] = {}
    for part in parts:
        names |= {name: (part, name) for name in part}
    inside = layers_of(names)
    before = [n for n in names if n not in inside and stands_before(n)]
    order = dict.fromkeys([*before, *(n for n in names if n in inside), *names])
    whole = beside(Gathered({name: names[name] for name in order}), parts[0])
    configs = [config_of(part) for part in parts]
    stack, first = depth(parts[0])
    count = next((layer.count for layer in inside.values() if layer.stack == stack), 0)
    told: dict[_Place, Any] = {}
    for section, key in _places(configs[0], stack, first):
        each = [_section(config, section).get(key) for config in configs]
        if not isinstance(each[0], list):
            told[section, key] = count
        elif all(isinstance(value, list) for value in each):
            told[section, key] = [entry for value in each for entry in value or ()]
    return with_config(whole, _changed(configs[0], told))


def side_by_side(towers: Sequence[Weights]) -> Weights:
    """Towers with different names as one model, with the side files of the largest, and the number of layers of each.

    >>> from calmerge import StateDict
    >>> text, vision = StateDict({"text.embed": torch.zeros(1)}), StateDict({"vision.patch": torch.zeros(1)})
    >>> list(side_by_side([text, vision]))
    ['text.embed', 'vision.patch']
    """
    largest = max(towers, key=lambda tower: tower.numel)
    whole = beside(Gathered({name: (tower, name) for tower in towers for name in tower}), largest)
    told: dict[_Place, Any] = {}
    for tower in towers:
        config = config_of(tower)
        told |= {(at, key): _section(config, at)[key] for at, key in _places(config, *depth(tower))}
    return with_config(whole, _changed(config_of(whole), told))


_Place = tuple[str, str]
"""Where a configuration tells something: the section, "" at its top, and the key."""


def _places(config: Mapping[str, Any], stack: str, count: int) -> Iterator[_Place]:
    """Where a configuration tells of a stack: how many layers it has, or one thing for each."""
    for section, keys in _sections(config, stack):
        for key, value in _section(config, section).items():
            listed = isinstance(value, list) and len(value) == count and key.startswith(_LISTS)
            if listed or (key in keys and value == count):
                yield section, key


def _sections(config: Mapping[str, Any], stack: str) -> Iterator[tuple[str, Sequence[str]]]:
    """The sections that tell of a stack, and what they may call its number of layers.

    Those of a tower are told by its name (`vision_config` of `visual.blocks`), an encoder and a decoder by their keys.
    """
    parts = stack.split(".")
    for section, inner in config.items():
        named = section.endswith("_config") and any(part.startswith(section[:3]) for part in parts)
        if isinstance(inner, dict) and (named or section == parts[0]):
            yield section, (*_COUNTS, "depth", "encoder_layers")
            return
    if "decoder" in parts and any(key in config for key in _OF_DECODERS):
        yield "", _OF_DECODERS
    elif "encoder" in parts:
        yield "", (*_COUNTS, "encoder_layers")
    else:
        yield "", _COUNTS
        yield "text_config", _COUNTS


def _section(config: Mapping[str, Any], section: str) -> Mapping[str, Any]:
    inner = config.get(section) if section else config
    return inner if isinstance(inner, dict) else {}


def _changed(config: Mapping[str, Any], told: Mapping[_Place, Any]) -> dict[str, Any]:
    """A configuration with some values anew; sections that it lacks stay away."""
    found = dict(config)
    for (section, key), value in told.items():
        if not section:
            found[key] = value
        elif section in found:
            found[section] = {**found[section], key: value}
    return found
