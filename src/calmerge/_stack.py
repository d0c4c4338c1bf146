"""Stacks of layers: some layers of a model under new numbers, and models put on top of each other."""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from calmerge._errors import CheckpointError
from calmerge._layers import layers as layers_of
from calmerge._side_files import beside, config_of, with_config
from calmerge._weights import Gathered, Weights

_COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
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
    told = {settings[key] for settings in _settings(config_of(weights)) for key in _COUNTS if key in settings}
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
    return with_config(chosen, _of_layers(config_of(weights), count, list(range(first, end))))


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
    return with_config(whole, _together([config_of(part) for part in parts]))


def _settings(config: dict[str, Any]) -> list[dict[str, Any]]:
    """A configuration, and that of the language model inside it."""
    inner = config.get("text_config")
    return [config, inner] if isinstance(inner, dict) else [config]


def _of_layers(config: dict[str, Any], count: int, chosen: Sequence[int]) -> dict[str, Any]:
    """A configuration with its number of layers, and its lists of one entry a layer, for some of them."""

    def changed(settings: dict[str, Any]) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for key, value in settings.items():
            if key in _COUNTS and value == count:
                value = len(chosen)
            elif isinstance(value, list) and len(value) == count and key.startswith(("layer_", "layers_", "no_rope")):
                value = [value[i] for i in chosen]
            elif key == "text_config" and isinstance(value, dict):
                value = changed(value)
            result[key] = value
        return result

    return changed(config)


def _together(configs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The first configuration, with the layers of all."""

    def joined(settings: Sequence[dict[str, Any]]) -> dict[str, Any]:
        first = settings[0]
        counts = [next((s[k] for k in _COUNTS if k in s), 0) for s in settings]
        result: dict[str, Any] = {}
        for key, value in first.items():
            lists = [s.get(key) for s in settings]
            if key in _COUNTS and value == counts[0]:
                value = sum(counts)
            elif (
                isinstance(value, list)
                and key.startswith(("layer_", "layers_", "no_rope"))
                and all(isinstance(x, list) and len(x) == n for x, n in zip(lists, counts, strict=True))
            ):
                value = [entry for one in lists for entry in one or ()]
            elif key == "text_config" and isinstance(value, dict) and all(isinstance(x, dict) for x in lists):
                value = joined([x for x in lists if isinstance(x, dict)])
            result[key] = value
        return result

    return joined(configs)
