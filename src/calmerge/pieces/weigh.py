"""Numbers that multiply task vectors, by task."""

from collections.abc import Mapping, Sequence
from typing import Annotated

import torch
from torch import Tensor

from calmerge._errors import UsageError, did_you_mean
from calmerge._signature import Interval, check, raise_together
from calmerge._task_vectors import TaskVectors
from calmerge._weights import Site
from calmerge.pieces.blend import per_task

Number = Annotated[float, Interval()]


def weigh(tvs: TaskVectors, *, weights: Mapping[str, Number]) -> TaskVectors:
    """Task vectors times one number each.

    tau_hat_t = w_t tau_t. Before Task Arithmetic this is its form with a coefficient per task, and with 1, 1 and -1
    analogy: "A is to B as C is to D" with weights A: -1, B: 1, C: 1 gives D.

    Args:
        tvs: task vectors.
        weights: w, by task; 1 for tasks that are not named.

    >>> from calmerge import task_vectors
    >>> tvs = task_vectors({"w": torch.zeros(1)}, {"cars": {"w": torch.ones(1)}, "dtd": {"w": torch.ones(1)}})
    >>> weigh(tvs, weights={"dtd": 0.5})["w"]
    tensor([[1.0000],
            [0.5000]])

    Source: Ilharco et al., "Editing Models with Task Arithmetic", ICLR 2023.
    """
    raise_together(check(weigh, {"weights": weights}))
    factors = torch.tensor(by_task(tvs, "weigh.weights", weights))

    def weighed(tau: Tensor, site: Site) -> Tensor:
        return tau * per_task(factors, tau)

    return tvs.transform(weighed)


def negate(tvs: TaskVectors, *, of: Sequence[str] = ()) -> TaskVectors:
    """Task vectors turned round, so that adding them makes a model worse at their tasks.

    tau_hat_t = -tau_t. How far to go is the scale of the merge that follows: the official choice is the lowest accuracy
    on the task that leaves 95 % of the base's on a control task.

    Args:
        tvs: task vectors.
        of: whose vectors are turned round; those of all tasks when none is named.

    >>> from calmerge import task_vectors
    >>> tvs = task_vectors({"w": torch.zeros(1)}, {"cars": {"w": torch.ones(1)}, "dtd": {"w": torch.ones(1)}})
    >>> negate(tvs, of=["dtd"])["w"]
    tensor([[ 1.],
            [-1.]])

    Source: Ilharco et al., "Editing Models with Task Arithmetic", ICLR 2023.
    """
    raise_together(check(negate, {"of": of}))
    return weigh(tvs, weights=dict.fromkeys(of or tvs.tasks, -1.0))


def by_task(tvs: TaskVectors, option: str, values: Mapping[str, float]) -> list[float]:
    """The values in the order of the tasks, 1 for tasks that are not named; `option` is what a message calls them.

    Raises:
        UsageError: a task that there is not.

    >>> from calmerge import task_vectors
    >>> tvs = task_vectors({"w": torch.zeros(1)}, {t: {"w": torch.ones(1)} for t in ("cars", "dtd")})
    >>> by_task(tvs, "weigh.weights", {"dtd": 0.5})
    [1.0, 0.5]
    >>> by_task(tvs, "weigh.weights", {"dtb": 0.5})
    Traceback (most recent call last):
    calmerge._errors.UsageError: weigh.weights names 'dtb', but there is no such task. Did you mean 'dtd'?
    """
    for task in values:
        if task not in tvs.tasks:
            raise UsageError(f"{option} names '{task}', but there is no such task. {did_you_mean(task, tvs.tasks)}")
    return [float(values.get(task, 1.0)) for task in tvs.tasks]
