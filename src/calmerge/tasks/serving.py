"""Running what is more than one model: routed where there is a router, or each task with the model it has."""

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from calmerge._errors import DataError
from calmerge._merged import Merged
from calmerge._task_vectors import materialise
from calmerge._weights import Weights, add
from calmerge.tasks.base import FeatureModel, Outputs, Split, Tasks, told


class HeadModel(FeatureModel, Protocol):
    """A model whose heads can be run alone."""

    def head(self, features: Tensor, task: str) -> Tensor:
        """Class scores [n, classes] of what the task's head is given."""


class Realigned:
    """A model whose class scores come from its features by way of a task's patch.

    Args:
        model: gives features, and runs its frozen heads.
        patches: by task; those with `scores(features, head)` make class scores, others leave the head as it is.

    Raises:
        DataError: the model does not tell its features, or does not run its heads alone.
    """

    def __init__(self, model: HeadModel, patches: Mapping[str, Any]) -> None:
        self._model, self._patches = told(model), patches
        if not hasattr(model, "head"):
            raise DataError(
                f"{type(model).__name__} does not run its heads alone, and this merge changes what they are given. "
                "Give it a method head(features, task)."
            )
        self._head = model.head

    def logits(self, weights: Mapping[str, Tensor], inputs: Any, task: str) -> Tensor:
        """Class scores [n, classes] by way of the task's patch."""
        return self.outputs(weights, inputs, task).logits

    def outputs(self, weights: Mapping[str, Tensor], inputs: Any, task: str) -> Outputs:
        """Class scores by way of the task's patch, and the features as the model gives them."""
        found = self._model.outputs(weights, inputs, task)
        patch = self._patches[task]
        if not hasattr(patch, "scores"):
            return found
        scores: Tensor = patch.scores(found.features, lambda features: self._head(features, task))
        return Outputs(scores, found.features)


def serving(
    merged: Merged, base: Weights, tasks: Tasks, *, routed: bool | None = None
) -> Callable[[str, Split], Tensor]:
    """From a task and a split to class scores [n, classes] of what was merged.

    Args:
        merged: shared vector, patches and perhaps a router.
        base: theta_0, with every tensor that the model is to be given.
        tasks: model and data.
        routed: whether the router decides, or the name of the task; as there is a router or not when None.

    Raises:
        DataError: the model does not show what the router or the patches work on.
    """
    if merged.router is not None and routed is not False:
        own = tasks.with_model(merged.router.over(tasks.model, base, merged, device=tasks.device))
        return lambda task, split: own.logits({}, task, split)
    if merged.heads == "realigned":
        tasks = tasks.with_model(Realigned(tasks.model, merged.patches))  # type: ignore[arg-type]

    def alone(task: str, split: Split) -> Tensor:
        return tasks.logits(materialise(add(base, merged.for_task(task), dtype=torch.float32)), task, split)

    return alone
