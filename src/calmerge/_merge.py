"""A whole merge in one call."""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from calmerge._checkpoint import Source, open_checkpoint
from calmerge._errors import UsageError, did_you_mean
from calmerge._merged import Merged
from calmerge._signature import checked_call
from calmerge._task_vectors import TaskVectors, materialise, task_vectors
from calmerge._tied import tied_names
from calmerge._weights import StateDict, Weights, add

if TYPE_CHECKING:
    from calmerge.tasks.base import Tasks


def merge(
    base: Source,
    experts: Mapping[str, Source] | Sequence[Source],
    method: str | Callable[..., Weights],
    *,
    exclude: Sequence[str] = (),
    tasks: "Tasks | None" = None,
    **options: Any,
) -> StateDict:
    """The merged model, all of its tensors in memory, in the base's types; tied ones are one tensor under both names.

    Args:
        base: what the experts were fine-tuned from; a path, a hub id, a mapping of tensors or a module.
        experts: by task, or in order (then they are called expert1, expert2, ...).
        method: a name from `calmerge list`, or a function from task vectors to a delta.
        exclude: shell patterns of tensors that are taken from the base.
        tasks: model and unlabelled pools, for methods that learn from data.
        options: the method's own; unknown ones and values out of range are errors.

    Raises:
        UsageError: an unknown method or option, or a value out of range.
        CheckpointError: checkpoints that cannot be read or do not fit.

    >>> base, cars, pets = {"w": torch.tensor([1.0])}, {"w": torch.tensor([2.0])}, {"w": torch.tensor([4.0])}
    >>> calmerge.merge(base, {"cars": cars, "pets": pets}, "task_arithmetic", scale=0.5)["w"]
    tensor([3.])
    >>> calmerge.merge(base, [cars, pets], "ties", keep=20)
    Traceback (most recent call last):
    calmerge._errors.UsageError: ties.keep must lie in (0, 1], got 20. For 20 % write 0.2.
    """
    named = experts if isinstance(experts, Mapping) else {f"expert{i}": e for i, e in enumerate(experts, 1)}
    fn = _method(method)
    tvs = task_vectors(base, named, exclude=exclude)
    if tasks is not None:
        options["tasks"] = tasks
    delta = checked_call(fn, tvs, **options)
    if isinstance(delta, TaskVectors):
        raise UsageError(
            f"{getattr(fn, '__name__', method)} gives one vector per task; name a method that merges them."
        )
    if isinstance(delta, Merged):
        raise UsageError(
            f"{getattr(fn, '__name__', method)} gives a model for each task; call it on task_vectors(...) and take "
            "for_task(name) of what it gives."
        )
    merged = materialise(add(tvs.base, delta))
    doubles = tied_names(open_checkpoint(base))
    return StateDict({**merged, **{double: merged[kept] for double, kept in doubles.items()}}) if doubles else merged


def _method(method: str | Callable[..., Weights]) -> Callable[..., Weights]:
    from calmerge.methods import METHODS

    if callable(method):
        return method
    if method not in METHODS:
        raise UsageError(f"no method is called '{method}'. {did_you_mean(method, METHODS)}")
    return METHODS[method]
