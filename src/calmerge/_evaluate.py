"""Test scores of one merged folder."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from calmerge._checkpoint import open_checkpoint
from calmerge._errors import CheckpointError
from calmerge._merged import is_patched, open_merged
from calmerge._run import Run

if TYPE_CHECKING:
    from torch import Tensor

    from calmerge.report.results import Score
    from calmerge.suites.suite import Suite
    from calmerge.tasks.base import Split, Tasks


def evaluate(
    folder: str | Path,
    suite: "Suite",
    *,
    split: "Split" = "test",
    experts: bool = False,
    run: Run | None = None,
) -> "dict[str, dict[str, Score]]":
    """Scores by task of the model in `folder`, under the heads of the suite's experts.

    Args:
        folder: what `save` wrote (with patches, every task is scored on the model it has for itself), or any checkpoint
            with the names of the suite's base.
        suite: tasks, data and heads; what is missing of an embedded suite is fetched or made.
        split: labelled split to score.
        experts: whether to score every expert on its own task too, for a comparison.
        run: progress.

    Returns:
        {"merged": scores by task}, with a router {"routed": scores where it decides, not the name of the task}, and, if
        asked for, {"experts": scores by task}.

    Raises:
        CheckpointError: `folder` lacks tensors that are merged in this suite, or has them in another shape.
        DataError: a task has no such split, or no labels.
    """
    from calmerge.suites.prepare import prepare
    from calmerge.tasks.hf import open_suite
    from calmerge.tasks.serving import serving

    run = run or Run()
    merged = open_checkpoint(folder)
    prepare(suite, run=run)
    tvs, tasks = open_suite(suite, run=run)
    for name, spec in tvs.specs.items():
        if name not in merged.specs or merged.specs[name].shape != spec.shape:
            found = f"has it in shape {merged.specs[name].shape}" if name in merged.specs else "lacks it"
            raise CheckpointError(
                f"'{folder}' is no merge of the experts of suite '{suite.name}': these have a tensor '{name}' of shape "
                f"{spec.shape}, the folder {found}."
            )
    if is_patched(folder):
        patched = open_merged(folder)
        base = merged.only_names(tvs)
        scores = {"merged": _served(serving(patched, base, tasks, routed=False), tasks, split)}
        if patched.router is not None:
            scores["routed"] = _served(serving(patched, base, tasks), tasks, split)
    else:
        scores = {"merged": tasks.evaluate({name: merged.read(name).float() for name in tvs}, split, run=run)}
    if experts:
        scores["experts"] = {t: tasks.score(tasks.logits(tvs.expert(t), t, split), t, split) for t in tvs.tasks}
    return scores


def _served(logits: "Callable[[str, Split], Tensor]", tasks: "Tasks", split: "Split") -> "dict[str, Score]":
    return {task: tasks.score(logits(task, split), task, split) for task in tasks}
