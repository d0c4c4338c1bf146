"""A model's blocks, run one at a time: what each is given, and what it makes of it."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from calmerge._errors import DataError
from calmerge._layers import layers
from calmerge.tasks.base import Tasks
from calmerge.tasks.taps import OpenModel


@dataclass(frozen=True)
class Block:
    """A part of a model that is called once: its path in the module, and its merged tensors by their names inside."""

    path: str
    tensors: Mapping[str, str]


@dataclass(frozen=True)
class Call:
    """What one block was called with, and what came out."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    output: Tensor


def blocks_of(model: OpenModel, base: Iterable[str], merged: Iterable[str]) -> list[Block]:
    """The blocks that hold merged tensors; stages that are mere lists of blocks are taken apart. A model without blocks
    is one.

    Args:
        model: shows its module.
        base: names of all tensors of the base, from which the blocks are told.
        merged: names of the merged ones.

    >>> from calmerge.tasks.module import ModuleModel
    >>> net = nn.ModuleDict({"h": nn.ModuleList([nn.Sequential(nn.Linear(1, 1)), nn.Sequential(nn.Linear(1, 1))])})
    >>> names = list(net.state_dict())
    >>> [(block.path, list(block.tensors)) for block in blocks_of(ModuleModel(net), names, names)]
    [('h.0', ['0.weight', '0.bias']), ('h.1', ['0.weight', '0.bias'])]
    """
    places = layers(base)
    found: dict[str, dict[str, str]] = {}
    for name in merged:
        if name not in places or name not in model.names:
            continue
        own = model.names[name]
        at = f"{places[name].stack}.{places[name].index}."
        path = own[: own.index(at) + len(at) - 1]
        rest = own[len(path) + 1 :]
        while isinstance(model.module.get_submodule(path), nn.ModuleList) and "." in rest:
            step, rest = rest.split(".", 1)
            path = f"{path}.{step}"
        found.setdefault(path, {})[rest] = name
    if not found:  # the whole module is one block
        found[""] = {model.names[name]: name for name in merged if name in model.names}
    return [Block(path, tensors) for path, tensors in found.items()]


def in_order(
    blocks: list[Block], model: OpenModel, tasks: Tasks, task: str, weights: Mapping[str, Tensor]
) -> list[Block]:
    """The blocks in the order in which an input of `task` meets them.

    Raises:
        DataError: one is never called.
    """
    seen: list[str] = []
    hooks = [
        model.module.get_submodule(block.path).register_forward_hook(lambda *_, path=block.path: seen.append(path))
        for block in blocks
    ]
    try:
        with torch.no_grad():
            tasks.forward(weights, tasks.split(task, "pool").batch(torch.arange(1))[0], task)
    finally:
        for hook in hooks:
            hook.remove()
    missing = [block.path for block in blocks if block.path not in seen]
    if missing:
        raise DataError(f"block '{missing[0]}' is never called; exclude its tensors from the merge.")
    return sorted(blocks, key=lambda block: seen.index(block.path))


def call_of(
    block: Block, model: OpenModel, tasks: Tasks, task: str, weights: Mapping[str, Tensor], inputs: Any
) -> Call:
    """What the block is called with, and gives, in one forward pass at given weights; no graph."""
    caught: list[Call] = []

    def catch(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        caught.append(Call(args, kwargs, first_tensor(output)))

    hook = model.module.get_submodule(block.path).register_forward_hook(catch, with_kwargs=True)
    try:
        with torch.no_grad():
            tasks.forward(weights, inputs, task)
    finally:
        hook.remove()
    return caught[0]


def run_block(block: Block, model: OpenModel, weights: Mapping[str, Tensor], call: Call) -> Tensor:
    """The block's output for the inputs of `call` at other weights (under merged names), differentiable in them."""
    own = {inside: weights[name] for inside, name in block.tensors.items()}
    output = functional_call(model.module.get_submodule(block.path), own, call.args, dict(call.kwargs))
    return first_tensor(output)


def first_tensor(output: Any) -> Tensor:
    """The hidden states in what a block returned.

    >>> first_tensor((torch.ones(1), None))
    tensor([1.])
    """
    while not isinstance(output, Tensor):
        output = output[0]
    return output
