"""Whether a suite can tell merging methods apart, to be asked before any method is judged on it.

A suite is of no use if its base already does what its experts do, or if plain averaging does. `validity` measures
the four conditions that the embedded suites were chosen by, and whether the order of methods comes out that published
suites show.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch

from calmerge._run import Run
from calmerge._task_vectors import materialise
from calmerge._weights import StateDict, add
from calmerge.methods.average import average
from calmerge.methods.iso_c import iso_c
from calmerge.methods.task_arithmetic import task_arithmetic
from calmerge.methods.ties import ties
from calmerge.methods.tsv_m import tsv_m
from calmerge.suites.classifiers import probe
from calmerge.tasks.base import Split
from calmerge.tasks.data import read_examples
from calmerge.tasks.hf import open_suite

if TYPE_CHECKING:
    from calmerge.suites.suite import Suite

ACCURACIES = Mapping[str, float]
KNOWN = (("average", "task_arithmetic"), ("task_arithmetic", "ties"), ("ties", "tsv_m"), ("ties", "iso_c"))
"""Pairs of merges, in published suites the second above the first."""


def validity(
    suite: "Suite", *, names: Sequence[str] | None = None, split: Split = "validation", run: Run | None = None
) -> dict[str, dict[str, float]]:
    """Accuracy by task of the probe, the experts, the base with the experts' heads, and the fixed merges.

    Args:
        suite: with base, experts and data in place; its tasks name a `train` split for the probe.
        names: only these tasks.
        split: labelled split to measure on.
        run: progress.

    Returns:
        Keys "probe", "experts", "base", "average", "task_arithmetic", "ties", "tsv_m", "iso_c", each with accuracies in
        [0, 1] by task.
    """
    run = run or Run()
    tvs, tasks = open_suite(suite, names=names, run=run)
    nothing = StateDict({name: torch.zeros(spec.shape) for name, spec in tvs.specs.items()})
    deltas = {
        "base": nothing,
        "average": average(tvs),
        "task_arithmetic": task_arithmetic(tvs),
        "ties": ties(tvs),
        "tsv_m": tsv_m(tvs),
        "iso_c": iso_c(tvs),
    }
    found: dict[str, dict[str, float]] = {"probe": {}}
    with run.progress.track("probes of the base", len(tvs.tasks), "task") as bar:
        for name in tvs.tasks:
            found["probe"][name] = _probe(suite, name, split)
            bar.advance(1, task=name)
    found["experts"] = {
        name: tasks.score(tasks.logits(tvs.expert(name), name, split), name, split).accuracy for name in tvs.tasks
    }
    base = tvs.base.only_names(tvs.specs)
    for label, delta in deltas.items():
        scores = tasks.evaluate(materialise(add(base, delta)), split, run=run)
        found[label] = {name: score.accuracy for name, score in scores.items()}
    return found


def normalised(accuracies: ACCURACIES, experts: ACCURACIES) -> float:
    """Mean over the tasks of accuracy / expert's accuracy, in percent.

    >>> normalised({"a": 0.4, "b": 0.9}, {"a": 0.8, "b": 0.9})
    75.0
    """
    return 100 * sum(accuracies[name] / experts[name] for name in experts) / len(experts)


def complaints(found: Mapping[str, ACCURACIES]) -> list[str]:
    """What is wrong with a suite, one sentence each; nothing if its measurements tell methods apart.

    >>> good = {"experts": 0.9, "probe": 0.8, "base": 0.4, "average": 0.5, "task_arithmetic": 0.6}
    >>> complaints({label: {"a": accuracy} for label, accuracy in good.items()})
    []
    >>> complaints({label: {"a": accuracy} for label, accuracy in (good | {"average": 0.3}).items()})
    ["averaging (33.3) is not above the base with the experts' heads (44.4)."]
    """
    experts = found["experts"]
    score = {label: normalised(accuracies, experts) for label, accuracies in found.items()}
    wrong = [
        f"task '{name}': the expert ({experts[name]:.3f}) is not above a linear probe of the base ({probed:.3f})."
        for name, probed in found["probe"].items()
        if experts[name] <= probed
    ]
    if score["base"] >= 80:
        wrong.append(f"the base with the experts' heads reaches {score['base']:.1f} % of the experts; 80 is too near.")
    if score["average"] <= score["base"]:
        wrong.append(
            f"averaging ({score['average']:.1f}) is not above the base with the experts' heads ({score['base']:.1f})."
        )
    if score["task_arithmetic"] > 90:
        wrong.append(f"Task Arithmetic reaches {score['task_arithmetic']:.1f} % of the experts; 90 leaves no room.")
    return wrong


def disorder(found: Mapping[str, ACCURACIES]) -> list[str]:
    """Where the known order of merges is broken: averaging, Task Arithmetic 0.3, TIES, then TSV-M and Iso-C.

    Experts that went far from their base break it, for then the best scale of Task Arithmetic is far below 0.3.

    >>> scores = {"experts": 0.9, "average": 0.5, "task_arithmetic": 0.6, "ties": 0.5, "tsv_m": 0.8, "iso_c": 0.7}
    >>> disorder({label: {"a": accuracy} for label, accuracy in scores.items()})
    ['ties (55.6) is below task_arithmetic (66.7).']
    """
    score = {label: normalised(accuracies, found["experts"]) for label, accuracies in found.items()}
    return [
        f"{better} ({score[better]:.1f}) is below {worse} ({score[worse]:.1f})."
        for worse, better in KNOWN
        if score[better] < score[worse]
    ]


def _probe(suite: "Suite", name: str, split: Split) -> float:
    """Of the mean of the token states for texts, the better feature of an untrained encoder; images as they are."""
    from pathlib import Path

    task = suite.tasks[name]
    base = Path(suite.base)
    kind = "image-classifier" if suite.model.kind == "image-classifier" else "sentence-encoder"
    train, validation, test = (
        read_examples(
            source,  # type: ignore[arg-type]
            base,
            kind=kind,  # type: ignore[arg-type]
            input=task.input,
            label=task.label,
            classes=task.classes,
            max_tokens=suite.model.max_tokens or 128,
        )
        for source in (task.train, task.validation, getattr(task, split))
    )
    return probe(base, train, validation, test, kind=kind, classes=task.classes)  # type: ignore[arg-type]
