"""Looking into a model while it runs: what its linear layers are given, token by token."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from calmerge._errors import DataError
from calmerge.tasks.base import Model, Tasks


class OpenModel(Model, Protocol):
    """A model around one torch module, whose parts can be watched."""

    @property
    def module(self) -> nn.Module:
        """The module."""

    @property
    def names(self) -> Mapping[str, str]:
        """By the name of a merged tensor, its name in the module."""


def open_model(tasks: Tasks, why: str) -> OpenModel:
    """The tasks' model, if it shows its module.

    Raises:
        DataError: it does not.
    """
    return shown(tasks.model, why)


def shown(model: Model, why: str) -> OpenModel:
    """The model, if it shows its module; `why` that is needed stands in the error.

    Raises:
        DataError: it does not.
    """
    if not hasattr(model, "module") or not hasattr(model, "names"):
        raise DataError(
            f"{type(model).__name__} does not show its module, and {why}. Use ModuleModel or HuggingFaceModel, or give "
            "it the properties `module` and `names`."
        )
    return model  # type: ignore[return-value]


def linear_layers(model: OpenModel, merged: Mapping[str, Any]) -> dict[str, str]:
    """By merged weight, the path of its layer in the module, for every linear layer ([out, in], or GPT-2's [in, out]).

    >>> from calmerge.tasks.module import ModuleModel
    >>> model = ModuleModel(nn.Sequential(nn.Linear(2, 3), nn.LayerNorm(3)))
    >>> linear_layers(model, {"0.weight": None, "1.weight": None})
    {'0.weight': '0'}
    """
    found = {}
    for name in merged:
        path, _, kind = model.names.get(name, "").rpartition(".")
        if kind == "weight" and is_linear(model.module.get_submodule(path)):
            found[name] = path
    return found


def is_linear(layer: nn.Module) -> bool:
    """Whether a layer multiplies its input with one weight matrix."""
    return isinstance(layer, nn.Linear) or is_transposed(layer)


def is_transposed(layer: nn.Module) -> bool:
    """Whether a linear layer keeps its weight as [in, out], as the Conv1D of GPT-2 does."""
    return type(layer).__name__ == "Conv1D" and getattr(layer, "weight", torch.empty(0)).dim() == 2


@contextmanager
def tapped(module: nn.Module, layers: Mapping[str, str], seen: Callable[[str, Tensor], None]) -> Iterator[None]:
    """While inside, `seen(name, input)` is called whenever a layer runs.

    Args:
        module: the whole model.
        layers: by a name of your choice, the path of a layer.
        seen: gets the name and the layer's first input.

    >>> net = nn.Sequential(nn.Linear(2, 3))
    >>> with tapped(net, {"first": "0"}, lambda name, x: print(name, tuple(x.shape))):
    ...     _ = net(torch.zeros(5, 2))
    first (5, 2)
    """
    hooks = [
        module.get_submodule(path).register_forward_pre_hook(lambda layer, args, name=name: seen(name, args[0]))  # type: ignore[misc]
        for name, path in layers.items()
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def tokens(x: Tensor, inputs: Any) -> Tensor:
    """The rows [n, d] of a layer's input that are no padding, by the batch's attention mask where it has one.

    >>> x = torch.tensor([[[1.0], [2.0]], [[3.0], [0.0]]])
    >>> tokens(x, {"attention_mask": torch.tensor([[1, 1], [1, 0]])}).tolist()
    [[1.0], [2.0], [3.0]]
    """
    mask = inputs.get("attention_mask") if isinstance(inputs, Mapping) else None
    if isinstance(mask, Tensor) and x.dim() == 3 and mask.shape == x.shape[:2]:
        return x[mask.bool()]
    return x.reshape(-1, x.shape[-1])
