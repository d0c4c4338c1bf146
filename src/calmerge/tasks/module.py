"""Any torch module as a model of several tasks."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from calmerge._errors import DataError
from calmerge.tasks.base import Outputs

Head = Callable[[Tensor], Tensor]


class ModuleModel:
    """A `torch.nn.Module` whose features a head per task turns into class scores.

    logits = head_t(module(inputs; weights))

    Args:
        module: the backbone; weights that are not merged keep the values it holds. It is put into evaluation mode, and
            its own parameters take no gradients any more.
        heads: by task, a module or function from features to class scores, which is never changed; None if the module
            gives class scores itself.
        device: where the heads are put; the module follows the weights it is called with.

    Inputs that are a mapping become keyword arguments, a tuple or list positional ones. What the module returns may be
    a tensor or carry one as `.logits`.

    >>> model = ModuleModel(torch.nn.Linear(2, 3, bias=False), {"cars": torch.nn.Identity()})
    >>> model.logits({"weight": torch.ones(3, 2)}, torch.ones(1, 2), "cars")
    tensor([[2., 2., 2.]])
    """

    def __init__(
        self,
        module: nn.Module,
        heads: Mapping[str, Head] | None = None,
        *,
        device: str | torch.device = "cpu",
    ) -> None:
        self._module = module.to(device).eval().requires_grad_(False)
        tensors = [self._module.named_parameters(remove_duplicate=False), self._module.named_buffers()]
        self._names = {name for named in tensors for name, _ in named}
        self._heads = dict(heads) if heads is not None else None
        for head in (self._heads or {}).values():
            if isinstance(head, nn.Module):
                head.to(device).eval().requires_grad_(False)

    @property
    def module(self) -> nn.Module:
        """The backbone."""
        return self._module

    @property
    def names(self) -> Mapping[str, str]:
        """Merged tensors have the module's own names."""
        return {name: name for name in self._names}

    def logits(self, weights: Mapping[str, Tensor], inputs: Any, task: str) -> Tensor:
        """Class scores [n, classes]; of `weights` those are used that the module has.

        Raises:
            DataError: the task has no head, or the module has none of the weights.
        """
        return self.outputs(weights, inputs, task).logits

    def outputs(self, weights: Mapping[str, Tensor], inputs: Any, task: str) -> Outputs:
        """Class scores, and what the module gives to the head.

        Raises:
            DataError: the task has no head, or the module has none of the weights.
        """
        args, kwargs = _arguments(inputs)
        known = {name: w for name, w in weights.items() if name in self._names}
        if weights and not known:
            raise DataError(
                f"the module has none of the merged tensors: they are named '{next(iter(weights))}', its own "
                f"'{min(self._names, default='(none)')}'. Give task_vectors a base with the module's names."
            )
        output = functional_call(self._module, known, args, kwargs)
        features: Tensor = getattr(output, "logits", output)
        return Outputs(self.head(features, task), features)

    def head(self, features: Tensor, task: str) -> Tensor:
        """Class scores [n, classes] of what the task's head is given; the features themselves where there are no heads.

        Raises:
            DataError: the task has no head.
        """
        if self._heads is None:
            return features
        if task not in self._heads:
            raise DataError(f"task '{task}' has no head; heads are given for {', '.join(self._heads)}.")
        return self._heads[task](features)


def _arguments(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    if isinstance(inputs, tuple | list):
        return tuple(inputs), {}
    return (inputs,), {}
