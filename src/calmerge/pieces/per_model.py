"""Options that hold one number for each model."""

from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, TypeAlias

from calmerge._errors import UsageError
from calmerge._signature import Fraction, Interval, check, name_of, raise_together
from calmerge._task_vectors import TaskVectors

PerModel: TypeAlias = Sequence[Annotated[float, Interval()]]
"""One number for each model, in their order; or a single one for all."""
FractionPerModel: TypeAlias = Sequence[Fraction]
"""As `PerModel`, each in [0, 1]."""


def checked(fn: Callable[..., Any], tvs: TaskVectors, options: Mapping[str, Any]) -> dict[str, list[float]]:
    """The options that hold a number for each model, as one for each task, after all passed the check of `fn`.

    Raises:
        UsageError: an option has a wrong type, is out of range, or holds another number of numbers.

    >>> import torch; from calmerge import task_vectors
    >>> tvs = task_vectors({"w": torch.zeros(1)}, {t: {"w": torch.ones(1)} for t in "ab"})
    >>> def linear(tvs, *, weight: PerModel, normalize: bool = True): ...
    >>> checked(linear, tvs, {"weight": [0.5], "normalize": True})
    {'weight': [0.5, 0.5]}
    """
    raise_together(check(fn, options))
    several = {o: v for o, v in options.items() if isinstance(v, Sequence) and not isinstance(v, str)}
    return {o: one_each(tvs, f"{name_of(fn)}.{o}", v) for o, v in several.items()}


def one_each(tvs: TaskVectors, option: str, values: Sequence[float]) -> list[float]:
    """The values as one for each task; `option` is what a message calls them.

    Raises:
        UsageError: their number is neither 1 nor that of the tasks.

    >>> import torch; from calmerge import task_vectors
    >>> tvs = task_vectors({"w": torch.zeros(1)}, {t: {"w": torch.ones(1)} for t in "ab"})
    >>> one_each(tvs, "linear.weight", [0.5]), one_each(tvs, "linear.weight", [0.5, 1.0])
    ([0.5, 0.5], [0.5, 1.0])
    >>> one_each(tvs, "linear.weight", [0.5, 1.0, 2.0])
    Traceback (most recent call last):
    calmerge._errors.UsageError: linear.weight must hold one number, or one for each of the 2 models (a, b), got 3.
    """
    if len(values) == 1:
        return [*values] * len(tvs.tasks)
    if len(values) != len(tvs.tasks):
        raise UsageError(
            f"{option} must hold one number, or one for each of the {len(tvs.tasks)} models "
            f"({', '.join(tvs.tasks)}), got {len(values)}."
        )
    return [*values]
