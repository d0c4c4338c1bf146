"""A model and its tasks: the only door through which methods reach data."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from calmerge._errors import CalmergeError, DataError, FitError, UsageError, did_you_mean
from calmerge._run import Run
from calmerge.report.results import Score
from calmerge.tasks.data import from_loader

Split = Literal["pool", "validation", "test"]


class Examples(Protocol):
    """An indexable split of examples."""

    def __len__(self) -> int:
        """How many examples there are."""

    def batch(self, indices: Tensor) -> tuple[Any, Tensor | None]:
        """The inputs of some examples, as the model takes them, and their labels where there are any."""


class Model(Protocol):
    """What hides architecture and heads from every method."""

    def logits(self, weights: Mapping[str, Tensor], inputs: Any, task: str) -> Tensor:
        """Class scores [n, classes] under `weights` and the head of `task`, differentiable in the weights."""


@dataclass(frozen=True)
class Task:
    """What is known of one task.

    Args:
        pool: unlabelled examples that a method may adapt on; labels, if there are any, are never asked for.
        test: labelled examples for the final evaluation.
        validation: labelled examples for choosing numbers.
        classes: names of the classes, in the order of the head's outputs.
        transductive: whether the pool is made of the test inputs; stamped on every number that comes out.

    A `DataLoader` may stand for any split: its dataset and its collate function are used, not its order.
    """

    pool: Examples | DataLoader[Any]
    test: Examples | DataLoader[Any] | None = None
    validation: Examples | DataLoader[Any] | None = None
    classes: tuple[str, ...] = ()
    transductive: bool = False


class Outputs(NamedTuple):
    """What a model gives for n inputs: class scores [n, classes], and the features [n, ...] that the head was given."""

    logits: Tensor
    features: Tensor


class FeatureModel(Model, Protocol):
    """A model that also tells what its heads are given."""

    def outputs(self, weights: Mapping[str, Tensor], inputs: Any, task: str) -> Outputs:
        """Logits and features, both differentiable in the weights."""


def told(model: Model) -> FeatureModel:
    """The model, if it tells the features that its heads are given.

    Raises:
        DataError: it does not.
    """
    if not hasattr(model, "outputs"):
        raise DataError(
            f"{type(model).__name__} does not tell the features that its heads are given, which are needed here. "
            "Give it a method outputs(weights, inputs, task)."
        )
    return model  # type: ignore[return-value]


class Batch(NamedTuple):
    """Which examples of which task's pool go through the model together, and what they should come out as."""

    task: str
    indices: Tensor
    targets: Tensor | None = None


Batches = Callable[[int], Iterator[Batch]]
"""From the number of an update to its batches: a function, so that a resumed run sees what it would have seen."""

Objective = Callable[[Any, Any], Tensor]
"""From logits [n, classes] (or `Outputs`, where features are asked for) and targets [n, ...] to one loss."""

Gradient = Callable[[Mapping[str, Tensor], int], dict[str, float]]
"""From weights and the number of an update to the loss by task; dLoss/dtheta is added to each tensor's `.grad`."""


class Tasks(Mapping[str, Task]):
    """A model and the tasks it shall do.

    Args:
        model: gives logits for weights, inputs and a task.
        tasks: by name; the names are those of the experts.
        batch: examples per forward pass when nothing is learned.
        device: where the model computes.
        autocast: a lower precision for the model's arithmetic (`torch.bfloat16`); weights and gradients stay float32.

    Raises:
        DataError: a task has an empty pool.
    """

    def __init__(
        self,
        model: Model,
        tasks: Mapping[str, Task],
        *,
        batch: int = 64,
        device: str | torch.device = "cpu",
        autocast: torch.dtype | None = None,
    ) -> None:
        self.model, self._tasks = model, dict(tasks)
        self.batch, self.device, self.autocast = batch, torch.device(device), autocast
        for name, task in self._tasks.items():
            self.split(name, "pool")
            if task.transductive and task.test is None:
                raise DataError(f"task '{name}' is called transductive but has no test split.")

    def with_model(self, model: Model) -> "Tasks":
        """The same tasks for another model, such as one whose inputs are disturbed."""
        return Tasks(model, self._tasks, batch=self.batch, device=self.device, autocast=self.autocast)

    def with_pools(self, pools: "Mapping[str, Examples | DataLoader[Any]]") -> "Tasks":
        """The same model and tasks with other unlabelled examples, of those tasks that are named."""
        tasks = {name: replace(task, pool=pools.get(name, task.pool)) for name, task in self._tasks.items()}
        return Tasks(self.model, tasks, batch=self.batch, device=self.device, autocast=self.autocast)

    def __getitem__(self, name: str) -> Task:
        if name not in self._tasks:
            raise UsageError(f"no task '{name}'. {did_you_mean(name, self._tasks)}")
        return self._tasks[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tasks)

    def __len__(self) -> int:
        return len(self._tasks)

    def split(self, name: str, split: Split) -> Examples:
        """One split of a task.

        Raises:
            DataError: the task has no such split, it is empty, or no split at all.
        """
        found = getattr(self[name], split)
        if found is None:
            raise DataError(f"task '{name}' has no {split} split.")
        examples = from_loader(found) if isinstance(found, DataLoader) else found
        if not hasattr(examples, "batch"):
            raise DataError(
                f"task '{name}': its {split} must be a DataLoader, or have len() and batch(indices), got "
                f"'{type(examples).__name__}'. Wrap a dataset as DataLoader(dataset)."
            )
        if len(examples) == 0:
            advice = "pool is empty; unlabelled examples are what a method adapts on."
            raise DataError(f"task '{name}': its {advice if split == 'pool' else f'{split} split is empty.'}")
        return examples

    def logits(self, weights: Mapping[str, Tensor], task: str, split: Split = "pool") -> Tensor:
        """The model's class scores for every example of a split: [n, classes], float32, in the split's order."""
        return torch.cat([found.cpu() for found in self._over(weights, task, split, features=False)])

    def features(self, weights: Mapping[str, Tensor], task: str, split: Split = "pool") -> Tensor:
        """What the task's head is given for every example of a split: [n, ...], float32, in the split's order."""
        return self.outputs(weights, task, split).features

    def outputs(self, weights: Mapping[str, Tensor], task: str, split: Split = "pool") -> Outputs:
        """Class scores, and what the task's head is given, for every example of a split, float32, in its order."""
        parts = zip(*self._over(weights, task, split, features=True), strict=True)
        return Outputs(*(torch.cat([part.cpu() for part in one]) for one in parts))

    def _over(self, weights: Mapping[str, Tensor], task: str, split: Split, *, features: bool) -> Iterator[Any]:
        weights = {name: w.to(self.device) for name, w in weights.items()}
        examples = self.split(task, split)
        with torch.no_grad():
            for i in range(0, len(examples), self.batch):
                inputs, _ = examples.batch(torch.arange(i, min(i + self.batch, len(examples))))
                yield self._outputs(weights, inputs, task, features)

    def gradient(
        self,
        objective: Objective,
        batches: Batches,
        *,
        features: bool = False,
        scale: Mapping[str, float] | None = None,
    ) -> Gradient:
        """The gradient of the summed `objective` over the batches of an update, with respect to the weights.

        Args:
            objective: from what the model gives and the batch's targets to a loss.
            batches: the batches of every update.
            features: hand the objective `Outputs` instead of logits.
            scale: by task, what its loss is multiplied by before the gradient is taken; losses are told unscaled.

        Raises (when called):
            FitError: a loss is not finite; the task and the update are named.
            DataError: a loss does not depend on the weights.
        """

        def at(theta: Mapping[str, Tensor], step: int) -> dict[str, float]:
            losses: dict[str, float] = {}
            for task, indices, targets in batches(step):
                inputs, _ = self.split(task, "pool").batch(indices)
                targets = None if targets is None else targets.to(self.device)
                loss = objective(self._outputs(theta, inputs, task, features), targets)
                value = loss.item()
                if value != value or abs(value) == float("inf"):
                    raise FitError(
                        f"update {step + 1}: the loss of task '{task}' is {value}. "
                        "A smaller step size, or a start closer to the experts, keeps it finite."
                    )
                if not loss.requires_grad:
                    raise DataError(
                        f"task '{task}': its loss depends on none of the merged tensors ('{next(iter(theta))}', ...). "
                        "Does the model know them by these names?"
                    )
                (loss if scale is None else loss * scale[task]).backward()  # type: ignore[no-untyped-call]
                losses[task] = losses.get(task, 0.0) + value
            return losses

        return at

    def forward(self, weights: Mapping[str, Tensor], inputs: Any, task: str) -> Tensor:
        """Class scores of one batch of inputs, float32, with a graph where the weights have one.

        Raises:
            DataError: the model fails.
        """
        found: Tensor = self._called(self.model.logits, weights, inputs, task)
        return found.float()

    def loss(
        self, objective: Objective, weights: Mapping[str, Tensor], batches: Iterable[Batch], *, features: bool = False
    ) -> dict[str, float]:
        """The mean `objective` by task over some batches, each weighted by its number of examples; no gradient."""
        sums: dict[str, float] = {}
        counts: dict[str, int] = {}
        with torch.no_grad():
            for task, indices, targets in batches:
                inputs, _ = self.split(task, "pool").batch(indices)
                targets = None if targets is None else targets.to(self.device)
                value = objective(self._outputs(weights, inputs, task, features), targets).item()
                sums[task] = sums.get(task, 0.0) + value * len(indices)
                counts[task] = counts.get(task, 0) + len(indices)
        return {task: value / counts[task] for task, value in sums.items()}

    def evaluate(
        self, weights: Mapping[str, Tensor], split: Split = "test", *, run: Run | None = None
    ) -> dict[str, Score]:
        """Accuracy by task of one model with every task's frozen head.

        Args:
            weights: the merged tensors, or all of the model's.
            split: labelled split to use; choose numbers on `validation`, never on `test`.

        Raises:
            DataError: a split is missing or has no labels, or a label is out of the head's range.
        """
        run = run or Run()
        weights = {name: w.to(self.device) for name, w in weights.items()}
        with run.progress.track("evaluating", len(self), "task") as bar:
            scores = {}
            for task in self:
                scores[task] = self.score(self.logits(weights, task, split), task, split)
                bar.advance(1, task=task)
        return scores

    def score(self, logits: Tensor, task: str, split: Split) -> Score:
        """Accuracy and predicted classes from logits in the split's order."""
        labels = self._labels(task, split)
        classes = logits.shape[1]
        if int(labels.max()) >= classes or int(labels.min()) < 0:
            raise DataError(
                f"task '{task}': {split} has label {int(labels.max() if labels.max() >= classes else labels.min())}, "
                f"but the head has {classes} outputs (0 to {classes - 1})."
            )
        predicted = logits.argmax(1)
        return Score(
            accuracy=(predicted == labels).double().mean().item(),
            n=len(labels),
            predicted=torch.bincount(predicted, minlength=classes).tolist(),
        )

    def _labels(self, task: str, split: Split) -> Tensor:
        examples = self.split(task, split)
        parts = [
            examples.batch(torch.arange(i, min(i + self.batch, len(examples))))[1]
            for i in range(0, len(examples), self.batch)
        ]
        if any(p is None for p in parts):
            raise DataError(f"task '{task}': {split} has no labels, so no accuracy can be told.")
        return torch.cat([p for p in parts if p is not None])

    def _outputs(self, weights: Mapping[str, Tensor], inputs: Any, task: str, features: bool) -> Any:
        """Logits, or logits and features, in float32."""
        if not features:
            return self.forward(weights, inputs, task)
        found = self._called(told(self.model).outputs, weights, inputs, task)
        return Outputs(found.logits.float(), found.features.float())

    def precision(self) -> torch.autocast:
        """The context in which the model computes, for who calls a part of it directly."""
        return torch.autocast(
            self.device.type, dtype=self.autocast or torch.bfloat16, enabled=self.autocast is not None
        )

    def _called(self, model: Callable[..., Any], weights: Mapping[str, Tensor], inputs: Any, task: str) -> Any:
        try:
            with self.precision():
                return model(weights, _moved(inputs, self.device), task)
        except CalmergeError:
            raise
        except Exception as error:
            raise DataError(
                f"task '{task}': the model fails on its inputs with these weights: {type(error).__name__}: {error} "
                "Do the weights and the inputs belong to this model? Try it on the base alone."
            ) from error


def _moved(inputs: Any, device: torch.device) -> Any:
    if isinstance(inputs, Tensor):
        return inputs.to(device)
    if isinstance(inputs, Mapping):
        return {k: _moved(v, device) for k, v in inputs.items()}
    if isinstance(inputs, tuple | list):
        return type(inputs)(_moved(v, device) for v in inputs)
    return inputs
